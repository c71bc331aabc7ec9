"""What the ledger says must be there, by what it is called; and how the container stands that it belongs to.

What lives here: the ledger's side of an audit. What must not: looking at the machine (`sightings`), and verdicts (`audit`).

Theory: a claim is an entry of the ledger seen from the thing's side. It is *due* if the thing must be there: what a living
container was given, and what is kept of a dead one. Everything else that a plan names may be there only while somebody works
on it. Claims are collected in pieces, so they are older than the verdicts; how an owner stands is asked again for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.core.names import check_name, parent_of
from mesocosm.kernel.core.plan import Undo
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.ledger import HOST
from mesocosm.kernel.runtime.undoing import Entry, entries_of
from mesocosm.kernel.runtime.world import Cell, World

SHARED = "(shared)"  # how an answer calls what belongs to no container but to the agent; no id can look like that


class Standing(Enum):
    """How a container stands, as far as its things are concerned."""

    LIVING = "living"  # all that it was given must be there
    MOVING = "moving"  # being made or undone, or somebody is busy with it: nothing can be said
    DEAD = "dead"  # only what is kept must be there
    UNKNOWN = "unknown"  # the ledger has nothing of that name


class Claim(NamedTuple):
    """One thing that the ledger knows: whose, of which kind, how it is undone, whether it must be there, why it is parked."""

    container: str
    kind: str
    undo: tuple[Undo, ...]
    due: bool
    parked: str | None = None


@dataclass(slots=True)
class Claims:
    """All claims by their targets. `known` are the cells that were looked at: whoever came later is asked directly."""

    by_target: dict[str, Claim] = field(default_factory=dict)
    entries: list[tuple[str, Entry]] = field(default_factory=list)  # those that are due: (container, entry)
    known: set[int] = field(default_factory=set)
    tops: dict[str, set[str]] = field(default_factory=dict)  # kind → where all containers' things of that kind lie

    def collect(self, world: World) -> Iterator[None]:
        """Reads the world and the ledger's notes, a container at a time: what changes meanwhile is seen by `now`."""
        for row in world.ledger.parked():
            try:
                entries = codec.unpack_entries(row.entry)
            except (ValueError, TypeError):
                continue
            for entry in entries:
                self._add(row.container, entry, due=False, parked=row.note)
            yield
        for entry in recorded_host(world):
            self._add(HOST, entry, due=True)
            self.tops.setdefault(entry.kind, set()).update(target for _, target in entry.undo)
        for cell in list(world.cells.values()):
            self.known.add(id(cell))
            self.claim(world, cell)
            yield

    def claim(self, world: World, cell: Cell) -> None:
        """All that one container has, and what its plan speaks of besides."""
        has = {(entry.kind, entry.undo) for entry in cell.entries}
        for entry in cell.entries:
            self._add(cell.id, entry, due=True)
        if cell.wait is not None and cell.wait.reason == "rolled_back":
            return  # what its plan speaks of was undone or never made; what is there now may be what it was refused for
        for entry in entries_of(cell.plan):
            if (entry.kind, entry.undo) not in has:
                self._add(cell.id, entry, due=False)
        for effect in cell.plan.effects:  # what lies in a directory that has an entry has none of its own
            path = effect.args.get("path")
            if isinstance(path, str) and path not in self.by_target:
                self.by_target[path] = Claim(cell.id, effect.kind, (), due=False)

    def _add(self, container: str, entry: Entry, *, due: bool, parked: str | None = None) -> None:
        if due:
            self.entries.append((container, entry))
        for _, target in entry.undo:
            have = self.by_target.get(target)
            if have is None or (due and not have.due):  # who has it now goes before whoever had one of that name
                self.by_target[target] = Claim(container, entry.kind, entry.undo, due, parked)

    def now(self, world: World, target: str) -> Claim | None:
        """Whose a thing is at this moment, containers included that have come since."""
        for cell in reversed(world.cells.values()):  # the newest come last
            if id(cell) in self.known:
                break
            self.known.add(id(cell))
            self.claim(world, cell)
        return self.by_target.get(target)

    def covering(self, path: str) -> Claim | None:
        """The claim of the nearest directory around a path, itself included."""
        while len(path) > 1:
            if (claim := self.by_target.get(path)) is not None:
                return claim
            path = path.rpartition("/")[0]
        return None


def recorded_host(world: World) -> list[Entry]:
    """What containers share, as the ledger has it."""
    blob = world.ledger.entries_of(HOST)
    try:
        return codec.unpack_entries(blob) if blob else []
    except (ValueError, TypeError):
        return []


def standing(world: World, container_id: str) -> Standing:
    """How that container stands at this moment."""
    if container_id == HOST:
        return Standing.LIVING if world.living else Standing.MOVING  # made with the first launch, by whichever agent
    if container_id in world.strays or container_id in world.removing:
        return Standing.MOVING
    cell = world.cells.get(container_id)
    if cell is None:
        return Standing.UNKNOWN
    if cell.group.launch is not None:
        return Standing.MOVING
    state = world.tree.state(container_id)
    if state is State.DEAD:
        return Standing.UNKNOWN if cell.wait is not None and cell.wait.reason == "rolled_back" else Standing.DEAD
    return Standing.LIVING if state in (State.RUNNING, State.STOPPING) and not cell.gone.is_set() else Standing.MOVING


def is_free(world: World, container_id: str) -> bool:
    """Whether nobody lives or is being made by that id, nor below it, nor does what it lies in move."""
    if container_id == HOST:
        return not world.living
    if container_id in world.tree and any(
        standing(world, found) in (Standing.LIVING, Standing.MOVING) for found in world.tree.down(container_id)
    ):
        return False
    return standing(world, container_id) in (Standing.DEAD, Standing.UNKNOWN)


def owner_of_group(world: World, path: str) -> str | None:
    """The container that a control group's path names: the longest one that the ledger knows, else all of it.

    None if the path is not below this run's own group, or is that group itself.
    """
    top = f"mesocosm-{world.host.run_id}"
    parts = path.split("/")
    if top not in parts:
        return None
    names: list[str] = []
    for part in parts[parts.index(top) + 1 :]:
        try:
            names.append(check_name(part, "$"))
        except SpecError:
            break  # made by the container itself, or a leaf of ours in it
    container_id = ".".join(names)
    known: str | None = container_id
    while known is not None and known not in world.cells:
        known = parent_of(known)
    return known or container_id or None
