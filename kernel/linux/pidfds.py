"""What a pidfd tells: who it is of, so that nobody is taken for somebody who has died, and how that one ended.

Theory: a pid is a number that is given away again. What is not is the inode of its pidfd where pidfds have a file system of
their own (pidfs, Linux 6.9), and, almost as good, when the process began (/proc/PID/stat, in ticks since boot).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
from functools import cache

from mesocosm.kernel.linux.libc import syscall

PID_FS_MAGIC = 0x50494446  # linux/magic.h
_GET_INFO = 0xC040FF0B  # PIDFD_GET_INFO: _IOWR(0xFF, 11, struct pidfd_info of version 0), linux/pidfd.h
_INFO = struct.Struct("=2Q11Ii")  # mask, cgroup id, ids, exit_code
_INFO_EXIT = 1 << 3  # Linux 6.15


@cache
def has_own_inodes() -> bool:
    """Whether each pidfd's inode is its process's alone, as long as the machine runs."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        return is_pidfs(pidfd)
    finally:
        os.close(pidfd)


def is_pidfs(fd: int) -> bool:
    """Whether this descriptor is in pidfs."""
    found = ctypes.create_string_buffer(256)
    syscall("fstatfs", fd, found)
    return int.from_bytes(found.raw[:8], "little") == PID_FS_MAGIC


def identity(pidfd: int, pid: int) -> str:
    """``pidfd:INODE`` or ``start:TICKS`` of a process; empty if it has gone and nobody can say any more."""
    if has_own_inodes():
        return f"pidfd:{os.fstat(pidfd).st_ino}"
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            ticks = stat.read().rpartition(b")")[2].split()[19]
    except OSError:
        return ""
    return "" if is_reaped(pidfd) else f"start:{int(ticks)}"


def is_of(pidfd: int, pid: int, birth: str) -> bool:
    """Whether this descriptor is a pidfd of the process that had this pid and identity, as far as anybody can still tell."""
    if "pidfd" not in os.readlink(f"/proc/self/fd/{pidfd}"):
        return False
    if has_own_inodes():
        return not birth or identity(pidfd, pid) == birth
    return pid_of(pidfd) in (0, pid)


def pid_of(pidfd: int) -> int:
    """The pid behind a descriptor, as our /proc counts; 0 if it is no pidfd, or of a process that has been reaped. OSError if
    that cannot be looked up now."""
    try:
        with open(f"/proc/self/fdinfo/{pidfd}") as info:
            return max(0, *(int(line[4:]) for line in info if line.startswith("Pid:")), 0)
    except FileNotFoundError:
        return 0


def reopen(pid: int, birth: str) -> int | None:
    """A pidfd of the process that had this pid and identity, running or not reaped yet; None if there is none any more.

    Whoever else has the number by now is never touched: it is looked at, and let go.
    """
    if pid <= 0 or not birth:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    if identity(pidfd, pid) == birth:
        return pidfd
    os.close(pidfd)
    return None


def has_ended(pidfd: int) -> bool:
    """Whether its process is a zombie, or reaped."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def is_reaped(pidfd: int) -> bool:
    """Whether its process is gone for good."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def exit_status(pidfd: int) -> int | None:
    """The wait status of a process that somebody has reaped, as the kernel keeps it for who holds a pidfd (PIDFD_GET_INFO,
    Linux 6.15); None where it does not, or not yet."""
    try:
        answer = fcntl.ioctl(pidfd, _GET_INFO, _INFO.pack(_INFO_EXIT, *bytes(13)))
    except OSError:
        return None
    mask, *_, status = _INFO.unpack(answer)
    return int(status) if mask & _INFO_EXIT else None
