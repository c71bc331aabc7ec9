"""A census of the machine: everything that launching containers could leave behind, taken before and after.

What lives here: looking and comparing. What must not: anything of the runtime. The census knows nothing of ledgers
and plans; it asks the kernel what is there, so it finds what the ledger forgot. Nothing is changed by looking.

Theory: two censuses taken with the same arguments are equal if nothing was left and nothing was lost. Control groups,
mounts, network devices, namespaces, loop devices, System V objects and keys are counted on the whole machine, whoever
made them, since a leak has no owner any more. Processes come and go for reasons of their own, so of those only the
ones are counted that descend from the given pids, stand in a control group of mesocosm, or carry its environment.
The kernel tears down asynchronously (network namespaces, control groups, zombies of a busy parent), so `left_over`
looks again until the difference is gone or a deadline has passed: a leak is what stays.

    before = census(pids=[agent, launcher], roots=[run_dir])
    ...
    assert left_over(before) == []
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SETTLE_SECONDS = 5.0  # a network namespace on a busy machine takes most of a second to go
_PREFIX = "mesocosm-"  # what our control groups are called
_OURS = re.compile(f"/{_PREFIX}")
_ENVIRONMENT = b"MESOCOSM_"
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")


@dataclass(frozen=True)
class Census:
    """What was there. `things` maps a kind to (what identifies it → what to call it); the rest are the arguments of `census`."""

    things: Mapping[str, Mapping[str, str]]
    pids: tuple[int, ...] = ()
    roots: tuple[str, ...] = ()
    ignore: frozenset[int] = frozenset()
    run_id: str | None = None
    keys: bool = True

    def again(self) -> Census:
        """A census of now with the same arguments."""
        return census(pids=self.pids, roots=self.roots, ignore=self.ignore, run_id=self.run_id, keys=self.keys)

    def difference(self, later: Census) -> list[str]:
        """Lines ``+ kind: name`` for what is new in `later` and ``- kind: name`` for what has gone; empty if nothing is."""
        lines = []
        for kind, mine in self.things.items():
            theirs = later.things[kind]
            lines += [f"+ {kind}: {theirs[key]}" for key in theirs.keys() - mine.keys()]
            lines += [f"- {kind}: {mine[key]}" for key in mine.keys() - theirs.keys()]
        return sorted(lines)


@dataclass(frozen=True)
class _Process:
    """One line of the process table."""

    pid: int
    parent: int
    started: str
    name: str
    state: str


def census(
    *,
    pids: Sequence[int] = (),
    roots: Sequence[str | os.PathLike[str]] = (),
    ignore: Collection[int] = (),
    run_id: str | None = None,
    keys: bool = True,
) -> Census:
    """Takes a census.

    `pids`: processes of ours (an agent, a launcher) whose open files and mounts are counted, and whose descendants are.
    `roots`: directories below which every path is counted. `ignore`: processes which, with their descendants, do not
    count, nor do namespaces that only they hold: the test runner's other workers, a guest. `run_id`: of the agent under test;
    with it, the control groups of other runs of mesocosm do not count, nor does what stands in them.
    `keys`: whether keys count. The kernel tells their number for each user of the machine, not whose they are, so not where
    others launch containers.
    """
    table = dict(_process_table())
    foreign = _foreign(run_id)
    ignored = _descendants(table, ignore) | {os.getpid()} | {pid for pid in table if foreign and _stands_in(pid, foreign)}
    watched = [pid for pid in pids if pid in table]
    places = [os.fspath(root) for root in roots]
    things = {
        "process": dict(_our_processes(table, _descendants(table, pids), ignored)),
        "cgroup": {key: name for key, name in _cgroups() if not (foreign and foreign.search(key))},
        "mount": _numbered(_mounts("self")) | {key: name for pid in watched for key, name in _mounts_of(pid).items()},
        "namespace": dict(_namespaces(table, ignored)),
        "network device": {name: name for name in _names_in("/sys/class/net")},
        "loop device": dict(_loop_devices()),
        "System V object": dict(_system_v_objects()),
        "key": dict(_keys() if keys else ()),
        "open file": {key: name for pid in watched for key, name in _open_files(pid).items()},
        "path": {path: path for root in places for path in _paths(root)},
    }
    return Census(things, tuple(pids), tuple(places), frozenset(ignore), run_id, keys)


def left_over(before: Census, *, seconds: float = SETTLE_SECONDS) -> list[str]:
    """What is not as it was, as `Census.difference` says it, after the kernel has had `seconds` to finish; [] is no leak."""
    deadline = time.monotonic() + seconds
    pause = 0.01
    while (lines := before.difference(before.again())) and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return lines


def _process_table() -> Iterator[tuple[int, _Process]]:
    for entry in _names_in("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            before, _, after = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")
            fields = after.split()  # proc_pid_stat(5), counted from the third field
            yield int(entry), _Process(int(entry), int(fields[1]), fields[19], before.partition("(")[2], fields[0])


def _descendants(table: Mapping[int, _Process], tops: Collection[int]) -> set[int]:
    """`tops` and everything below them."""
    found = {pid for pid in tops if pid in table}
    grown = True
    while grown:
        below = {pid for pid, process in table.items() if process.parent in found}
        grown = not below <= found
        found |= below
    return found


def _our_processes(table: Mapping[int, _Process], descendants: set[int], ignored: set[int]) -> Iterator[tuple[str, str]]:
    for pid, process in table.items():
        if pid in ignored or not (pid in descendants or _stands_in_our_cgroup(pid) or _carries_our_environment(pid)):
            continue
        state = ", zombie" if process.state == "Z" else ""
        yield f"{pid} {process.started}", f"{pid} ({process.name}{state}), child of {process.parent}"


def _stands_in_our_cgroup(pid: int) -> bool:
    return _stands_in(pid, _OURS)


def _stands_in(pid: int, groups: re.Pattern[str]) -> bool:
    with contextlib.suppress(OSError):
        return groups.search(Path(f"/proc/{pid}/cgroup").read_text()) is not None
    return False


def _foreign(run_id: str | None) -> re.Pattern[str] | None:
    """What the control groups of other runs look like; None if all runs count."""
    return None if run_id is None else re.compile(f"/{_PREFIX}(?!{re.escape(run_id)}(?![0-9a-f]))[0-9a-f]{{6}}(?![0-9a-z])")


def _carries_our_environment(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return any(word.startswith(_ENVIRONMENT) for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return False


def _cgroups() -> Iterator[tuple[str, str]]:
    """Every control group of every hierarchy that is mounted here."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] in ("cgroup", "cgroup2"):
            for directory, _, _ in os.walk(left.split()[4]):
                yield directory, directory


def _mounts(process: int | str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            kind, source = right.split()[:2]
            yield f"{left.split()[4]} ({kind} {source})"


def _mounts_of(pid: int) -> dict[str, str]:
    return {f"{pid} {key}": f"{name} in process {pid}" for key, name in _numbered(_mounts(pid)).items()}


def _namespaces(table: Mapping[int, _Process], ignored: set[int]) -> Iterator[tuple[str, str]]:
    """Namespaces that a process is in, or holds by an open file; a namespace that only ignored processes hold is not counted."""
    for pid in table.keys() - ignored:
        held = [f"/proc/{pid}/ns/{kind}" for kind in _NAMESPACES]
        held += [f"/proc/{pid}/fd/{fd}" for fd in _names_in(f"/proc/{pid}/fd")]
        for link in held:
            with contextlib.suppress(OSError):
                identity = os.readlink(link)
                if identity.partition(":[")[0] in _NAMESPACES:
                    yield identity, f"{identity} held by process {pid} ({table[pid].name})"


def _loop_devices() -> Iterator[tuple[str, str]]:
    for name in _names_in("/sys/block"):
        with contextlib.suppress(OSError):
            backing = Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()
            yield f"{name} {backing}", f"{name} on {backing}"


def _system_v_objects() -> Iterator[tuple[str, str]]:
    for kind in ("msg", "sem", "shm"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
                key, number = line.split()[:2]
                yield f"{kind} {number}", f"{kind} {number}, key {key}"


def _keys() -> Iterator[tuple[str, str]]:
    """The keys that each user has: only their number can be seen of keyrings that are not ours."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/key-users").read_text().splitlines():
            user, _, counts = line.partition(":")
            for number in range(int(counts.split()[1].partition("/")[0])):
                yield f"{user} {number}", f"number {number + 1} of uid {user.strip()}"


def _open_files(pid: int) -> dict[str, str]:
    """What a process has open, by what it is and not by number: an fd that moved is no leak, a second one like it is."""
    targets = []
    for fd in _names_in(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            kind, _, inode = target.partition(":[")
            targets.append(kind if inode.rstrip("]").isdigit() and kind not in _NAMESPACES else target)
    return {f"{pid} {key}": f"{name} in process {pid}" for key, name in _numbered(targets).items()}


def _paths(root: str) -> Iterator[str]:
    for directory, directories, files in os.walk(root):
        for name in (*directories, *files):
            yield os.path.join(directory, name)


def _numbered(names: Iterable[str]) -> dict[str, str]:
    """`names` as key → name, where the second one of a kind has a key of its own."""
    seen: Counter[str] = Counter()
    keyed = {}
    for name in names:
        seen[name] += 1
        keyed[f"{name} {seen[name]}"] = name
    return keyed


def _names_in(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
