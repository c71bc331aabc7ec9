"""A disk whose syncs fail, and what is on it after a power cut: a process is traced, its writes and syncs are kept account of.

What lives here: the tracer and its account. What must not: who writes what (test_failed_fsync.py). Theory: what a process has
written is in the page cache, and on the disk once an fsync(2) of that file has returned 0. After one that failed the kernel takes
the pages for clean: what had been written is never written out again, though whoever reads still sees it, and the next fsync
returns 0. A name is on the disk once its directory has been synced; of names nothing is dropped, since a file system's journal
writes them in order or not at all. Bytes are told apart, not pages: harder on who is traced than any kernel.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from mesocosm.kernel.linux.libc import address_of, get_errno, slow

_PTRACE = 101  # x86-64; the requests are those of <linux/ptrace.h>
_SYSCALL, _POKEUSER, _SEIZE, _INTERRUPT, _GET_SYSCALL_INFO = 24, 6, 0x4206, 0x4207, 0x420E
_OPTIONS = 0x1 | 0x100000  # TRACESYSGOOD, EXITKILL
_ORIG_RAX, _RAX = 15 * 8, 10 * 8  # in struct user
_ENTRY, _EXIT = 1, 2
_WRITE, _PWRITE, _FSYNC, _FDATASYNC, _FTRUNCATE = 1, 18, 74, 75, 77
_NAMING = (257, 82, 87, 263, 264)  # openat, rename, unlink, unlinkat, renameat

Image = dict[str, bytes]  # the files of a directory, by name


class _File:
    """What of a file is on the disk, and which bytes of it are not yet."""

    def __init__(self) -> None:
        self.disk = bytearray()
        self.dirty: list[tuple[int, int]] = []


class Disk:
    """One directory. The `at`-th sync in it fails with EIO; with `lies` every one returns 0 and does nothing."""

    def __init__(self, directory: Path, at: int, *, lies: bool = False) -> None:
        self.directory, self.at, self.lies = directory, at, lies
        self.syncs = 0
        self.failed = ""  # the file whose sync did
        self._files: dict[int, _File] = {}  # by inode
        self._names: dict[str, int] = {}  # on the disk: name → inode
        self._ask()

    def _ask(self) -> dict[str, int]:
        """The names that there are now. An inode that has a name for the first time is a new file."""
        found = {each.name: each.stat().st_ino for each in self.directory.iterdir()}
        for inode in set(self._files) - set(found.values()) - set(self._names.values()):
            del self._files[inode]
        for inode in found.values():
            self._files.setdefault(inode, _File())
        return found

    def image(self) -> Image:
        """What is there after a power cut at this moment."""
        return {name: bytes(self._files[inode].disk) for name, inode in self._names.items()}

    def named(self) -> None:
        """Something has been made, renamed or unlinked."""
        self._ask()

    def written(self, inode: int, start: int, length: int) -> None:
        """Into the page cache."""
        if inode in self._files:
            self._files[inode].dirty.append((start, start + length))

    def is_to_fail(self, what: str) -> bool:
        """A sync is about to be made; whether it must not be."""
        self.syncs += 1
        if self.syncs == self.at:
            self.failed = what
            return True
        return False

    def synced(self, path: str, inode: int, *, succeeded: bool) -> None:
        """One has returned."""
        if self.lies:
            return
        if path == str(self.directory):
            self._names = self._ask() if succeeded else self._names
        elif (file := self._files.get(inode)) is not None:
            if succeeded:
                now = Path(path).read_bytes()
                for start, end in file.dirty:
                    if len(file.disk) < end:
                        file.disk.extend(bytes(end - len(file.disk)))
                    file.disk[start:end] = now[start:end].ljust(end - start, b"\0")
                del file.disk[len(now) :]
            file.dirty.clear()


def trace(disk: Disk, child: Callable[[int], None]) -> Iterator[tuple[str, Image]]:
    """Calls `child` with a descriptor in a process of its own. What it writes there, line by line, each with the image of that
    moment. OSError if this machine lets nobody be traced."""
    held, go = os.pipe()
    said, say = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.read(held, 1)
            child(say)
            os._exit(0)
        finally:
            os._exit(1)
    try:
        _ptrace(_SEIZE, pid, 0, _OPTIONS)
        _ptrace(_INTERRUPT, pid)
        os.write(go, b"1")
        yield from _follow(disk, pid, say, said)
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for fd in (held, go, said, say):
            os.close(fd)


def _follow(disk: Disk, pid: int, say: int, said: int) -> Iterator[tuple[str, Image]]:
    info = bytearray(128)
    entered: tuple[int, ...] = ()
    failing = False
    while True:
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            assert status == 0, f"the process that was traced ended with {status}"
            return
        signalled = 0
        if os.WSTOPSIG(status) == signal.SIGTRAP | 0x80:
            _ptrace(_GET_SYSCALL_INFO, pid, len(info), address_of(info))
            if info[0] == _ENTRY:
                entered = struct.unpack_from("=7Q", info, 24)
                number, fd = entered[0], entered[1]
                failing = False
                if number in (_FSYNC, _FDATASYNC) and (path := _path(pid, fd)).startswith(str(disk.directory)):
                    failing = disk.is_to_fail(path)
                    if failing:
                        _ptrace(_POKEUSER, pid, _ORIG_RAX, 2**64 - 1)  # no system call
            elif info[0] == _EXIT and entered:
                number, fd, _, length, offset = entered[:5]
                result = struct.unpack_from("=q", info, 24)[0]
                if failing:
                    _ptrace(_POKEUSER, pid, _RAX, 2**64 - errno.EIO)
                    result = -errno.EIO
                if number in (_FSYNC, _FDATASYNC):
                    disk.synced(_path(pid, fd), _inode(pid, fd), succeeded=result == 0)
                elif number == _PWRITE and result > 0:
                    disk.written(_inode(pid, fd), offset, length)
                elif number in _NAMING and result >= 0:
                    disk.named()
                elif number == _WRITE and fd == say:
                    yield os.read(said, 1 << 20).decode(), disk.image()
                entered, failing = (), False
        elif not status >> 16:
            signalled = os.WSTOPSIG(status)
        _ptrace(_SYSCALL, pid, 0, signalled)


def _path(pid: int, fd: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    return ""


def _inode(pid: int, fd: int) -> int:
    with suppress(OSError):
        return os.stat(f"/proc/{pid}/fd/{fd}").st_ino
    return 0


def _ptrace(request: int, pid: int, where: int = 0, data: int = 0) -> None:
    if slow(_PTRACE, request, pid, where, data if data < 2**63 else data - 2**64, 0, 0) < 0:
        raise OSError(get_errno(), os.strerror(get_errno()), "ptrace")
