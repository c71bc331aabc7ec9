"""RUN_DIR/reaped: what keepers, and launchers without an agent, have reaped, one record each, and how a record is found again.

What lives here: the format, `Reaped`, which reads, and `append`. The keeper's rows (`keeper`) write the same bytes.

Theory: a launcher tells its agent of each end. What it cannot tell, or has told in vain, would die with it: so that is
written down, when there is no agent, and when there is none any more. Records are of one size that divides a page, and each
is written by one write to a file opened with O_APPEND, so several writers never mix theirs and none is ever torn. A process
is found by what nothing else ever has:

* where pidfds have inodes of their own (pidfs, Linux 6.9), by that number, and by its pid;
* elsewhere by its pid and its time: a number is given away again only after its last owner has been reaped, so the record
  of a process is the first one with its pid that was written after it was born. If somebody else had reaped it
  (its launcher, say, which then died without telling), a later process with its number could be taken for it: for as long as
  it takes until the kernel has gone once round all numbers. That is all that can be known there.

Nobody needs a record of somebody who is not in the ledger as living, so the agent empties the file when nothing lives.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
from typing import Any, NamedTuple

NAME = "reaped"
RECORD_BYTES = 128
MOST_BYTES = 1 << 20  # a keeper writes nothing beyond it
# A siginfo_t as waitid(2) fills it, then the first of a struct rusage and, in its tail that Linux does not use, more.
_FORMAT = struct.Struct("=3i4xiIi4x2q2q2qq8xQ2q8x")
TIME_AT, USAGE_AT, INODE_AT, BOOT_AT = 32, 48, 96, 104
_CLD_EXITED, _CLD_DUMPED = 1, 3
_SIGCHLD = 17
_CORE = 0x80


class Record(NamedTuple):
    """One child that has been reaped. Times in seconds: of day, and since boot; `status` as wait4(2) gives it."""

    pid: int
    inode: int
    status: int
    user_us: int
    system_us: int
    max_rss_kib: int
    time: float
    since_boot: float


def as_record(pid: int, status: int, usage: Any, inode: int) -> bytes:
    """What the keeper's rows would have written."""
    signal = status & 0x7F
    code = (2 + bool(status & _CORE)) if signal else _CLD_EXITED
    now, boot = time.clock_gettime_ns(time.CLOCK_REALTIME), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    user, system = int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6)
    return _FORMAT.pack(
        _SIGCHLD, 0, code, pid, 0, signal or status >> 8, *divmod(now, 10**9), *divmod(user, 10**6), *divmod(system, 10**6),
        usage.ru_maxrss, inode, *divmod(boot, 10**9),
    )  # fmt: skip


def _read(fields: tuple[int, ...]) -> Record | None:
    signo, _, code, pid, _, status, sec, nsec, user, user_us, system, system_us, rss, inode, boot, boot_ns = fields
    if signo != _SIGCHLD or not _CLD_EXITED <= code <= _CLD_DUMPED:
        return None
    raw = (status & 0xFF) << 8 if code == _CLD_EXITED else status & 0x7F | (_CORE if code == _CLD_DUMPED else 0)
    return Record(pid, inode, raw, user * 10**6 + user_us, system * 10**6 + system_us, rss, sec + nsec / 1e9, boot + boot_ns / 1e9)


class Reaped:
    """The file, read as far as it goes each time somebody is looked for in it. Missing or damaged: nothing is known."""

    def __init__(self, run_dir: int) -> None:
        self._run_dir = run_dir
        self._read_to = 0
        self._by_pid: dict[int, list[Record]] = {}

    def find(self, pid: int, birth: str) -> Record | None:
        """The record of the process that had this pid and this identity (`linux.pidfds.identity`)."""
        self._go_on()
        kind, _, value = birth.partition(":")
        if not value.isdecimal():
            return None
        found = self._by_pid.get(pid, ())
        if kind == "pidfd":
            return next((record for record in found if record.inode == int(value)), None)
        born = int(value) / os.sysconf("SC_CLK_TCK")
        return next((record for record in found if record.since_boot >= born), None)

    def _go_on(self) -> None:
        try:
            fd = os.open(NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._run_dir)
        except OSError:
            return
        try:
            if os.fstat(fd).st_size < self._read_to:  # emptied since: what is known of it is about nobody any more
                self._read_to = 0
                self._by_pid.clear()
            data = os.pread(fd, MOST_BYTES + RECORD_BYTES, self._read_to)
        except OSError:
            return
        finally:
            os.close(fd)
        whole = len(data) - len(data) % RECORD_BYTES
        self._read_to += whole
        for fields in _FORMAT.iter_unpack(data[:whole]):
            if (record := _read(fields)) is not None:
                self._by_pid.setdefault(record.pid, []).append(record)


def open_for_writing(run_dir: int) -> int:
    """A descriptor for a keeper; the file is the owner's alone. Whatever else has its name goes out of the way. OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(NAME, dir_fd=run_dir, follow_symlinks=False).st_mode):
            os.rename(NAME, f"{NAME}.set-aside-{time.time_ns()}", src_dir_fd=run_dir, dst_dir_fd=run_dir)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    return os.open(NAME, flags, 0o600, dir_fd=run_dir)


def append(run_dir: int, *records: bytes) -> None:
    """What a keeper would have written. Where that cannot be, it is known to whoever wrote it, and to nobody else: no OSError."""
    with contextlib.suppress(OSError):
        fd = open_for_writing(run_dir)
        try:
            for record in records[: max(0, MOST_BYTES - os.fstat(fd).st_size) // RECORD_BYTES]:
                os.write(fd, record)
        finally:
            os.close(fd)


def empty(run_dir: str) -> None:
    """Nothing lives: no record in it is about anybody. An OSError is nobody's trouble: what is left is never matched."""
    try:
        os.truncate(os.path.join(run_dir, NAME), 0)
    except OSError:
        return
