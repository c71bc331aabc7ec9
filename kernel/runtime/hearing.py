"""What the launcher tells an agent, and what follows from each notice.

What lives here: one task that listens, and the table of what a notice means for its container. What must not: the following
itself (`supervisor`, `succession`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import trio

from mesocosm.kernel.core.errors import from_object
from mesocosm.kernel.launcher.contract import Ended, ExecFailed, LauncherGone, Notice, NotReleased, Started
from mesocosm.kernel.runtime import supervisor, unexecuted
from mesocosm.kernel.runtime.world import World

_AT_ONCE = 16  # notices heard before others get a turn: what follows from each is done in the next


async def hear(world: World, lost: Callable[[], None]) -> None:
    """Listens as long as the agent lives; `lost` is called when the launcher has gone."""
    notices = world.launcher.notices
    async for notice in notices:
        _heard(world, notice, lost)
        with suppress(trio.WouldBlock, trio.EndOfChannel):  # what came with it in the same turn, unless that is very much
            for _ in range(_AT_ONCE):
                _heard(world, notices.receive_nowait(), lost)


def _heard(world: World, notice: Notice, lost: Callable[[], None]) -> None:
    if isinstance(notice, LauncherGone):
        lost()
        return
    if isinstance(notice, NotReleased):
        for group in [found for found in world.groups.values() if found.barrier == notice.barrier]:
            supervisor.never_started(world, group.id, notice.message)
        return
    cell = world.cells.get(notice.container_id)
    if cell is not None:
        world.starting.heard_of(cell.group.id)
    if cell is None or cell.dead.is_set():
        if isinstance(notice, Ended):
            world.acknowledge_soon(notice.container_id)
    elif isinstance(notice, Ended):
        if not cell.gone.is_set():  # else told again: it is in the ledger, or about to be
            supervisor.tell_ended(world, cell, notice)
    elif isinstance(notice, Started):
        first, count = cell.barrier_step, len(cell.plan.setup)
        world.journal.add(cell.id, "started", {"pid": cell.pid}, plan=cell.plan_key, span=(0, 0, first, count))
    elif isinstance(notice, ExecFailed):
        if cell.group.launch is not None and not cell.group.launch.transaction.committed:
            cell.group.launch.member_ended(cell.id, from_object(notice.error))
        else:
            failed = notice.failed  # of one whose table is not known here: what its plan says of it is better
            error = notice.error if failed is None else unexecuted.explain(cell, failed)
            supervisor.exec_failed(world, cell, error)
