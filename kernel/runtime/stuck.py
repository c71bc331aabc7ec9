"""A container that SIGKILL does not end: what is tried, what is said about it, and how it becomes free by itself.

What lives here: insisting. Theory: nothing ends a process that waits in the kernel for a file system which does not answer, or
that a tracer holds; only whoever it waits for can let it go. So nobody waits for it here but its own supervisor: what it is stuck
in is told once, shown by `ps` and `explain` as long as it lasts, looked at again ever more rarely, and each time it is killed once
more, since what froze it may have thawed it. When it ends, all goes on as if it had ended at once.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from mesocosm.kernel.core import supervision
from mesocosm.kernel.core.errors import ConflictError
from mesocosm.kernel.core.names import is_within
from mesocosm.kernel.core.supervision import SIGKILL
from mesocosm.kernel.runtime.world import Cell, World


async def insist(world: World, cell: Cell) -> None:
    """Kills the container and its control groups, and says what it is stuck in, until it is gone."""
    groups = [target for entry in cell.entries for verb, target in entry.undo if verb == "kill_cgroup"]
    attempt = 1
    while True:
        for target in groups:
            with suppress(Exception):  # whatever it is, why it lives is told below
                world.machine.undo("kill_cgroup", target)
        if attempt > 1 and cell.pidfd is not None:
            with suppress(ProcessLookupError):  # reaped, and the news of it on their way
                world.machine.signal(cell.pidfd, SIGKILL)
        with trio.move_on_after(supervision.retry_delay(attempt)):
            await cell.gone.wait()
            break
        await _tell(world, cell)
        attempt += 1
    cell.stuck = None


async def _tell(world: World, cell: Cell) -> None:
    held = await world.machine.why_alive(cell.pid) if cell.pid else ""
    if cell.gone.is_set():
        return
    is_new = cell.stuck is None
    cell.stuck = f"SIGKILL does not end it{f': {held}' if held else ''}"
    if is_new:
        world.journal.add(cell.id, "parked", {"note": cell.stuck})


def refuse(world: World) -> None:
    """ConflictError if all that is alive is stuck, or waits for what is stuck in it: who waits for the end would wait for ever."""
    found = {cell.id: cell.stuck for cell in world.cells.values() if cell.stuck is not None}
    living = [cell.id for cell in world.cells.values() if not cell.dead.is_set()]
    if living and all(any(is_within(stuck, one) for stuck in found) for one in living):
        stuck, why = next(iter(found.items()))
        hint = "it ends by itself when it is let go of; the agent waits for that"
        raise ConflictError(f"{stuck} cannot be ended now: {why}", id=stuck, have=", ".join(found), need="none alive", hint=hint)
