"""What /proc shows of processes: the table, the groups and namespaces they are in, the mounts they see, what they hold open.

What lives here: reading, a line at a time, for somebody who must not be held up. What must not: an opinion about whose a thing
is. Processes come and go meanwhile, and of some an ordinary user is shown little: whatever cannot be read is None or left out,
so that the caller can say so. proc_pid_stat(5), proc_pid_mountinfo(5), namespaces(7).
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from typing import NamedTuple

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_ESCAPED = re.compile(r"\\([0-7]{3})")


class Process(NamedTuple):
    """One line of the process table. `started` (clock ticks since the boot) tells it from a later one with its number."""

    pid: int
    parent: int
    started: int
    name: str
    state: str


class Mount(NamedTuple):
    """One mount: where (`point`), of which file system (`device` MAJOR:MINOR, `kind`, `source`), which part of it (`root`)."""

    device: str
    root: str
    point: str
    kind: str
    source: str


def pids() -> list[int]:
    """The numbers of all processes that can be seen."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def process(pid: int) -> Process | None:
    """One process; None if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            before, _, after = file.read().rpartition(")")
    except OSError:
        return None
    fields = after.split()  # from the third on
    return Process(pid, int(fields[1]), int(fields[19]), before.partition("(")[2], fields[0])


def is_same(found: Process) -> bool:
    """Whether it is still that process, and not dead but unreaped."""
    now = process(found.pid)
    return now is not None and now.started == found.started and now.state not in "ZX"


def kill(found: Process) -> None:
    """SIGKILL to that very process and to no other that has its number by now; ProcessLookupError if it is gone."""
    pidfd = os.pidfd_open(found.pid)
    try:
        if not is_same(found):
            raise ProcessLookupError(f"process {found.pid}")
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def groups_of(pid: int) -> list[str]:
    """Its control group in each hierarchy, as a path below the reader's cgroup namespace; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n").split(":", 2)[2].removesuffix(" (deleted)") for line in file]
    except OSError:
        return []


def arguments_of(pid: int) -> list[str]:
    """Its arguments, as it shows them."""
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            return file.read().split("\0")
    except OSError:
        return []


def namespace_of(pid: int, kind: str) -> str | None:
    """``mnt:[4026531840]``: one of the namespaces it is in; None if that is not for this user to see, or it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return None


def held_namespaces(pid: int) -> Iterator[tuple[int, str]]:
    """(descriptor, namespace) of those that a process has open, as far as they can be seen."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
        if target.partition(":[")[0] in NAMESPACES:
            yield int(name), target


def mounts_of(pid: int | str = "self") -> Iterator[Mount]:
    """The mounts that a process sees; OSError if that cannot be read."""
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            _, _, device, root, point = left.split(" ")[:5]
            kind, source = right.split(" ")[:2]
            yield Mount(device, unescaped(root), unescaped(point), kind, unescaped(source))


def unescaped(text: str) -> str:
    """``\\040`` and the like, with which mountinfo writes what would end a field."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def lock_holder(path: str) -> int | None:
    """The process that has a flock(2) on the file at `path`, as /proc/locks says; None if nobody has, or it cannot be told.

    Asking changes nothing, where trying to lock would be in the way of who is just about to. Some file systems (overlayfs,
    btrfs) show another device there than stat(2) does: then it cannot be told.
    """
    try:
        status = os.stat(path)
        with open("/proc/locks") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    wanted = [f"{os.major(status.st_dev):02x}", f"{os.minor(status.st_dev):02x}", str(status.st_ino)]
    for line in lines:
        fields = line.split()
        # "1: FLOCK  ADVISORY  WRITE 76 fe:00:1234 0 EOF"; "->" before FLOCK is somebody who waits for it
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].split(":") == wanted:
            return int(fields[4])
    return None
