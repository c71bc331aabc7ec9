"""Who holds a path, a control group or a process: what /proc and /sys know of it.

What lives here: the search, as a program of its own (``python holding.py SECONDS KIND TARGET`` prints JSON lines), which
imports nothing of ours. What must not: words for people (`runtime.holders`).

Theory: whoever asks this is in trouble already, so the search must not get into the same. It never opens, stats or
enters what is searched for, or anything that lies on a file system which may have stopped answering: paths are compared as
text, as readlink of /proc and the mount tables give them, which asks no file system. Some files of /proc wait for a lock
that a stuck process may hold (maps, stack). So the cheap and safe ones are read first, every find is told at once, and whoever
has started this stops it when its time is up.

    KIND path     TARGET a directory, a file or a mount point
         cgroup   TARGET the directory of a control group, v1 or v2
         process  TARGET a pid
         server   TARGET a mount point: what is mounted there, and who serves it
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

Find = dict[str, Any]
_MOST = 20  # finds told: nobody reads more
_FRAMES = 3  # of a kernel stack


class Mount(NamedTuple):
    """A line of a mountinfo: proc_pid_mountinfo(5)."""

    id: str
    device: str  # major:minor
    root: str  # of the file system, the directory that is mounted
    point: str
    type: str
    source: str


def mounts_of(pid: int | str) -> list[Mount]:
    """The mounts that a process sees; none if it has gone, or is not ours to look at."""
    found = []
    for line in _read(f"/proc/{pid}/mountinfo").splitlines():
        words = line.split(" ")
        try:
            dash = words.index("-", 6)
            found.append(Mount(words[0], words[2], _plain(words[3]), _plain(words[4]), words[dash + 1], _plain(words[dash + 2])))
        except (ValueError, IndexError):
            continue
    return found


def _plain(text: str) -> str:
    if "\\" not in text:
        return text
    for code, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, plain)
    return text


def is_at_or_below(path: str, top: str) -> bool:
    """By text alone."""
    return path == top or path.startswith(top.rstrip("/") + "/")


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces).decode(errors="surrogateescape")
    except OSError:
        return ""
    finally:
        os.close(fd)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


# -- a process --------------------------------------------------------------------------------------------------------


def standing(pid: int) -> Find:
    """How a process stands: comm, state, and what explains a state in which it does not react (wchan, tracer, freezer, parent)."""
    found: Find = {"pid": pid, "comm": "?", "state": "?"}
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return {**found, "state": "gone"}
    found["comm"] = stat[stat.find("(") + 1 : stat.rfind(")")]
    words = stat[stat.rfind(")") + 1 :].split()
    found["state"], parent = words[0], int(words[1])
    status = dict(line.split(":\t", 1) for line in _read(f"/proc/{pid}/status").splitlines() if ":\t" in line)
    if (tracer := int(status.get("TracerPid", "0"))) > 0:
        found["tracer"] = {"pid": tracer, "comm": _read(f"/proc/{tracer}/comm").strip()}
    waiting = [(pid, found["state"])]
    if int(words[17]) > 1 or found["state"] == "Z":  # a leader that has ended says nothing of its threads
        threads = [(int(tid), _state(f"/proc/{pid}/task/{tid}")) for tid in _threads(pid)[:64]]
        alive = [(tid, state) for tid, state in threads if state not in ("Z", "X", "")]
        if found["state"] == "Z" and alive:
            found["threads"] = len(alive)
        waiting = alive or waiting
    for tid, state in waiting:
        if state == "D" and "wchan" not in found:
            found["state"] = "D"
            wchan = _read(f"/proc/{pid}/task/{tid}/wchan").strip()
            stack = [line.split("] ", 1)[-1].partition("+")[0] for line in _read(f"/proc/{pid}/task/{tid}/stack").splitlines()]
            found["wchan"] = wchan if wchan not in ("", "0") else next(iter(stack), "the kernel")
            found["stack"] = stack[:_FRAMES]
    if found["state"] == "Z":
        found["parent"] = {"pid": parent, "comm": _read(f"/proc/{parent}/comm").strip(), "state": _state(f"/proc/{parent}")}
    if frozen := _frozen(pid):
        found["frozen"] = frozen
    if found["state"] == "D":
        served = [mount for mount in mounts_of(pid) if is_served(mount.type)][:3]
        if served:
            found["served"] = [mount.point for mount in served]
            found["connections"] = {_connection(mount): mount.point for mount in served if _connection(mount)}
    return found


def _connection(mount: Mount) -> str:
    """Which directory of /sys/fs/fuse/connections is about a mount; empty if it is no FUSE mount."""
    return mount.device.partition(":")[2] if mount.type.startswith("fuse") else ""


def servers(connections: dict[str, str]) -> Iterator[Find]:
    """Who serves FUSE connections (number → mount point); found from Linux 6.18 on, which tells it in fdinfo."""
    for pid in _pids() if connections else ():
        for fd, path in _fds(pid):
            if path == "/dev/fuse" and (point := connections.get(_told(f"/proc/{pid}/fdinfo/{fd}", "fuse_connection:"))):
                yield {**standing(pid), "how": [f"serves {point}"]}


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []


def _state(directory: str) -> str:
    stat = _read(f"{directory}/stat")
    return stat[stat.rfind(")") + 2 :][:1]


def _frozen(pid: int) -> str:
    """The control group that has been told to freeze this process; empty if none has."""
    for line in _read(f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "freezer" not in controllers.split(","):
            continue
        top = cgroup_mount("freezer" if controllers else "")
        while top and path not in ("", "/"):
            if "FROZEN" in _read(f"{top}{path}/freezer.state") or _read(f"{top}{path}/cgroup.freeze").strip() == "1":
                return top + path
            path = os.path.dirname(path)
    return ""


def cgroup_mount(controller: str) -> str:
    """Where the hierarchy with this controller is mounted ('' for v2), as this process sees it."""
    for line in _read("/proc/self/mountinfo").splitlines():
        words = line.split(" ")
        dash = words.index("-", 6)
        if words[dash + 1] == ("cgroup" if controller else "cgroup2") and (
            not controller or controller in words[dash + 3].split(",")
        ):
            return _plain(words[4])
    return ""


# -- a control group --------------------------------------------------------------------------------------------------


def in_cgroup(target: str) -> Iterator[Find]:
    """Who is in a control group: its processes, and those of the groups below it."""
    seen: set[int] = set()
    for directory, below, _ in os.walk(target):
        # In a threaded group of v2 cgroup.procs cannot be read; in v1 the threads of a leader that has ended are in `tasks` only.
        listed = _read(f"{directory}/cgroup.procs") or _read(f"{directory}/cgroup.threads") or _read(f"{directory}/tasks")
        for word in listed.split():
            pid = _leader(int(word))
            if pid not in seen:
                seen.add(pid)
                yield {**standing(pid), "how": ["in it" if directory == target else f"in {directory[len(target) + 1 :]} below it"]}
        if directory == target and below and not listed.strip():
            yield {"groups": sorted(below)[:5], "how": ["groups below it"]}


def _leader(tid: int) -> int:
    return int(_told(f"/proc/{tid}/status", "Tgid:") or tid)


# -- a path -----------------------------------------------------------------------------------------------------------

_SERVED = frozenset({
    "9p", "afs", "autofs", "beegfs", "ceph", "cifs", "coda", "fuse", "fuseblk", "gfs2", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "smb3", "smbfs", "virtiofs",
})  # fmt: skip


def is_served(kind: str) -> bool:
    """Whether a file system of this type asks somebody else, who may not answer, before it answers."""
    return kind in _SERVED or kind.startswith("fuse.")


class _Place:
    """A path, and all that is known of it without asking the file system it is on."""

    def __init__(self, target: str) -> None:
        self.target = target
        ours = mounts_of("self")
        self.mounted = [mount for mount in ours if is_at_or_below(mount.point, target)]
        around = max(
            (mount for mount in ours if is_at_or_below(target, mount.point)), key=lambda found: len(found.point), default=None
        )
        self.device, self.root = "", ""
        if around is not None and around not in self.mounted:  # where it is in its own file system: what may be bound elsewhere
            rest = target[len(around.point.rstrip("/")) :]
            self.device, self.root = around.device, around.root.rstrip("/") + rest
        # What is mounted there, wherever else it is mounted: but not what half of the machine has.
        common = {mount.device for mount in ours if not is_at_or_below(mount.point, target)}
        self.devices = {mount.device for mount in self.mounted} - common
        self.ids: set[str] = {mount.id for mount in self.mounted}

    def has(self, path: str) -> bool:
        return is_at_or_below(path.removesuffix(" (deleted)"), self.target)

    def has_mount(self, mount: Mount) -> bool:
        return mount.device in self.devices or (
            mount.device == self.device and self.root != "/" and is_at_or_below(mount.root, self.root)
        )


def _mounted(mounts: list[Mount]) -> Iterator[Find]:
    for mount in mounts:
        what = {"mount": mount.point, "type": mount.type, "how": [f"{mount.type} is mounted at {mount.point}"]}
        if _connection(mount):
            what["connection"] = _connection(mount)
        yield what
    yield from servers({_connection(mount): mount.point for mount in mounts if _connection(mount)})


def on_path(target: str) -> Iterator[Find]:
    """Who has a path, or something below it or mounted there, in use; what is cheap and safe to find first."""
    place = _Place(target)
    yield from _mounted(place.mounted)
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else ():
        if name.startswith("loop") and place.has(backing := _read(f"/sys/block/{name}/loop/backing_file").strip()):
            yield {"loop": f"/dev/{name}", "how": [f"/dev/{name} uses {backing}"]}
    for line in _read("/proc/swaps").splitlines()[1:]:
        if place.has(_plain(line.split()[0])):
            yield {"swap": line.split()[0], "how": [f"the machine swaps to {line.split()[0]}"]}
    namespaces: dict[str, list[Mount]] = {_link("/proc/self/ns/mnt"): []}
    told: dict[int, Find] = {}
    pids = [pid for pid in _pids() if pid != os.getpid()]
    unseen = 0
    for pid in pids:
        how = []
        namespace = _link(f"/proc/{pid}/ns/mnt")
        if not namespace:
            unseen += 1
            continue
        if namespace not in namespaces:
            namespaces[namespace] = [mount for mount in mounts_of(pid) if place.has_mount(mount)]
            place.ids.update(mount.id for mount in namespaces[namespace])
            how += [f"its mount namespace has it at {mount.point}" for mount in namespaces[namespace][:2]]
        how += _links(place, pid)
        if how:
            told[pid] = {**standing(pid), "how": how}
            yield told[pid]
    if unseen and os.geteuid():
        yield {"unseen": unseen}
    for pid in pids:  # last: /proc/PID/maps waits for a lock of that process
        if pid not in told and (mapped := _mapped(place, pid)):
            yield {**standing(pid), "how": [f"mmap {mapped}"]}


def _links(place: _Place, pid: int) -> list[str]:
    """cwd, root, exe and descriptors of a process that are in the place."""
    how = [f"{name} {path}" for name in ("cwd", "root", "exe") if place.has(path := _link(f"/proc/{pid}/{name}"))]
    for fd, path in _fds(pid):
        # In another mount namespace, or detached, the path is another; the mount is the same.
        if place.has(path) or (place.ids and _told(f"/proc/{pid}/fdinfo/{fd}", "mnt_id:") in place.ids):
            how.append(f"fd {fd} {path}")
    return how[:4]


def _fds(pid: int) -> list[tuple[str, str]]:
    """The open files of a process that have a path."""
    try:
        found = [(fd, _link(f"/proc/{pid}/fd/{fd}")) for fd in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []
    return [(fd, path) for fd, path in found if path.startswith("/")]


def _told(file: str, key: str) -> str:
    """The word after `key` at the beginning of a line; empty if there is none."""
    for line in _read(file).splitlines():
        if line.startswith(key):
            return line[len(key) :].strip()
    return ""


def _mapped(place: _Place, pid: int) -> str:
    for line in _read(f"/proc/{pid}/maps").splitlines():
        words = line.split(None, 5)
        if len(words) > 5 and words[5].startswith("/") and place.has(words[5]):
            return words[5].removesuffix(" (deleted)")
    return ""


def search(kind: str, target: str) -> Iterator[Find]:
    """All finds, the cheapest first."""
    if kind == "process":
        found = standing(int(target))
        yield found
        yield from servers(found.get("connections", {}))
    elif kind == "server":
        yield from _mounted([mount for mount in mounts_of("self") if mount.point == target])
    elif kind == "cgroup":
        yield from in_cgroup(target)
    else:
        yield from on_path(os.path.normpath(target))


def main(argv: list[str]) -> int:
    """Prints what is found, a line each; the last is {"looked": seconds}, if it came so far."""
    began = time.monotonic()
    most, kind, target = float(argv[1]), argv[2], argv[3]
    os.nice(10)
    for number, found in enumerate(search(kind, target)):
        print(json.dumps(found, ensure_ascii=True), flush=True)
        if number + 1 >= _MOST or time.monotonic() - began > most:
            return 0
    print(json.dumps({"looked": round(time.monotonic() - began, 3)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
