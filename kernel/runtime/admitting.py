"""Admission: from plans to PLANNED containers in the tree, with their grants. The last place where refusing is free.

What lives here: making room for names, ranges of ids, the group's record. What must not: anything that makes something
on the machine. `admission` comes before (documents to plans), `launch` after (the transaction).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import trio

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec
from mesocosm.kernel.core.errors import ConflictError, DyingError, MesoError
from mesocosm.kernel.core.spec import EXECUTOR
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime import admission, logs, parking, removal
from mesocosm.kernel.runtime.launch import Launch
from mesocosm.kernel.runtime.world import Cell, Group, World

_ACKNOWLEDGE_DEADLINE = 10.0  # seconds; nobody waits for an answer, so only a launcher that reads nothing any more takes as long
_SLACK = 32  # dead groups are removed in batches of so many


def admit(
    world: World,
    group_id: str,
    executor: str,
    specs: Sequence[ContainerSpec],
    plans: Sequence[ContainerPlan],
    packed: Sequence[bytes],
) -> Launch:
    """A launch that is ready to run, for which `make_room` has just been called. Whatever fails here leaves nothing. `group_id`
    PARENT+ gets the next number.

    `packed`: the plans as the ledger will have them.
    """
    if group_id.endswith("+"):  # not before: another one may have come while room was made
        group_id += str(1 + max((int(found[len(group_id) :]) for found in world.groups if found.startswith(group_id)), default=0))
    world.barriers += 1
    group = Group(group_id, f"{world.ledger.seq}-{world.barriers}", executor)
    cells: list[Cell] = []
    try:
        for spec, plan in zip(specs, plans, strict=True):
            world.tree.adopt(spec.id)
            cell = Cell(spec, plan, group)
            cells.append(cell)
            if world.ids.needs_range(spec):
                cell.base = world.ids.take(spec.id)
            parent = world.cells.get(spec.parent or "")
            cell.grants = world.ids.grants(cell.base, parent.grants if parent else None)
            world.cells[spec.id] = cell
            group.members.append(spec.id)
    except MesoError:
        for cell in reversed(cells):
            world.ids.give_back(cell.base)
            world.cells.pop(cell.id, None)
            world.tree.detach(cell.id)
        raise
    group.living = len(cells)
    world.groups[group_id] = group
    world.count(len(cells))
    group.launch = Launch(world, group, cells, packed)
    world.launching.begin(group.launch)
    if len(world.groups) > removal.KEPT + _SLACK and world.nursery is not None:
        world.nursery.start_soon(removal.prune, world)
    return group.launch


def parent(world: World, container_id: str) -> Cell:
    """The container that something is to start in; ConflictError unless it runs."""
    found: Cell = admission.known(world.cells, container_id)
    state = world.tree.state(container_id)
    if state is not State.RUNNING:
        kind = DyingError if state in (State.STOPPING, State.DESTROYING, State.DEAD) else ConflictError
        raise kind(f"{container_id} is {state}: nothing can start in it", id=container_id, have=state.value, need="RUNNING")
    return found


def executor_inside(world: World, around: Cell) -> str:
    """Who decides about a group that starts in a container: who does about that one's own, unless it is the only one of that."""
    own = around.group
    is_fit = own.members != [own.id] and own.executor in world.executors
    return own.executor if is_fit or EXECUTOR not in world.executors else EXECUTOR


async def make_room(world: World, ids: Sequence[str], plans: Sequence[ContainerPlan]) -> None:
    """Removes dead containers of the same names; ConflictError if one lives, or something of it cannot be undone."""
    for container_id in ids:
        if container_id in world.tree and (state := world.tree.state(container_id)) is not State.DEAD:
            hint = f"another name, or meso kill {container_id}"
            raise ConflictError(f"there is already a container {container_id}", id=container_id, have=state.value, hint=hint)
    _refuse_remainders(world, ids, plans)
    for container_id in ids:
        if container_id in world.tree:
            await _replace(world, container_id)
    _refuse_remainders(world, ids, plans)  # what was removed just now may have left something
    if not set(ids).isdisjoint(world.unacknowledged):
        await acknowledge(world)


async def _replace(world: World, container_id: str) -> None:
    for found in world.tree.up(container_id):
        with suppress(OSError):  # without it there is less to look at, and nothing else
            for path in logs.keep_former(world.host, found):
                world.budgets.watch_file(path)
    await removal.remove(world, container_id, replaced=True)


def _refuse_remainders(world: World, ids: Sequence[str], plans: Sequence[ContainerPlan]) -> None:
    for container_id in ids:
        if container_id in world.strays:
            plugin = world.strays[container_id][0]
            message = f"the plug-in {plugin} is still busy with an earlier {container_id}"
            raise ConflictError(message, id=container_id, plugin=plugin, hint="another name works at once")
    if (row := parking.in_the_way(world, plans)) is not None:
        hint = "it is retried; another name works at once"
        raise ConflictError(f"something of an earlier {row.container} is still there", id=row.container, have=row.note, hint=hint)


async def acknowledge(world: World) -> None:
    """Tells the launcher which exits are in the ledger, so that it forgets them."""
    if world.unacknowledged and not world.launcher_gone and world.ledger.trouble is None:
        ids, world.unacknowledged = world.unacknowledged, []
        is_told = False
        try:
            with suppress(MesoError), trio.move_on_after(_ACKNOWLEDGE_DEADLINE):
                await world.launcher.acknowledge(ids)
                is_told = True
        finally:
            if not is_told:
                world.unacknowledged[:0] = ids  # an id whose record is kept cannot be used again
