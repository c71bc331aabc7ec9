"""Processes and namespaces as an audit sees them: who stands in our groups and namespaces, and who only looks like one of ours.

What lives here: the look at the process table. Theory: a container's processes are those that were *born* of it: they descend from
its first process, or from the launcher and the keeper above it, to which orphans pass. Nobody can enter that line from outside,
while anybody with the right can stand in a group, enter a namespace, or take a name. So descent is proof, all else only a look.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from mesocosm.kernel.linux import procfs, served
from mesocosm.kernel.linux.procfs import Process
from mesocosm.kernel.runtime.claims import Standing, owner_of_group, standing
from mesocosm.kernel.runtime.sightings import Scene, Sighting

_OURS = re.compile(r"meso-|mesocosm")
_LAUNCHER, _KEEPER, _CRADLE = "meso-launcher", "meso-keeper", "meso-cradle"
_RUN_DIR = re.compile(r"main\('((?:[^'\\]|\\.)*)'")  # in the launcher's own command line
_KTHREADD = 2


class _Table:
    """The process table, and which of it is ours: `staff` are the agent, the launcher and what they consist of."""

    def __init__(self, scene: Scene, table: dict[int, Process]) -> None:
        self.table = table
        world = scene.world
        launcher = getattr(world.launcher, "pid", None)
        self.staff = {os.getpid()}
        if launcher in table:
            self.staff |= {launcher, *(pid for pid, found in table.items() if found.parent == launcher and found.name == _CRADLE)}
        self.firsts = {cell.pid: cell.id for cell in world.cells.values() if cell.pid is not None and not cell.gone.is_set()}
        # Containers of a launcher that has died stay with the keeper that was above it.
        for pid in (launcher, *self.firsts):
            above = table.get(table[pid].parent) if pid in table else None
            if above is not None and above.name == _KEEPER:
                self.staff.add(above.pid)
        self.roots = (self.staff - {os.getpid()}) | self.firsts.keys()

    def descends(self, pid: int) -> bool:
        """Whether a process was born of ours, asked of the kernel anew: parents may have died since the table was read."""
        for _ in range(10_000):
            if pid in self.roots:
                return True
            found = procfs.process(pid)
            if found is None or found.parent < _KTHREADD:
                return False
            pid = found.parent
        return False

    def container_of(self, pid: int) -> str | None:
        """The container whose first process it descends from."""
        while pid not in self.firsts:
            found = self.table.get(pid)
            if found is None or found.parent < _KTHREADD:
                return None
            pid = found.parent
        return self.firsts[pid]


def processes(scene: Scene) -> Iterator[Sighting | None]:
    """Everybody in the process table who is ours, or looks as if."""
    table: dict[int, Process] = {}
    for pid in procfs.pids():
        if (found := procfs.process(pid)) is not None:
            table[pid] = found
        yield None
    known = _Table(scene, table)
    namespaces: dict[str, str] = {}
    for pid, container in known.firsts.items():
        for kind in procfs.NAMESPACES:
            if (name := procfs.namespace_of(pid, kind)) is not None:
                namespaces[name] = container
        yield None
    for pid in (os.getpid(), *known.staff):
        for kind in procfs.NAMESPACES:
            namespaces.pop(procfs.namespace_of(pid, kind) or "", None)
    others = 0
    for found in table.values():
        yield None
        if found.pid in known.staff or found.state in "ZX" or _KTHREADD in (found.pid, found.parent):
            continue
        sighting = (
            _in_a_group(scene, known, found) or _born_of_ours(scene, known, found) or _in_a_namespace(known, found, namespaces)
        )
        if sighting is None and _OURS.match(found.name):
            sighting = _called_like_ours(scene, known, found)
            others += sighting is None and not known.descends(found.pid)
        if sighting is not None:
            yield sighting
    if others:
        scene.note(f"{others} processes of other runs of mesocosm are theirs")
    yield from _held(scene, known)


def _in_a_group(scene: Scene, known: _Table, found: Process) -> Sighting | None:
    owner = place = None
    for path in procfs.groups_of(found.pid):
        if f"/mesocosm-{scene.world.host.run_id}/" in f"{path}/":
            place = path
            owner = owner_of_group(scene.world, path)
            if owner is not None:
                break
    if place is None:
        return None
    state = standing(scene.world, owner) if owner is not None else Standing.UNKNOWN
    if state is Standing.MOVING:
        return None
    born = known.descends(found.pid)
    if state is Standing.LIVING:
        if born:
            return None
        note = f"stands in the control group of {owner}, and is not of its descent: a child of {_named(known, found.parent)}"
        return _sighting(found, note, owner, alien=True, still=lambda: procfs.is_same(found) and not known.descends(found.pid))
    note = f"stands in the control group of {owner}, which is dead" if state is Standing.DEAD else f"stands in {place}"
    return _sighting(found, note, owner, proven=born, alien=not born)


def _born_of_ours(scene: Scene, known: _Table, found: Process) -> Sighting | None:
    if found.parent not in known.table or not known.descends(found.pid):
        return None
    if known.container_of(found.pid) is not None or scene.is_launching:
        return None
    note = f"was born of {_named(known, found.parent)}, and is in no container"
    return _sighting(found, note, None, proven=True, still=lambda: procfs.is_same(found) and _is_nobodys(scene, found.pid))


def _is_nobodys(scene: Scene, pid: int) -> bool:
    """Whether, at this moment, no container has it: one may have begun since the table was read."""
    firsts = {cell.pid for cell in scene.world.cells.values() if cell.pid is not None and not cell.dead.is_set()}
    while (found := procfs.process(pid)) is not None and pid not in firsts:
        pid = found.parent
    return found is None and not scene.is_launching


def _in_a_namespace(known: _Table, found: Process, namespaces: dict[str, str]) -> Sighting | None:
    if known.descends(found.pid):
        return None
    for kind in procfs.NAMESPACES:
        owner = namespaces.get(procfs.namespace_of(found.pid, kind) or "")
        if owner is not None:
            note = f"is in the {kind} namespace of {owner}, and not of its descent: a child of {_named(known, found.parent)}"
            return _sighting(found, note, owner, alien=True, still=lambda: procfs.is_same(found) and not known.descends(found.pid))
    return None


def _called_like_ours(scene: Scene, known: _Table, found: Process) -> Sighting | None:
    """None for what belongs to another run, as far as that can be told."""
    if known.descends(found.pid):
        return None  # a container's own business: it may call itself what it likes
    family = {found.pid, found.parent, *(pid for pid, other in known.table.items() if other.parent == found.pid)}
    launchers = [pid for pid in family if (other := known.table.get(pid)) is not None and other.name == _LAUNCHER]
    for pid in launchers:
        match = _RUN_DIR.search(" ".join(procfs.arguments_of(pid)))
        if match is None:
            continue
        directory = match[1]
        if directory == scene.world.host.run_dir:
            return _sighting(found, "of an agent before this one in the same directory, which this one could not find", None)
        if served.ours().leads_to(directory):  # anybody may call himself so, and name what never answers
            return None
        try:
            os.stat(directory)
        except FileNotFoundError:
            return _sighting(found, f"its run directory {directory} is gone", None)
        except OSError:
            return None  # not for us to see
        return None
    return _sighting(found, "called like a process of ours, and none", None)


def _sighting(
    found: Process,
    note: str,
    owner: str | None,
    *,
    proven: bool = False,
    alien: bool = False,
    still: Callable[[], bool] | None = None,
) -> Sighting:
    return Sighting(
        "process", f"{found.pid} ({found.name})", note, owner=owner, proven=proven, alien=alien,
        end=(lambda: procfs.kill(found)) if proven else None, still=still or (lambda: procfs.is_same(found)),
    )  # fmt: skip


def _named(known: _Table, pid: int) -> str:
    found = known.table.get(pid)
    return f"{pid} ({found.name})" if found is not None else str(pid)


# The launcher keeps one of each of these for itself: the mounts that it began in, and the processes among which it runs.
_KEPT = frozenset({"mnt", "pid"})


def _held(scene: Scene, known: _Table) -> Iterator[Sighting | None]:
    """Namespaces that live on only because one of our own processes has them open. (Bind mounts of them are mounts.)"""
    held = {
        name: (pid, fd) for pid in known.staff for fd, name in procfs.held_namespaces(pid) if name.partition(":")[0] not in _KEPT
    }
    if not held or scene.is_launching:
        return
    hidden = 0
    for pid in known.table:
        for kind in {name.partition(":")[0] for name in held}:
            name = procfs.namespace_of(pid, kind)
            hidden += name is None
            held.pop(name or "", None)
        yield None
    if hidden:
        scene.note(f"the namespaces of {hidden} processes are not for this user to see")
        return
    for name, (pid, fd) in held.items():
        yield Sighting(
            "namespace", name, f"held by descriptor {fd} of {_named(known, pid)}, and nobody lives in it", proven=True,
            still=lambda pid=pid, fd=fd, name=name: not scene.is_launching and (fd, name) in procfs.held_namespaces(pid),  # type: ignore[misc]
        )  # fmt: skip
