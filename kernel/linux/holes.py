"""Holes in files: giving the old end of a file back to its file system while the file keeps its length.

What lives here: the two questions and the one call, fallocate(2) with FALLOC_FL_PUNCH_HOLE, lseek(2) with SEEK_DATA. What
must not: what is worth keeping. Theory: bytes are named by their offset, so what cuts a file must not move what is left.
"""

from __future__ import annotations

import errno
import os

from mesocosm.kernel.linux.libc import SyscallError, syscall

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
PAGE = 4096
END = 2**63 - PAGE  # no file is longer


def punch(fd: int, start: int, length: int) -> None:
    """Frees `length` bytes from `start` on; SyscallError EOPNOTSUPP where the file system cannot. Reads as zeros afterwards.

    What lies in a block that is freed only in part becomes zeros without becoming a hole: take whole blocks.
    """
    syscall("fallocate", fd, _PUNCH_HOLE | _KEEP_SIZE, start, length)


def data_from(fd: int, offset: int) -> int | None:
    """Where the first byte at or after `offset` is that is not in a hole; None if there is none up to the end of the file."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno == errno.EINVAL:  # a file system that knows of no holes
            return offset if offset < os.fstat(fd).st_size else None
        raise


def can_punch(directory: str) -> bool:
    """Whether the file system of a directory has holes to punch. Asked of a file without a name, which leaves nothing."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        os.write(fd, bytes(2 * PAGE))
        punch(fd, 0, PAGE)
        return data_from(fd, 0) == PAGE
    except (SyscallError, OSError):
        return False
    finally:
        os.close(fd)
