"""What is proven to be ours while a launch is on its way: nothing else is undone, by this agent or by the one after it.

What lives here: which entries stand in the ledger before an effect is made, which only after it. What must not: making and undoing.

Theory. An effect may meet a thing of somebody else's in its place, and refuses then (ConflictError). An agent that is killed
before leaves nothing but the intent, and whoever comes after it finds the thing and cannot tell whose it is. So the places are
looked at before the intent is written. Where there is nothing, what is found later is ours: such an entry is written before
the effect, and taken back if the effect meets somebody all the same. Where there is something, it is not ours: such an entry
is written when the effect has been done, and has thereby taken over what was there. Either way the ledger names, at any
instant, only what may be undone. A look costs a microsecond or two; writing again is for those who meet something.

Who comes between the look and the effect, and is not met because the agent is killed before, is told apart by the kind alone:
one that marks what it makes has `owns`, and recovery asks it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.core.plan import Undo
from mesocosm.kernel.runtime import codec, patience
from mesocosm.kernel.runtime.ledger import HOST
from mesocosm.kernel.runtime.undoing import Entry
from mesocosm.kernel.runtime.world import Cell, World

log = logging.getLogger("mesocosm.proof")


class Proof:
    """The effects of one launch."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._begun: set[tuple[str, int]] = set()
        self._foreign: dict[str, set[int]] = {}  # by container: effects in whose places something is that they did not make

    def intend(self, cell: Cell) -> bytes:
        """The entries of a container that may be written down before any of its effects is made, packed."""
        foreign = {entry.position for entry in cell.entries if is_taken(self._world, entry)}
        if foreign:
            self._foreign[cell.id] = foreign
        return self._packed(cell)

    def begin(self, cell: Cell, index: int) -> None:
        """This effect is about to be made."""
        self._begun.add((cell.id, index))

    def done(self, cell: Cell, index: int) -> None:
        """It has been made; what was in its place is ours from now on."""
        foreign = self._foreign.get(cell.id)
        if foreign and index in foreign:
            foreign.discard(index)
            self._write(cell)

    def refused(self, cell: Cell, index: int) -> None:
        """It has met somebody else's thing, which stays as it is."""
        foreign = self._foreign.setdefault(cell.id, set())
        if index not in foreign:
            foreign.add(index)
            self._write(cell)

    def is_ours(self, container_id: str, index: int) -> bool:
        """Whether this effect may have made something, and nobody else can have."""
        return (container_id, index) in self._begun and index not in self._foreign.get(container_id, ())

    def _write(self, cell: Cell) -> None:
        self._world.ledger.entries_are(cell.id, self._packed(cell))

    def _packed(self, cell: Cell) -> bytes:
        foreign = self._foreign.get(cell.id, ())
        return codec.pack_entries([entry for entry in cell.entries if entry.position not in foreign])


class HostProof:
    """The same for what all containers share. `recorded` has been proven before, by this agent or by an earlier one."""

    def __init__(self, world: World, recorded: Iterable[Entry], wanted: Iterable[Entry]) -> None:
        self._world = world
        self._proven = list(recorded)
        known = {(entry.kind, entry.undo) for entry in self._proven}
        self._pending: dict[int, Entry] = {}
        for entry in wanted:
            if (entry.kind, entry.undo) in known:
                continue
            if is_taken(world, entry):
                self._pending[entry.position] = entry
            else:
                self._proven.append(entry)

    def packed(self) -> bytes:
        """All that is proven."""
        return codec.pack_entries(self._proven)

    def done(self, index: int) -> None:
        """As `Proof.done`."""
        if (entry := self._pending.pop(index, None)) is not None:
            self._proven.append(entry)
            self._world.ledger.entries_are(HOST, self.packed())

    def refused(self, kind: str, undo: tuple[Undo, ...]) -> None:
        """As `Proof.refused`; what an earlier agent made in that place is there no more, then."""
        self._proven = [found for found in self._proven if (found.kind, found.undo) != (kind, undo)]
        self._world.ledger.entries_are(HOST, self.packed())


def is_proven(world: World, container_id: str, entry: Entry) -> bool:
    """Whether what may be undone of a launch that an earlier agent did not finish is its own, as far as its kind can tell."""
    owns = getattr(world.kinds.get(entry.kind), "owns", None)
    if owns is None:
        return True
    waits = world.machine.may_wait  # and then cannot be asked
    targets = dict.fromkeys(target for verb, target in entry.undo if world.machine.is_there(verb, target))
    try:
        anothers = patience.ask(entry.kind, "owns", lambda: [found for found in targets if waits(found) or not owns(found)])
    except MesoError as error:
        log.warning("%s: whose %s is, cannot be told, so it stays: %s", container_id, ", ".join(targets), error)
        return False
    for target in anothers:
        log.warning("%s: %s is not proven to be ours, and stays", container_id, target)
    return not anothers


def is_taken(world: World, entry: Entry) -> bool:
    """Whether something is where this entry's undo would take something away."""
    return any(world.machine.is_there(verb, target) for verb, target in dict.fromkeys(entry.undo))
