"""What is seen on the machine in an audit: one record for each thing that could be ours, and the looks that need little.

What lives here: the record, the scene that looks are given, and those at files, sockets, links, loop devices and keys. Processes
and namespaces, control groups, and mounts are in `sight_processes`, `sight_groups` and `sight_mounts`. What must not: a
verdict (`audit`), or any change.

Theory: a look is a generator. It yields None whenever it has done a bit, so that whoever runs it can let others have their turn,
and a Sighting for whatever has a name or a place of ours. What this kernel or this user cannot see is said in `notes`.
Nothing is proof of itself: a look-alike name is not, and a place is only for what holds neither data nor processes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.core.names import parse_id
from mesocosm.kernel.core.plan import Undo
from mesocosm.kernel.linux import devices, procfs
from mesocosm.kernel.runtime.claims import Claims, Standing, standing
from mesocosm.kernel.runtime.world import World

# What the parts of mesocosm keep in the run and state directories. A new file of ours gets its name in here.
OWN = re.compile(
    r"(agent|launcher|keeper)\.(sock|lock|log|pid)(\.\d+|\.set-aside-\d+)?|\.agent\.sock\.\d+|(ledger|history)\.db([-.].*)?"
    r"|reaped.*|containers|former|empty"
)
_MOST_SOCKETS = 1_000
_OF_A_CONTAINER = frozenset({"stdout", "stderr", "sandbox", "root"})


class Sighting(NamedTuple):
    """One thing with a name or a place of ours.

    `owner`: the container its place belongs to, if it names one. `proven`: that it is ours, and the owner's if there is one, is
    certain whatever the ledger says. `alien`: it is not its owner's, though in its place. `undo` or `end` is how it could be
    undone if the ledger has no entry; `still` asks again whether it is there.
    """

    kind: str
    target: str
    note: str
    owner: str | None = None
    proven: bool = False
    alien: bool = False
    undo: tuple[Undo, ...] = ()
    end: Callable[[], None] | None = None
    still: Callable[[], bool] = lambda: True


@dataclass(slots=True)
class Scene:
    """What a look is given: the agent's world, the ledger's claims, and where to say what cannot be seen."""

    world: World
    claims: Claims
    notes: list[str] = field(default_factory=list)

    def note(self, words: str) -> None:
        """Something that cannot be seen, once."""
        if words not in self.notes:
            self.notes.append(words)

    @property
    def places(self) -> tuple[str, str]:
        """The run and the state directory."""
        return self.world.host.run_dir, self.world.host.state_dir

    def is_below(self, path: str) -> bool:
        """Whether a path lies below one of them."""
        return any(path.startswith(f"{place}/") for place in self.places)

    @property
    def firsts(self) -> list[int]:
        """The first processes of all living containers."""
        return [cell.pid for cell in self.world.cells.values() if cell.pid is not None and not cell.gone.is_set()]

    @property
    def is_launching(self) -> bool:
        """Whether anything is on its way up: processes and namespaces have no owner yet then."""
        return any(group.launch is not None for group in self.world.groups.values())


Look = Callable[[Scene], Iterator[Sighting | None]]


def files(scene: Scene) -> Iterator[Sighting | None]:
    """Names in the run and state directories, and one level into every container's."""
    run_dir, state_dir = scene.places
    containers = f"{run_dir}/containers"
    for place in dict.fromkeys((run_dir, state_dir)):
        for entry in _listed(scene, place):
            if not OWN.fullmatch(entry.name):
                yield _file(entry.path, _mode(entry), f"not one of the names that are kept in {place}")
            yield None
    for entry in _listed(scene, containers):
        yield from _container(scene, entry)
    launcher = f"{run_dir}/launcher.sock"
    if not scene.world.launcher_gone and not os.path.lexists(launcher):
        scene.note(f"{launcher} is gone: the next agent could not find what runs")
    if scene.world.ledger.is_adrift:
        scene.note(f"{scene.world.ledger.path} is gone: the next agent could not find what runs, and nothing new starts")


def _container(scene: Scene, entry: os.DirEntry[str]) -> Iterator[Sighting | None]:
    mode = _mode(entry)
    owner = _id(entry.name)
    if owner is None:
        yield _file(entry.path, mode, "no container can have that name")
        return
    state = standing(scene.world, owner)
    claim = scene.claims.now(scene.world, entry.path)
    if claim is not None and not claim.due:
        yield _file(entry.path, mode, "not kept", owner=claim.container)
        return
    if claim is None and state in (Standing.UNKNOWN, Standing.DEAD):
        if stat.S_ISDIR(mode) and not _names(entry.path):
            note, undo = "an empty directory of no container", (Undo("rmdir", entry.path),)
            yield _file(entry.path, mode, note, owner=owner, proven=True, undo=undo)
        else:
            note = "the ledger knows no such container; the next one of that name replaces it"
            yield _file(entry.path, mode, note, owner=owner)
        return
    if state is Standing.MOVING or not stat.S_ISDIR(mode):
        yield None
        return
    for name in _names(entry.path):
        path = f"{entry.path}/{name}"
        if name not in _OF_A_CONTAINER and path not in scene.claims.by_target:
            with suppress(OSError):
                yield _file(path, os.lstat(path).st_mode, f"not made by {owner}; it goes with it", owner=owner, alien=True)
    yield None


def _file(path: str, mode: int, note: str, **more: object) -> Sighting:
    kind = "directory" if stat.S_ISDIR(mode) else "socket" if stat.S_ISSOCK(mode) else "file"
    return Sighting(kind, path, note, still=lambda: os.path.lexists(path), **more)  # type: ignore[arg-type]  # fields by name


def _listed(scene: Scene, directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        scene.note(f"{directory} cannot be listed: {error.strerror}")
        return []


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _mode(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_mode
    except OSError:
        return 0


def _id(name: str) -> str | None:
    try:
        return ".".join(parse_id(name))
    except SpecError:
        return None


def sockets(scene: Scene) -> Iterator[Sighting | None]:
    """Unix sockets that somebody else has bound to a name in the run or state directory."""
    now = cache(lambda: frozenset(devices.bound_sockets()))  # read once more, when the first is judged
    found: set[str] = set()
    try:
        for path in devices.bound_sockets():
            yield None
            # Ours are bound through a descriptor of their directory, and carry that as their name: a whole path is somebody else's.
            if not scene.is_below(path) or path in found or scene.claims.covering(path) is not None:
                continue
            if len(found) == _MOST_SOCKETS:  # anybody can bind any number, in a mount namespace of his own
                scene.note(f"more than {_MOST_SOCKETS} sockets are bound by somebody else: not all of them are shown")
                return
            found.add(path)
            yield Sighting("socket", path, "bound by somebody else", still=lambda path=path: path in now())  # type: ignore[misc]
    except OSError as error:
        scene.note(f"bound sockets cannot be seen: {error}")


def links(scene: Scene) -> Iterator[Sighting | None]:
    """Network devices that are called as ours are, in the agent's network namespace and in every other but the containers' own."""
    mine = procfs.namespace_of(os.getpid(), "net")
    seen: set[str | None] = set()
    for first in scene.firsts:
        seen.add(procfs.namespace_of(first, "net"))
        yield None
    seen.discard(mine)
    hidden = 0
    for pid in (os.getpid(), *procfs.pids()):
        yield None
        namespace = procfs.namespace_of(pid, "net")
        hidden += namespace is None
        if namespace is None or namespace in seen or (namespace != mine and scene.is_launching):
            continue
        seen.add(namespace)
        where = "" if namespace == mine else f" in network namespace {namespace[5:-1]} of process {pid}"
        try:
            found = [name for name in devices.links(pid) if name.startswith("meso")]
        except OSError:
            continue
        for name in found:
            claim = scene.claims.now(scene.world, name)
            owner = claim.container if claim is not None else None
            still = _has_link(pid, name)
            yield Sighting("link", name + where, "called like a link of ours", owner=owner, still=still)
            for address in devices.addresses(name) if not where else ():
                yield Sighting("address", address, f"of {name}", owner=owner, still=still)
    if hidden:
        scene.note(f"the network devices of {hidden} processes are not for this user to see")


def _has_link(pid: int, name: str) -> Callable[[], bool]:
    def look() -> bool:
        try:
            return name in devices.links(pid)
        except OSError:
            return False

    return look


def loops(scene: Scene) -> Iterator[Sighting | None]:
    """Loop devices with a file of the run or state directory behind them."""
    try:
        for device, file in devices.loops():
            if scene.is_below(file):
                claim = scene.claims.now(scene.world, file)
                yield Sighting(
                    "loop", device, f"on {file}",
                    owner=claim.container if claim is not None else None,
                    still=lambda pair=(device, file): pair in devices.loops(),  # type: ignore[misc]
                )  # fmt: skip
            yield None
    except OSError as error:
        scene.note(f"loop devices cannot be seen: {error}")


def keys(scene: Scene) -> Iterator[Sighting | None]:
    """Keys whose description begins as our names do. The keyrings of containers have none, and are shown to nobody else."""
    try:
        for key in devices.visible_keys():
            if key.description.startswith("meso"):
                yield Sighting(
                    "key", f"{key.serial} ({key.kind} {key.description})", f"of uid {key.uid}",
                    still=lambda key=key: key in devices.visible_keys(),  # type: ignore[misc]
                )  # fmt: skip
            yield None
        counts = {uid: count for uid, count in devices.key_users() if uid >= _FIRST_ID}
    except OSError as error:
        scene.note(f"keys cannot be seen: {error}")
        return
    cells = scene.world.cells.values()
    living = {cell.base for cell in cells if cell.base is not None and not cell.dead.is_set()}
    size = scene.world.host.uid_count
    for base in {cell.base for cell in cells if cell.base is not None} - living:
        if many := sum(count for uid, count in counts.items() if base <= uid < base + size):
            scene.note(
                f"{many} keys of ids {base}… that no living container of this agent has; whose they are, the kernel does not tell"
            )


_FIRST_ID = 0x70000000  # of the pool that ranges are taken from
