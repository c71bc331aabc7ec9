"""How things ended, as data: the WAIT of a container, the `end` line of a group. Pure functions of the records."""

from __future__ import annotations

from typing import Any

import msgspec

from mesocosm.kernel.contracts import Wait
from mesocosm.kernel.core.errors import describe, from_object
from mesocosm.kernel.core.resources import show_size
from mesocosm.kernel.core.supervision import SIGKILL, decode_status, group_exit
from mesocosm.kernel.runtime.world import Cell, Group, World

LEFT = 126 << 8  # the wait status of who finds its barrier gone
LEAVING = 10.0  # seconds it may take to leave for somebody whose barrier is gone
NEVER_OPENED = "the launcher died before it had opened the barrier: none of it ran"


def wait_as_data(wait: Wait) -> dict[str, Any]:
    """WAIT of the contract."""
    data: dict[str, Any] = msgspec.to_builtins(wait)
    return data


def make_wait(world: World, cell: Cell) -> Wait:
    """What is known about an end. To be asked before the cgroup, whose counter tells about memory, is removed."""
    if cell.wait is not None:
        return cell.wait  # written down by an earlier agent, which did not live to see the rest undone
    if cell.status is None and cell.reason == "rebooted":
        return Wait(cell.id, reason="rebooted", message="the machine was restarted")
    if cell.status is None or cell.status.status is None:
        why = (cell.status.why if cell.status is not None else None) or "nobody living saw it end"
        return Wait(cell.id, reason="unknown", message=why)
    status = cell.status.status
    code, number = decode_status(status)
    if number == SIGKILL:
        for watch in cell.plan.watches:
            if watch.kind == "oom" and world.machine.oom_kills(watch.args):
                limit = str(watch.args.get("limit", "memory"))
                return Wait(cell.id, status, None, number, "memory", limit, oom=True, message=_whose_memory(world, cell))
    reason = cell.reason or ("exited" if number is None else "signaled")
    message = describe(cell.error).partition("\n")[0] if cell.error else None
    return Wait(cell.id, status, code, number, reason, message=message)


def _whose_memory(world: World, cell: Cell) -> str:
    """Its own limit; else that of the nearest around it, which it shared."""
    around: Cell | None = cell
    while around is not None and around.spec.memory is None:
        around = world.cells.get(around.spec.parent or "")
    if around is None:
        return "killed for want of memory: it had no limit of its own"
    size = show_size(around.spec.memory or 0)
    return f"killed at its memory limit of {size}" if around is cell else f"killed at the memory limit of {around.id}, {size}"


def rolled_back_wait(container_id: str, error: dict[str, Any] | None) -> Wait:
    """Of a member of a launch that failed: it never ran."""
    return Wait(container_id, reason="rolled_back", message=(error or {}).get("message"))


def group_code(world: World, group: Group) -> int:
    """The exit code of a group that is over."""
    if group.error is not None:
        return from_object(group.error).exit_code
    waits = [world.cells[member].wait for member in group.members if member in world.cells]
    return group_exit({wait.id: wait.code for wait in waits if wait is not None}, group.blame)


def end_body(world: World, group: Group) -> dict[str, Any]:
    """The last line of a group."""
    waits = {member: world.cells[member].wait for member in group.members if member in world.cells}
    return {
        **group.event_body,
        "state": group.state.value,
        "exit": group_code(world, group),
        "containers": {member: wait_as_data(wait) for member, wait in waits.items() if wait is not None},
        "error": group.error,
        **({"blame": group.blame} if group.blame else {}),
    }
