"""From the ledger and the launcher's inventory to the same tree of nurseries: an agent's first seconds.

What lives here: the comparison of two lists, and what each difference means. Theory: the ledger says what was decided,
the launcher what is there; where they differ, the decision is carried to its end in the only direction it can go.

    ledger                      launcher             what happens
    intended, not committed     anything             aborted, undone in reverse, ROLLED_BACK
    committed                   staged               released: a decision that was written down rolls forward
    committed                   running              adopted, with a new pidfd
    committed                   ended                its exit is delivered as if just now
    committed                   not there, living    its launcher was killed: given to this one, which watches it from now on
    committed                   not there, gone      its exit from what a keeper wrote down, else `unknown`, and why; undone
    dead                        ended                acknowledged
    not there                   living               adopted with an empty plan: shown, can be killed and waited for
    not there                   ended                the same if the ledger has lost something; else it has been removed
    another boot                (gone)               closed as `rebooted`, undone

Everything is idempotent: an agent that dies in the middle of its recovery is followed by one that begins again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import trio

from mesocosm.kernel.core.errors import LaunchError, MesoError
from mesocosm.kernel.core.names import depth_of
from mesocosm.kernel.core.states import ENDED, State
from mesocosm.kernel.launcher.contract import Launched, Orphan
from mesocosm.kernel.runtime import codec, notes, parking, unexecuted
from mesocosm.kernel.runtime.adopting import STRANGERS, adopt_stranger, plan_of
from mesocosm.kernel.runtime.endings import LEAVING, LEFT, NEVER_OPENED, end_body, rolled_back_wait
from mesocosm.kernel.runtime.ledger import HOST, ContainerRow
from mesocosm.kernel.runtime.proof import is_proven
from mesocosm.kernel.runtime.undo import Attempt
from mesocosm.kernel.runtime.undoing import Entry, entries_of, undo_entries
from mesocosm.kernel.runtime.world import Cell, Group, World


async def recover(world: World) -> list[Cell]:
    """Fills the world from the ledger and the launcher; the cells that run, parents first, ready for `supervisor.start`."""
    inventory = {line.container_id: line for line in await world.launcher.inventory()}
    is_new = world.ledger.meta("boot_id") is None
    same_boot = _same_boot(world) or bool(inventory)  # who says so here has not been through a reboot
    ownerless = _read(world, inventory)
    is_doubtful = is_new or bool(world.ledger.set_aside)
    await _roll_back_unfinished(world, inventory)
    if same_boot:
        await _release_committed(world, inventory)
        for line in sorted(inventory.values(), key=lambda found: depth_of(found.container_id)):
            if line.container_id in world.cells:
                continue
            if line.ended is None or is_doubtful:
                adopt_stranger(world, line, ownerless)
    living = [cell for cell in world.cells.values() if world.tree.state(cell.id) is not State.DEAD]
    orphans: list[Orphan] = []
    for cell in living:
        known = inventory.get(cell.id) if same_boot else None
        if known is None and same_boot and cell.wait is None:
            await _find(world, cell, orphans)
        else:
            _compare(world, cell, known, rebooted=not same_boot)
    if orphans:
        await _quietly(world.launcher.adopt(orphans))  # if it dies of that, whoever hears of its death goes on with them
    for line in inventory.values():
        # One that is not known, and no doubt about that: its end was written down and has been forgotten. Nobody is told twice.
        is_known = line.container_id in world.tree
        if line.ended is not None and (not is_known or world.tree.state(line.container_id) is State.DEAD):
            world.acknowledge_soon(line.container_id)
    await _undo_orphans(world, ownerless)
    if not living:
        world.machine.forget_ends()
    world.count(len(living))
    parking.take_over(world)
    world.ledger.flush()
    return living


def _same_boot(world: World) -> bool:
    before, now = world.ledger.meta("boot_id"), world.host.boot_id
    with world.ledger as ledger:
        ledger.set_meta("boot_id", now)
        ledger.set_meta("run_id", world.host.run_id)
    return before is None or before == now


def _read(world: World, inventory: Mapping[str, Launched]) -> dict[str, list[Entry]]:
    """Groups and cells as the ledger has them; a row that cannot be read is set aside, and so is one that is older than what
    the launcher has of that name. The entries that are nobody's then."""
    released = {line.barrier for line in inventory.values() if line.phase == "running"}
    for group_id, barrier, executor, state, blame, error in world.ledger.groups():
        try:
            group = Group(group_id, barrier, executor, state=State(state), blame=blame, error=_error(world, error, group_id))
        except ValueError as problem:  # its containers go on, in a group that nobody decides for
            world.ledger.note_set_aside(f"group {group_id}: {problem}")
            continue
        if group.state is State.COMMITTED or (group.state not in ENDED and barrier in released):
            group.state = State.RUNNING  # whoever runs has been released, and that is never done before the decision is written
        if group.state in ENDED:
            group.over.set()
        world.groups[group_id] = group
    entries = _entries(world)
    rows = sorted(world.ledger.containers(), key=lambda row: depth_of(row.id))
    for row in rows:
        try:
            cell = _cell(world, world.ledger.opened(row), entries.get(row.id), inventory.get(row.id))
            state = _state(row, cell.group)
            world.tree.adopt(row.id, state)
            if state is not State.DEAD and cell.base is not None:
                world.ids.occupy(cell.base)
        except (ValueError, TypeError, MesoError) as problem:
            world.ledger.set_row_aside(row, problem)
            continue
        world.cells[row.id] = cell
        entries.pop(row.id, None)
        cell.group.members.append(row.id)
        if world.tree.state(row.id) is State.DEAD:
            cell.gone.set()
            cell.dead.set()
        else:
            cell.group.living += 1
    return entries


def _entries(world: World) -> dict[str, list[Entry]]:
    """By container, those of the whole agent aside."""
    found: dict[str, list[Entry]] = {}
    for container_id, blob in world.ledger.entries().items():
        if container_id == HOST:
            continue
        try:
            found[container_id] = codec.unpack_entries(blob)
        except (ValueError, TypeError, msgpack.UnpackException) as problem:
            world.ledger.note_set_aside(f"entries of {container_id}: {problem}", blob)
    return found


async def _undo_orphans(world: World, ownerless: dict[str, list[Entry]]) -> None:
    """Entries whose container nobody knows any more: its row was set aside, and it is not running."""
    for container_id, entries in ownerless.items():
        if not _is_deserted(world, entries):
            world.ledger.note_set_aside(f"{container_id}: its record was lost, and somebody lives in what was made for it")
            continue
        parked = [(container_id, *left) for left in await undo_entries(world.machine, entries)]
        with world.ledger as ledger:
            ledger.undone([container_id], parked)
            world.journal.add(container_id, "undone", {"entries": len(entries) - len(parked)})


def _is_deserted(world: World, entries: list[Entry]) -> bool:
    """Whether nobody lives where these entries lead: a cgroup in which somebody does cannot be removed."""
    for entry in reversed(entries):
        for verb, target in entry.undo:
            try:
                if verb == "rmdir_cgroup" and world.machine.undo(verb, target) is Attempt.BUSY:
                    return False
            except OSError:
                continue  # it says why when it is undone
    return True


def _state(row: ContainerRow, group: Group) -> State:
    if row.state == State.DEAD.value:
        return State.DEAD
    if row.state not in State.__members__ and row.wait is not None and row.ended is not None:
        return State.DEAD  # a damaged word beside its end
    return State.PREPARING if row.state == State.PREPARING.value and group.state is not State.RUNNING else State.RUNNING


def _cell(world: World, row: ContainerRow, entries: list[Entry] | None, line: Launched | None) -> Cell:
    spec = codec.unpack_spec(row.spec)
    if spec.id != row.id:
        raise ValueError(f"its spec is that of {spec.id!r}")
    note = None if line is None else notes.read(row.id, line.note)
    group = world.groups.get(row.group)
    if line is not None and group is not None and group.barrier != line.barrier and line.ended is None:
        raise ValueError(f"it is of an earlier launch: the one that runs stood at the barrier {line.barrier}")
    if group is None:
        barrier, executor = (line.barrier, note.executor) if line and note and note.group == row.group else (row.group, STRANGERS)
        group = world.groups[row.group] = Group(row.group, barrier, executor, state=State.RUNNING)
    plan = plan_of(world, row.plan, spec)
    is_dead = _state(row, group) is State.DEAD
    wait = codec.unpack_wait(row.wait) if row.wait else None
    if entries is None and note is not None:
        entries = note.entries
    if is_dead and wait is not None and wait.reason == "rolled_back":
        entries = []  # nothing was kept of it
    cell = Cell(
        spec,
        plan,
        group,
        row.plan,
        row.base,
        # The plan says what was meant to be made, too, should the entries be unreadable.
        entries=[each for each in (entries_of(plan) if entries is None else entries) if each.keep or not is_dead],
        pid=row.pid,
        birth=row.birth or "",
        started=row.started,
        ended_at=row.ended,
        reason=row.reason,
    )
    parent = world.cells.get(spec.parent or "")
    cell.grants = world.ids.grants(row.base, parent.grants if parent else None)
    cell.wait = wait
    cell.error = _error(world, row.error, row.id)
    return cell


def _error(world: World, blob: bytes | None, whose: str) -> dict[str, Any] | None:
    if blob is None:
        return None
    try:
        found = codec.unpack(blob)
    except (ValueError, TypeError, msgpack.UnpackException) as problem:
        world.ledger.note_set_aside(f"the error of {whose}: {problem}", blob)
        return None
    return found if isinstance(found, dict) else None


async def _roll_back_unfinished(world: World, inventory: dict[str, Launched]) -> None:
    """Launches that were never committed: none of their programs ran, and nothing of them stays. Nor is more undone than is
    proven theirs: what somebody else has in their places stays."""
    for group in [found for found in world.groups.values() if found.state not in (*ENDED, State.RUNNING)]:
        await _quietly(world.launcher.abort(group.barrier))
        cells = [world.cells[member] for member in group.members]
        error = LaunchError("the agent ended during the launch", id=group.event_id, hint="launch it again").as_object()
        entries = [(cell.id, entry) for cell in cells for entry in cell.entries if is_proven(world, cell.id, entry)]
        parked = []
        for container_id, entry in reversed(entries):
            for left in await undo_entries(world.machine, [entry]):
                parked.append((container_id, *left))
        now = world.machine.time()
        with world.ledger as ledger:
            ledger.undone(group.members, parked)
            for cell in reversed(cells):
                line = inventory.pop(cell.id, None)
                if line is not None and line.pidfd is not None:
                    world.machine.close(line.pidfd)
                if line is not None:
                    world.acknowledge_soon(cell.id)
                cell.wait, cell.ended_at = rolled_back_wait(cell.id, error), now
                cell.entries.clear()
                world.tree.tell(cell.id, "kill")
                world.tree.tell(cell.id, "undone")
                world.ids.give_back(cell.base)
                world.journal.add(cell.id, "undone", {"entries": sum(1 for found in entries if found[0] == cell.id)})
                ledger.dead(cell.id, now, codec.pack_struct(cell.wait), None)
                cell.gone.set()
                cell.dead.set()
            group.state, group.error, group.living = State.ROLLED_BACK, error, 0
            ledger.end_group(group.id, State.ROLLED_BACK, None, codec.pack(error))
            world.journal.add(group.event_id, "rolled_back", {**group.event_body, "error": error})
            world.journal.add(group.event_id, "end", end_body(world, group))
            group.over.set()


async def _release_committed(world: World, inventory: dict[str, Launched]) -> None:
    waiting = {line.barrier for line in inventory.values() if line.phase == "staged"}
    for group in world.groups.values():
        if group.barrier in waiting and group.state is State.RUNNING:
            await _quietly(world.launcher.release(group.barrier))
            waiting.discard(group.barrier)
    for barrier in waiting:  # staged for nobody that the ledger knows: never decided
        await _quietly(world.launcher.abort(barrier))
        for container_id in [
            line.container_id for line in inventory.values() if line.barrier == barrier and line.phase == "staged"
        ]:
            line = inventory.pop(container_id)
            if line.pidfd is not None:
                world.machine.close(line.pidfd)


async def _find(world: World, cell: Cell, orphans: list[Orphan]) -> None:
    """One that the launcher does not know: its own was killed. The process may be there, or somebody may have seen it end.

    Its pid alone proves nothing: nobody is signalled, or watched, who is not who the ledger means.
    """
    pid, group = cell.pid or 0, cell.group
    if group.id not in world.unsure and not world.ledger.is_begun(group.members):
        world.unsure[group.id] = trio.current_time() + LEAVING
    cell.pidfd = world.machine.reopen(pid, cell.birth)
    if cell.pidfd is not None:
        orphans.append(Orphan(cell.id, pid, cell.pidfd, cell.birth, cell.group.barrier))
        return
    cell.status = await world.machine.how_it_ended(cell.id, None, pid, cell.birth)
    if cell.status.status == LEFT and group.id in world.unsure:  # it was not its program that exited
        group.error = group.error or LaunchError(NEVER_OPENED, id=group.event_id).as_object()
        cell.reason, cell.error = cell.reason or "group", group.error
    cell.gone.set()


def _compare(world: World, cell: Cell, line: Launched | None, *, rebooted: bool) -> None:
    """One container that the ledger thinks alive, and what the launcher says about it."""
    if line is not None:
        unexecuted.find(world, cell, line)  # what follows from it for the group is the supervisor's
    if line is not None and line.ended is None and line.phase != "ended":
        cell.pid, cell.pidfd = line.pid, line.pidfd
        if not cell.birth and line.pidfd is not None:
            cell.birth = world.machine.identity(line.pidfd, line.pid)
            world.ledger.born(cell.id, line.pid, cell.birth)
        return
    if line is not None and line.pidfd is not None:
        world.machine.close(line.pidfd)
    if line is not None:
        cell.status = line.ended
    elif cell.wait is None and rebooted:
        cell.reason = "rebooted"
    cell.gone.set()


async def _quietly(call: Any) -> None:
    """A request to the launcher that may find nothing to do."""
    try:
        with trio.move_on_after(10):
            await call
    except MesoError:
        return
