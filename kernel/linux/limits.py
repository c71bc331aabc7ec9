"""Which limit it was: an errno that means "no more of these", as a number of how many there are and may be.

What lives here: reading counters. What must not: what an error says besides (`launcher.diagnosis`). Theory: the kernel says
EAGAIN and not which of five limits it meant, so the nearest one is named. Asked a moment afterwards, when something may have ended
already: a count can be a little less than it was.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple


class Limit(NamedTuple):
    """`used` of at most `most` of something; `name`: how the limit is called where it is set."""

    used: int
    most: int
    of: str
    name: str


_NEARLY = 0.9  # of a limit that may be the one that EAGAIN meant: what failed has been undone meanwhile


def reached(errno: str | None, kind: str) -> Limit | None:
    """The limit that explains this errno of a step or effect of that kind; None if none does, or it cannot be read."""
    read = _READERS.get((errno or "", kind)) or _READERS.get((errno or "", ""))
    with contextlib.suppress(OSError, ValueError, IndexError):
        found = max(read() if read else (), key=lambda found: found.used / max(1, found.most), default=None)
        if found is not None and (errno != "EAGAIN" or found.used >= found.most * _NEARLY):
            return found
    return None


def _files() -> Iterator[Limit]:
    # Agent, launcher and a container being built have the same limit; whoever is told EMFILE has used all of it.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Limit(most, most, "open files", "ulimit -n")


def _files_of_all() -> Iterator[Limit]:
    used, _, most = _read("/proc/sys/fs/file-nr").split()
    yield Limit(int(used), int(most), "open files of the machine", "fs.file-max")


def _keys() -> Iterator[Limit]:
    for line in _read("/proc/key-users").splitlines():
        user, _, counts = line.partition(":")
        if int(user) == os.geteuid():
            for field, of, name in ((2, "keys of this user", "kernel.keys.maxkeys"), (3, "bytes of keys", "kernel.keys.maxbytes")):
                used, most = counts.split()[field].split("/")
                yield Limit(int(used), int(most), of, name)


def _processes() -> Iterator[Limit]:
    tasks = int(_read("/proc/loadavg").split()[3].partition("/")[2])
    for name in ("pid_max", "threads-max"):
        yield Limit(tasks, int(_read(f"/proc/sys/kernel/{name}")), "processes of the machine", f"kernel.{name}")
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if most != resource.RLIM_INFINITY and not _is_the_hosts_root():
        yield Limit(_tasks_of_this_user(), most, "processes of this user", "ulimit -u")
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        top = f"/sys/fs/cgroup/{controllers}" if controllers else "/sys/fs/cgroup"
        while path.strip("/"):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                used, most = (int(_read(f"{top}{path}/pids.{name}")) for name in ("current", "max"))
                yield Limit(used, most, "processes of a control group", f"pids.max of {path}")
            path = os.path.dirname(path)


def _is_the_hosts_root() -> bool:
    return os.geteuid() == 0 and _read("/proc/self/uid_map").split() == ["0", "0", "4294967295"]


def _tasks_of_this_user() -> int:
    count = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                status = dict(line.split(":\t", 1) for line in _read(f"/proc/{entry}/status").splitlines() if ":\t" in line)
                if int(status["Uid"].split()[0]) == os.getuid():
                    count += int(status["Threads"])
    return count


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


# (errno, kind of step or effect; "": any)
_READERS: Mapping[tuple[str, str], Callable[[], Iterator[Limit]]] = {
    ("EMFILE", ""): _files,
    ("ENFILE", ""): _files_of_all,
    ("EDQUOT", "keyring"): _keys,
    ("EAGAIN", "clone"): _processes,
}
