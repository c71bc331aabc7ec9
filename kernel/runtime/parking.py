"""What could not be undone: parked, shown with whoever holds it, tried again ever more slowly, and in nobody's way.

What lives here: the retries, and what is in the way of a new container, or may not be given to it (user ids). What must not:
undoing itself (`undoing`), and who is asked for holders (`holders`). Theory: each remainder has a rhythm of its own, so that
what was parked an hour ago does not make a new one wait, and one that takes long holds up nobody else's. What is written down
is why it is still there, and that again only when it has changed: an hour of retries is no line in the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgpack
import trio

from mesocosm.kernel.core import supervision
from mesocosm.kernel.core.plan import ContainerPlan
from mesocosm.kernel.linux.holding import is_at_or_below
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.ledger import HOST, ParkedRow
from mesocosm.kernel.runtime.undoing import Entry, undo_at_once, undo_one
from mesocosm.kernel.runtime.world import Cell, World

_LOOK = 1.0  # seconds


def in_the_way(world: World, plans: Iterable[ContainerPlan]) -> ParkedRow | None:
    """A remainder of the same thing that one of these containers would make; of the same id alone it is in nobody's way."""
    if not world.parked.is_set():
        return None
    made = {target for plan in plans for effect in plan.effects for _, target in effect.undo}
    for row in world.ledger.parked():
        if row.container != HOST and any(
            is_at_or_below(target, ours) or is_at_or_below(ours, target)
            for entry in _entries(row)
            for _, target in entry.undo
            for ours in made
        ):
            return row
    return None


def hold_ids(world: World, cell: Cell, left: Iterable[Entry]) -> None:
    """Of a dead container: while somebody may live in a control group of its, nobody else gets the user ids that he has."""
    owner: Cell | None = cell
    while owner is not None and owner.base is None:
        owner = world.cells.get(owner.spec.parent or "")
    if owner is not None and owner.base is not None and any(verb == "kill_cgroup" for entry in left for verb, _ in entry.undo):
        world.ids.hold(cell.id, owner.base)


def take_over(world: World) -> None:
    """What earlier agents could not undo is still there, and so are the user ids in it."""
    in_use = {cell.base for cell in world.cells.values() if not cell.dead.is_set()}
    for row in world.ledger.parked():
        world.parked.set()
        if (cell := world.cells.get(row.container)) is not None:
            hold_ids(world, cell, _entries(row))
    for base in world.ids.held - in_use:
        world.ids.occupy(base)
        world.ids.give_back(base)


def _may_have_ids(world: World, container_id: str) -> bool:
    found = (_entries(row) for row in world.ledger.parked() if row.container == container_id)
    return any(verb == "kill_cgroup" for entries in found for entry in entries for verb, _ in entry.undo)


def _entries(row: ParkedRow) -> list[Entry]:
    try:
        return codec.unpack_entries(row.entry)
    except (ValueError, TypeError, msgpack.UnpackException):
        return []  # shown, and there until somebody looks into it


async def keep_retrying(world: World) -> None:
    """Retries what is parked until nothing is. What an earlier agent left is tried at once. Runs as long as the agent."""
    inherited = True
    while True:
        await world.parked.wait()
        retries = _Retries(world)
        async with trio.open_nursery() as nursery:
            while world.ledger.trouble is not None or world.ledger.parked():
                if world.ledger.trouble is None:  # else what is parked, and what is not any more, has not been written yet
                    retries.begin(nursery, at_once=inherited)
                    inherited = False
                await trio.sleep(_LOOK)
        if not world.ledger.parked():  # while the last retry was on its way, another may have come
            world.parked = trio.Event()


async def retry_now(world: World) -> None:
    """Every remainder once, whatever its rhythm; returns when all have been tried."""
    if world.parked.is_set() and world.ledger.trouble is None:
        async with trio.open_nursery() as nursery:
            _Retries(world).begin(nursery, at_once=True)


class _Retries:
    """Which remainder is tried when; those of one container one after the other, the last made first."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._due: dict[int, tuple[int, float]] = {}  # row → (number of the next try, when)
        self._busy: set[str] = set()

    def begin(self, nursery: trio.Nursery, *, at_once: bool) -> None:
        """Starts the retries that are due; a row that is new has its first a second from now, unless `at_once`."""
        now = trio.current_time()
        ready: dict[str, list[ParkedRow]] = {}
        for row in reversed(self._world.ledger.parked()):
            _, when = self._due.setdefault(row.seq, (1, now if at_once else now + supervision.retry_delay(1)))
            if when <= now and row.container not in self._busy:
                ready.setdefault(row.container, []).append(row)
        for container_id, rows in ready.items():
            self._busy.add(container_id)
            nursery.start_soon(self._retry, container_id, rows)

    async def _retry(self, container_id: str, rows: Sequence[ParkedRow]) -> None:
        world = self._world
        try:
            for row in rows:
                note = self._host(row) if container_id == HOST else await self._one(row)
                number, _ = self._due.pop(row.seq)
                if note is not None:
                    number += 1
                    self._due[row.seq] = (number, trio.current_time() + supervision.retry_delay(number))
                if note == row.note or row.seq not in {found.seq for found in world.ledger.parked()}:
                    continue  # nothing new; or somebody else has undone it meanwhile, and told of it
                with world.ledger as ledger:
                    if note is None:
                        ledger.drop_parked([row.seq])
                        world.journal.add(container_id, "undone", {"entries": 1, "parked": True})
                    else:
                        ledger.park_again(row.seq, note)
                if note is None and not _may_have_ids(world, container_id):
                    world.ids.let_go(container_id)
        finally:
            self._busy.discard(container_id)

    async def _one(self, row: ParkedRow) -> str | None:
        notes: list[str] = []
        entries = _entries(row)
        if not entries or any(self._is_in_use(row.container, entry) for entry in entries):
            return row.note
        for entry in entries:
            if (note := await undo_one(self._world.machine, entry.undo)) is not None:
                notes.append(note)
        return "; ".join(notes) or None

    def _host(self, row: ParkedRow) -> str | None:
        # What all share: never below somebody who lives, and in one step, since somebody may come meanwhile.
        entries = _entries(row)
        return None if entries and not self._world.living and undo_at_once(self._world.machine, entries) else row.note

    def _is_in_use(self, container_id: str, entry: Entry) -> bool:
        """Whether a container of that id lives again and may have the same thing: one without a plan may have anything."""
        cell = self._world.cells.get(container_id)
        if cell is None or cell.dead.is_set():
            return False
        made = {target for effect in cell.plan.effects for _, target in effect.undo}
        return not made or any(target in made for _, target in entry.undo)
