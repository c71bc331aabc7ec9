"""Forgetting dead containers: what is kept of them (logs, sandbox) goes, then their record."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

import trio

from mesocosm.kernel.core.errors import ConflictError, MesoError
from mesocosm.kernel.core.plan import Undo
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime import logs
from mesocosm.kernel.runtime.admission import known
from mesocosm.kernel.runtime.undoing import Entry, Remainder, undo_at_once, undo_entries
from mesocosm.kernel.runtime.world import World

KEPT = 256  # dead groups whose logs and records stay for `logs`, `wait` and `explain`; beyond it the oldest go

_AT_ONCE = 8  # containers removed before others get a turn


async def remove(world: World, container_id: str, *, replaced: bool = False) -> None:
    """Forgets a dead container and all below it; ConflictError, and no change, while one of them lives.

    What cannot be removed is parked: it stays in the ledger, is retried, and is in nobody's way. Of one that is `replaced` by
    another of its name, the output that was put aside stays.
    """
    if (rest := begin(world, container_id, replaced=replaced)) is not None:
        await rest


def begin(world: World, container_id: str, *, replaced: bool = False) -> Coroutine[Any, Any, None] | None:
    """As `remove`, and done when this returns None: the usual case. Else it has begun, nobody else may remove it meanwhile,
    and what is answered is the rest of it: to be awaited, whatever becomes of who asked."""
    ids = _removable(world, container_id)
    note = None if replaced else logs.forget_former(world.host, container_id)
    parked = [] if note is None else [(found, Remainder(_former(world, found), note)) for found in ids]
    for at, found in enumerate(ids):
        if at == _AT_ONCE or not undo_at_once(world.machine, world.cells[found].entries):
            world.removing.update(ids)
            return _go_on(world, ids, at, parked)
    _forget(world, ids, parked)
    return None


def _former(world: World, container_id: str) -> Entry:
    return Entry(0, "log", (Undo("remove_tree", logs.former_dir(world.host, container_id)),), False)  # noqa: FBT003 - a tuple


async def _go_on(world: World, ids: Sequence[str], at: int, parked: list[tuple[str, Remainder]]) -> None:
    try:
        for found in ids[at:]:
            for left in await undo_entries(world.machine, world.cells[found].entries):
                parked.append((found, left))
            await trio.lowlevel.checkpoint()
        _forget(world, ids, parked)
    finally:
        world.removing.difference_update(ids)


def _removable(world: World, container_id: str) -> list[str]:
    if container_id not in world.cells:
        left = [row.note for row in world.ledger.parked() if row.container == container_id]
        if left:
            hint = "it is tried again by itself, and gone from meso ps when that has worked"
            raise ConflictError(f"what is left of {container_id} cannot be removed yet", id=container_id, have=left[0], hint=hint)
    known(world.cells, container_id)
    ids = list(world.tree.up(container_id))
    for found in ids:
        state = world.tree.state(found)
        if state is not State.DEAD:
            is_ending = state in (State.STOPPING, State.DESTROYING)
            hint = f"meso wait {found} returns when it has ended" if is_ending else f"meso kill {found} ends it"
            raise ConflictError(f"{found} is {state}", id=found, have=state.value, need="DEAD", hint=hint)
    if world.removing.intersection(ids):
        raise ConflictError(f"{container_id} is being removed already", id=container_id)
    return ids


def _forget(world: World, ids: Sequence[str], parked: Sequence[tuple[str, Remainder]]) -> None:
    emptied = []
    for found in ids:
        cell = world.cells[found]
        group = cell.group
        if world.history is not None:
            world.history.keep(found, cell.plan_key, cell.spec, cell.plan)
        group.members.remove(found)
        if not group.members:
            emptied.append(group.id)
            world.groups.pop(group.id, None)
        world.tree.detach(found)
        del world.cells[found]
    with world.ledger as ledger:
        for found, left in parked:
            ledger.park(found, *left)
            world.journal.add(found, "parked", {"index": left.entry.position, "note": left.note})
        ledger.remove(ids, emptied)
    if parked:
        world.parked.set()


async def prune(world: World, kept: int = KEPT) -> None:
    """Forgets the groups that have been dead longest, until no more than `kept` are left. One at a time, in the background."""
    if world.pruning:
        return
    world.pruning = True
    try:
        dead = [group for group in world.groups.values() if group.over.is_set() and "+" not in group.id and group.id in world.tree]
        for group in dead[: max(0, len(dead) - kept)]:
            try:
                await remove(world, group.id)
            except MesoError:
                continue  # being removed by somebody else, or launched anew: not ours any more
            await trio.lowlevel.checkpoint()
    finally:
        world.pruning = False
