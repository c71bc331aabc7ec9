"""What is said about containers when somebody asks: the lines of `ps`, and why one is as it is. Reads, and changes nothing."""

from __future__ import annotations

from typing import Any

from mesocosm.kernel.core.errors import LONGEST
from mesocosm.kernel.core.names import parent_of
from mesocosm.kernel.core.plan import plan_as_data
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime import admission
from mesocosm.kernel.runtime import chain as causes
from mesocosm.kernel.runtime.endings import group_code, wait_as_data
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.runtime.world import Cell, World

HOST_NAME = "(all)"  # what is shown in place of the id, where something that all containers shared is left
_MOST_ASIDE = 50  # lines about what has been set aside: an answer has to fit into a frame


def ps_lines(world: World, *, include_dead: bool) -> list[dict[str, Any]]:
    """`ps` lines, parents before children; the dead ones too if asked for."""
    roots = [container_id for container_id in world.tree if "." not in container_id]
    parked: dict[str, list[str]] = {}
    if world.parked.is_set():
        for row in world.ledger.parked():
            parked.setdefault(row.container, []).append(row.note)
    for cell in world.cells.values():
        if cell.stuck is not None:
            parked.setdefault(cell.id, []).append(cell.stuck)
    lines = []
    for container_id in (found for root in roots for found in world.tree.down(root)):
        state = world.tree.state(container_id)
        if state is State.DEAD and not include_dead and container_id not in parked:
            continue
        cell = world.cells[container_id]
        lines.append(
            {
                "id": container_id,
                "parent": cell.spec.parent,
                "state": state.value,
                "pid": None if cell.gone.is_set() else cell.pid,
                "group": container_id.partition(".")[0],
                "role": cell.spec.role,
                "started": cell.started,
                "wait": wait_as_data(cell.wait) if cell.wait is not None else None,
                **({"parked": parked[container_id]} if container_id in parked else {}),
                **({"dropped": dropped} if (dropped := world.budgets.dropped(cell)) else {}),
            }
        )
    # What is left of one that has been removed is shown, too, under its name.
    lines += [_remainder(container_id, parked[container_id]) for container_id in parked if container_id not in world.tree]
    return lines


def _remainder(container_id: str, notes: list[str]) -> dict[str, Any]:
    names = {"id": container_id or HOST_NAME, "parent": parent_of(container_id) if container_id else None}
    unknown = {"pid": None, "group": container_id.partition(".")[0], "role": None, "started": None, "wait": None}
    return {**names, "state": State.DEAD.value, **unknown, "parked": notes}


def end_of(world: World, cell: Cell) -> dict[str, Any]:
    """What somebody who has waited for this container, dead now, is answered; with its group's end, if it is the group's own."""
    assert cell.wait is not None
    answer, group = wait_as_data(cell.wait), cell.group
    if group.id == cell.id:
        answer["group"] = {"state": group.state.value, "exit": group_code(world, group), "error": group.error}
    return answer


def explanation(world: World, container_id: str) -> dict[str, Any]:
    """Why a container is as it is: state, wait, error, its group's state and error, its plan, what is parked."""
    cell: Cell = admission.known(world.cells, container_id)
    group = cell.group
    state = group.launch.transaction.state if group.launch is not None else group.state
    over = group.over.is_set()
    chain = causes.make(_record(world, cell), lambda other: _record(world, world.cells[other]) if other in world.cells else None)
    return {
        "id": container_id,
        "state": world.tree.state(container_id).value,
        "started": cell.started,
        "ended": cell.ended_at,
        "wait": wait_as_data(cell.wait) if cell.wait is not None else None,
        "error": cell.error or group.error,
        "group": {
            "id": group.id,
            "state": state.value,
            "error": group.error,
            "exit": group_code(world, group) if over else None,
            "blame": group.blame,
        },
        "reason": cell.reason,
        "plan": plan_as_data(cell.plan),
        "grants": cell.grants,
        "logs": world.budgets.told(cell),
        "parked": [
            *([cell.stuck] if cell.stuck is not None else ()),
            *(row.note for row in world.ledger.parked() if row.container == container_id),
        ],
        "chain": chain,
    }


def _record(world: World, cell: Cell) -> dict[str, Any]:
    """What the chain of causes is made of."""
    group = cell.group
    state = group.launch.transaction.state if group.launch is not None else group.state
    error = group.error or (group.launch.error.as_object() if group.launch is not None and group.launch.error else None)
    return {
        "id": cell.id,
        "state": world.tree.state(cell.id).value,
        "wait": wait_as_data(cell.wait) if cell.wait is not None else None,
        "own_error": cell.error,
        "reason": cell.reason,
        "group": {"id": group.id, "state": state.value, "blame": group.blame, "error": error},
    }


def set_aside(ledger: Ledger, *, forget: bool) -> dict[str, Any]:
    """What could not be read of the ledger, until somebody has seen it (`forget`), and why it cannot be written, if so."""
    told = {"path": ledger.path, "trouble": None if ledger.trouble is None else str(ledger.trouble)}
    lines = ledger.set_aside_words()
    if forget:
        ledger.forget_set_aside()
    return {**told, "set_aside": [{**line, "said": line["said"][:LONGEST]} for line in lines[-_MOST_ASIDE:]]}
