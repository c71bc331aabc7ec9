"""One nursery per container: the first promise as the shape of the code.

What lives here: what happens when a container ends, and how it is made to. Theory: a container's supervisor is a task
with a nursery of its own, in which its children's supervisors run. The nursery's block is left when the last child is
DEAD; only after that line is the container itself undone. So no container can outlive its parent, as no task can
outlive its nursery. Leaving a nursery by cancellation (the agent ends) does nothing to a container: only
`request_stop` and the death of a parent do, and both are written into the ledger.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from contextlib import nullcontext

import trio

from mesocosm.kernel.contracts import GroupView, Kill
from mesocosm.kernel.core import states, supervision
from mesocosm.kernel.core.errors import LaunchError, MesoError
from mesocosm.kernel.core.names import parent_of
from mesocosm.kernel.core.states import State
from mesocosm.kernel.core.supervision import SIGKILL
from mesocosm.kernel.launcher.contract import Ended
from mesocosm.kernel.runtime import codec, parking, patience, stuck, unexecuted
from mesocosm.kernel.runtime.endings import LEFT, NEVER_OPENED, end_body, make_wait, wait_as_data
from mesocosm.kernel.runtime.ledger import encode_error
from mesocosm.kernel.runtime.undoing import Entry, Remainder, undo_at_once, undo_entries
from mesocosm.kernel.runtime.world import Cell, Group, World

_PARENT_PATIENCE = 10.0  # seconds for a parent that is dying to be dead
_AT_ONCE = 8  # members from which on a group is large
_HARD_PATIENCE = 2.0  # seconds for SIGKILL to work before every process of the cgroup is killed as well


def start(world: World, cells: Iterable[Cell]) -> None:
    """Starts the supervisors of containers that run now; those whose parent has none yet are started by it.

    A nested group that is still on its way up belongs to its launch, and gets its supervisors from there.
    """
    for cell in cells:
        parent = cell.spec.parent
        nursery = world.nursery if parent is None else world.cells[parent].nursery
        if nursery is not None and not cell.supervised and cell.group.state in (State.RUNNING, State.STOPPING):
            cell.supervised = True
            world.budgets.watch(cell)
            nursery.start_soon(_supervise, world, cell)


async def _supervise(world: World, cell: Cell) -> None:
    async with trio.open_nursery() as nursery:
        cell.nursery = nursery
        start(world, world.living_cells(world.tree.children(cell.id)))
        if cell.ending is not None:
            nursery.start_soon(_stop, world, cell)
        await cell.gone.wait()
        try:
            await _ask_parent(world, cell)
            await _ended(world, cell)
        except MesoError as error:  # never in the way of what follows
            traceback.print_exception(error)
    # Every child is dead here, and the nursery is closed: nothing new starts below.
    cell.nursery = None
    entries = [entry for entry in cell.entries if not entry.keep]
    # With a pod's own container hundreds end in the same turn. Only what waits for nothing is done one after the other.
    async with world.turns if len(cell.group.members) > _AT_ONCE else nullcontext():
        is_undone = undo_at_once(world.machine, entries)
    if not (is_undone or cell.exit_written):
        _record_exit(world, cell)
    left = [] if is_undone else await _undo(world, entries)
    _record_dead(world, cell, left)


def tell_ended(world: World, cell: Cell, ended: Ended) -> None:
    """Somebody says how a container's process has ended: its launcher, or who found out otherwise."""
    cell.status = ended
    cell.gone.set()
    group = cell.group
    if group.launch is not None:
        group.launch.member_ended(cell.id)
    if ended.status == LEFT and trio.current_time() < world.unsure.get(group.id, 0.0):
        never_started(world, group.id, NEVER_OPENED)
        cell.reason, cell.error = cell.reason or "group", cell.error or group.error  # it was not its program that exited


async def _ask_parent(world: World, cell: Cell) -> None:
    """When a container's init dies, the kernel kills what is nested in it, and that is reaped first: so a SIGKILL that
    nobody here has sent may be the death of the parent, or of one further up. Which of them began it, only their flags tell."""
    if not _may_be_of_its_parent(world, cell):
        return
    parent = world.cells[cell.spec.parent or ""]
    with trio.move_on_after(_PARENT_PATIENCE):
        await parent.gone.wait()
    cell.reason = cell.reason or "parent"


def _may_be_of_its_parent(world: World, cell: Cell) -> bool:
    if cell.reason is not None or cell.status is None or cell.status.status is None or cell.status.status & 0x7F != SIGKILL:
        return False
    parent = world.cells.get(cell.spec.parent or "")
    return parent is not None and _is_dying(world, parent)


def _is_dying(world: World, cell: Cell) -> bool:
    """Whether it or one above it is: what is further down hears of the end before it has begun to die of it itself."""
    if cell.gone.is_set() or cell.pidfd is None or cell.pid is None or world.machine.is_dying(cell.pidfd, cell.pid):
        return True
    above = world.cells.get(cell.spec.parent or "")
    return above is not None and _is_dying(world, above)


async def _ended(world: World, cell: Cell) -> None:
    """The process is gone: write it down, let the executor decide about the others, end the children."""
    is_written = cell.wait is not None  # by an earlier agent
    cell.wait = make_wait(world, cell)
    cell.ended_at = cell.status.time if cell.status is not None else world.machine.time()
    world.tree.tell(cell.id, "exited")
    if is_written:
        cell.exit_written = True
    elif cell.launches or world.living_cells(world.tree.children(cell.id)):
        _record_exit(world, cell)  # its children's end may take a while; its own exit must not be lost meanwhile
    react(world, cell.group, cell.id)
    for launch in tuple(cell.launches):
        launch.cancel(LaunchError(f"{cell.id}, its parent, has ended", id=cell.id))
        await launch.finished.wait()
    for child in world.living_cells(world.tree.children(cell.id)):
        if not child.gone.is_set():
            # With its parent's process its world has gone (nested namespaces die with the outer ones): no grace.
            child.reason = child.reason or "parent"
            _signal(world, child, SIGKILL)
            request_stop(world, child, child.reason, grace_ms=0)


def _record_exit(world: World, cell: Cell) -> None:
    """How it ended, and the line that tells it, in one transaction: whoever takes over tells it if and only if it has to."""
    assert cell.wait is not None
    assert cell.ended_at is not None
    with world.ledger as ledger:
        ledger.exited(cell.id, cell.ended_at, codec.pack_struct(cell.wait), encode_error(cell.error))
        world.journal.add(cell.id, "exited", {"wait": wait_as_data(cell.wait), "ended": cell.ended_at})
    cell.exit_written = True
    _acknowledge(world, cell)


async def _undo(world: World, entries: list[Entry]) -> list[Remainder]:
    return await undo_entries(world.machine, entries, deadline=trio.current_time() + states.DEADLINES[State.DESTROYING][0])


def _record_dead(world: World, cell: Cell, left: list[Remainder]) -> None:
    """One sentence for the ledger: dead, and nothing of it is left but what is named here."""
    assert cell.wait is not None
    assert cell.ended_at is not None
    group = cell.group
    world.tree.tell(cell.id, "undone")
    group.living -= 1
    over = group.living <= 0
    with world.ledger as ledger:
        if not cell.exit_written:
            world.journal.add(cell.id, "exited", {"wait": wait_as_data(cell.wait), "ended": cell.ended_at})
        for entry, note in left:
            ledger.park(cell.id, entry, note)
            world.journal.add(cell.id, "parked", {"index": entry.position, "note": note})
        undone = sum(1 for entry in cell.entries if not entry.keep) - len(left)
        world.journal.add(cell.id, "undone", {"entries": undone})
        ledger.dead(cell.id, cell.ended_at, codec.pack_struct(cell.wait), encode_error(cell.error))
        world.journal.add(cell.id, "dead", {"wait": wait_as_data(cell.wait), **({"error": cell.error} if cell.error else {})})
        if over:
            group.state = State.DEAD
            ledger.end_group(group.id, State.DEAD, group.blame, encode_error(group.error))
            world.journal.add(group.event_id, "end", end_body(world, group))
    cell.entries = [entry for entry in cell.entries if entry.keep]
    if left:
        parking.hold_ids(world, cell, [entry for entry, _ in left])
    world.ids.give_back(cell.base)
    if cell.pidfd is not None:
        world.machine.close(cell.pidfd)
        cell.pidfd = None
    _acknowledge(world, cell)
    world.count(-1)
    cell.dead.set()
    if over:
        group.over.set()
    if left:
        world.parked.set()


def _acknowledge(world: World, cell: Cell) -> None:
    world.unsure.pop(cell.group.id, None)
    if cell.status is not None:
        world.acknowledge_soon(cell.id)


# -- ending things ----------------------------------------------------------------------------------------------


def request_stop(world: World, cell: Cell, reason: str, *, grace_ms: int | None = None) -> None:
    """Begins to end a container and all below it, children first, each by its own policy. Asked again: never slower.

    `reason` goes into the WAITs of those that die of it. `grace_ms` overrides their own patience, downwards.
    """
    if cell.gone.is_set() and not world.tree.living_children(cell.id):
        _say_why(world, cell, reason)
        return
    now = trio.current_time()
    if cell.group.state is State.RUNNING and cell.id in roots(cell.group):
        cell.group.state = states.step(states.GROUP, State.RUNNING, "stop", cell.group.id)
    for container_id in world.tree.down(cell.id):
        found = world.cells[container_id]
        if found.gone.is_set() or world.tree.state(container_id) is State.DEAD:
            _say_why(world, found, reason)
            continue
        found.reason = found.reason or reason
        found.group.killed.add(container_id)
        if found.ending is not None:
            found.ending = supervision.hasten(found.ending, grace_ms, now)
            if found.patience is not None and grace_ms is not None:
                found.patience.deadline = min(found.patience.deadline, now + grace_ms / 1000)
            continue
        grace = found.spec.kill_grace if grace_ms is None else min(grace_ms, found.spec.kill_grace)
        found.ending = supervision.begin(found.spec.kill_signal, grace, now)
        if world.tree.state(container_id) in (State.RUNNING, State.STOPPING):
            world.tree.tell(container_id, "stop")
        for launch in tuple(found.launches):
            launch.cancel(LaunchError(f"{container_id} is being ended", id=container_id))
        if found.nursery is not None:
            found.nursery.start_soon(_stop, world, found)
        # else: its supervisor, which starts in this turn of the loop, sees `ending`


def _say_why(world: World, cell: Cell, reason: str) -> None:
    """Of one that was gone when this agent came: if it died as it would have by this decision, an earlier one had taken it."""
    told = cell.wait is not None or cell.reason is not None
    if world.taking_over and not told and cell.status is not None and cell.status.status is not None:
        cell.reason = reason if cell.status.status & 0x7F in (SIGKILL, cell.spec.kill_signal) else None


async def _stop(world: World, cell: Cell) -> None:
    """One stop: the children's end, then the signal, then SIGKILL, then every process of its cgroup."""
    for launch in tuple(cell.launches):
        await launch.finished.wait()
    for child in world.living_cells(world.tree.children(cell.id)):
        await child.dead.wait()
    if cell.gone.is_set():
        return
    ending = cell.ending
    assert ending is not None
    if ending.signal != SIGKILL:
        patience = ending.deadline - ending.asked  # counted from when it is its turn
        _signal(world, cell, ending.signal)
        with trio.move_on_after(patience) as cell.patience:
            await cell.gone.wait()
            return
    world.tree.tell(cell.id, "kill")
    _signal(world, cell, SIGKILL)
    with trio.move_on_after(_HARD_PATIENCE):
        await cell.gone.wait()
        return
    # Frozen, or somebody else holds its namespace: the kernel's own way of killing a cgroup reaches it.
    await stuck.insist(world, cell)


def _signal(world: World, cell: Cell, number: int) -> None:
    if cell.pidfd is None or cell.gone.is_set():
        return
    try:
        world.machine.signal(cell.pidfd, number)
    except ProcessLookupError:
        return


def send_signal(world: World, cell: Cell, number: int) -> None:
    """One signal to the container's first process and to nobody else."""
    if number == SIGKILL:
        cell.reason = cell.reason or "killed"
    _signal(world, cell, number)


def react(world: World, group: Group, ended: str) -> None:
    """Asks the group's executor what follows from an end, and does it."""
    if group.state not in (State.RUNNING, State.STOPPING):
        return
    executor = world.executors.get(group.executor)
    if executor is None:
        return
    cells = [world.cells[member] for member in group.members if member in world.cells]
    waits = {cell.id: cell.wait for cell in cells if cell.wait is not None}
    specs = [cell.spec for cell in cells]
    if group.event_id != group.id:
        # A nested group is shown below the container it lives in, as a pod's tasks are below the pod's container.
        specs.insert(0, world.cells[group.event_id].spec)
    view = GroupView(group.id, tuple(specs), waits, frozenset(group.killed))
    try:
        kills = patience.ask(group.executor, "react", lambda: [_checked(kill) for kill in executor.react(view, ended)])
    except MesoError as error:  # its opinion is missing; the group still ends when its members do
        traceback.print_exception(error)
        return
    for kill in kills:
        obey(world, group, kill)


def _checked(kill: Kill) -> Kill:
    words = (kill.id, kill.reason, kill.blame or "")
    if type(kill) is not Kill or not all(type(word) is str for word in words):
        raise TypeError(f"an executor answers Kills, made of text, not {type(kill).__name__}")
    return kill


def obey(world: World, group: Group, kill: Kill) -> None:
    """Carries out an executor's decision. An id that is no member stands for the whole group."""
    if kill.blame is not None and group.blame is None:
        group.blame = kill.blame
    targets = [kill.id] if kill.id in group.members else roots(group)
    for cell in world.living_cells(targets):
        request_stop(world, cell, kill.reason)


def kill(world: World, cell: Cell, reason: str = "killed", *, grace_ms: int | None = None) -> None:
    """A client's decision, or one about a whole group. Unlike an executor's, which is asked again, it would be forgotten
    with this agent: written down."""
    with world.ledger as ledger:
        ledger.stopping([found for found in world.tree.down(cell.id) if not world.cells[found].dead.is_set()], reason)
    request_stop(world, cell, reason, grace_ms=grace_ms)


def never_started(world: World, group_id: str, message: str = "its barrier did not open in time") -> None:
    """It has been decided that this group runs, and it never will: it ends."""
    group = world.groups.get(group_id)
    if group is None or group.over.is_set():
        return
    group.error = group.error or LaunchError(message, id=group.event_id).as_object()
    if group.launch is not None:
        group.launch.transaction.cancel()
    end_group(world, group, "group")


def end_group(world: World, group: Group, reason: str) -> None:
    """Ends every member."""
    for cell in world.living_cells(roots(group)):
        kill(world, cell, reason)


def resume(world: World) -> None:
    """After a restart: what had been decided about the living, or follows from ends that were written down, or that nobody saw."""
    world.taking_over = True
    for group in list(world.groups.values()):
        if group.state not in (State.RUNNING, State.STOPPING):
            continue
        ended = [world.cells[member] for member in group.members if world.cells[member].dead.is_set()]
        for cell in sorted(ended, key=lambda found: found.ended_at or 0.0):
            react(world, group, cell.id)
        # In the order in which they ended, so that who ended because of another is said to have.
        gone = [(cell.status.time, cell) for cell in world.living_cells(group.members) if cell.status and cell.gone.is_set()]
        for ended_at, cell in sorted(gone, key=lambda found: found[0]):
            if cell.wait is None and not _may_be_of_its_parent(world, cell):
                cell.wait, cell.ended_at = make_wait(world, cell), ended_at
                _record_exit(world, cell)
                react(world, group, cell.id)
        for cell in world.living_cells(group.members):
            if cell.reason is not None:
                request_stop(world, cell, cell.reason)
        if group.error is not None:  # a program of it could not be executed: its end had been decided, and perhaps not begun
            end_group(world, group, "group")
    world.taking_over = False


def roots(group: Group) -> list[str]:
    """The members whose parent is no member: the root container of a pod, every task of a nested group's first level."""
    members = set(group.members)
    return [found for found in group.members if parent_of(found) not in members]


def exec_failed(world: World, cell: Cell, error: dict[str, object]) -> None:
    """execve failed behind the barrier: the group did start, and ends with this error as its own."""
    unexecuted.blame(world, cell, error)
    end_group(world, cell.group, "group")
