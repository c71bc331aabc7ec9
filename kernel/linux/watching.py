"""Being told when names are taken out of a directory: inotify(7), as one descriptor that becomes readable.

What lives here: the two system calls. What was taken out is for the reader to see with its own eyes: between the event and the look
at it anything may have happened again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from mesocosm.kernel.linux.libc import syscall

_REMOVALS = 0x40 | 0x200 | 0x400 | 0x800  # IN_MOVED_FROM, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF, linux/inotify.h
_ONLYDIR = 0x01000000
_ROOM = 64 * 1024


def watch_removals(directories: Iterable[str]) -> int:
    """A non-blocking descriptor that is readable when something has been removed from one of these, or one itself.

    OSError: EMFILE where this user has as many of these as fs.inotify.max_user_instances allows, ENOENT for an absent directory.
    """
    fd = syscall("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for directory in directories:
            syscall("inotify_add_watch", fd, os.fsencode(directory), _REMOVALS | _ONLYDIR, target=directory)
    except BaseException:
        os.close(fd)
        raise
    return fd


def drain(fd: int) -> None:
    """Takes what has been told: it is readable again with the next removal."""
    try:
        while os.read(fd, _ROOM):
            pass
    except BlockingIOError:
        return
