"""Opening paths so that nobody can lead us astray: openat2(2).

Inside anything a container may have written, a path is resolved against a directory fd with IN_ROOT (absolute
links stay inside) and without magic links; our own state directories are walked without any link.
"""

from __future__ import annotations

import errno
import os
import struct

from mesocosm.kernel.linux import libc
from mesocosm.kernel.linux.constants import AT_FDCWD, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS

INSIDE = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
NO_LINKS = RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
_OPEN_HOW = struct.Struct("QQQ")
_TRIES = 1000  # two microseconds each


def openat2(dirfd: int, path: str, flags: int, resolve: int, mode: int = 0) -> int:
    """A descriptor for `path` below `dirfd` (close-on-exec always); OSError names the path. openat2(2), Linux 5.6.

    EAGAIN after many tries: with IN_ROOT a ".." on the way is refused whenever anything at all on the machine is being
    renamed or mounted in that moment, lest it lead outside.
    """
    how = _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, resolve)
    for _ in range(_TRIES):
        try:
            return libc.openat2(dirfd, path, how)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
    return libc.openat2(dirfd, path, how)


def open_inside(root: int, path: str, flags: int) -> int:
    """`path` as a process whose root is the directory fd `root` would open it."""
    return openat2(root, path, flags, INSIDE)


def open_own(path: str, flags: int, mode: int = 0) -> int:
    """An absolute path of ours, in which no component may be a symbolic link."""
    return openat2(AT_FDCWD, path, flags, NO_LINKS, mode)
