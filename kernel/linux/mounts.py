"""Mounts, by file descriptor: the calls of the new mount API and the two old ones that are still needed.

A mount is made or cloned *detached* (nobody can see it, it vanishes with its descriptor), given its attributes
while it is still detached, and attached last. So there is never a moment in which it is visible but writable.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping, Sequence

from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux.libc import syscall

_ATTR = struct.Struct("QQQQ")


def open_tree(path: str, *, recursive: bool = False, dirfd: int = c.AT_FDCWD) -> int:
    """A detached, private clone of the mount at `path` (with the mounts below it if `recursive`). open_tree(2), Linux 5.2."""
    flags = c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC | (c.AT_RECURSIVE if recursive else 0)
    fd = syscall("open_tree", dirfd, os.fsencode(path), flags | (c.AT_EMPTY_PATH if not path else 0), target=path)
    try:
        # The clone of a shared mount is its peer: what either side mounts below it later would appear on the other.
        mount_setattr(fd, propagation=c.MS_PRIVATE, recursive=recursive)
    except BaseException:
        os.close(fd)
        raise
    return fd


def move_mount(fd: int, target: str, dirfd: int = c.AT_FDCWD) -> None:
    """Attaches a detached mount at `target`. move_mount(2), Linux 5.2."""
    flags = c.MOVE_MOUNT_F_EMPTY_PATH | (0 if target else c.MOVE_MOUNT_T_EMPTY_PATH)
    syscall("move_mount", fd, b"", dirfd, os.fsencode(target), flags, target=target)


def mount_setattr(fd: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, recursive: bool = True, userns: int = 0) -> None:
    """Changes the attributes of the mount `fd`, and of all below it if `recursive`. mount_setattr(2), Linux 5.12."""
    attributes = ctypes.create_string_buffer(_ATTR.pack(set_, clear, propagation, userns), _ATTR.size)
    syscall("mount_setattr", fd, b"", c.AT_EMPTY_PATH | (c.AT_RECURSIVE if recursive else 0), attributes, _ATTR.size)


def fsmount(kind: str, options: Mapping[str, str | int] | Sequence[tuple[str, str | int]] = (), attributes: int = 0) -> int:
    """A new detached file system of `kind`. An option's value is text, or an int that is a descriptor (FSCONFIG_SET_FD)."""
    context = syscall("fsopen", kind.encode(), c.FSOPEN_CLOEXEC, target=kind)
    try:
        for key, value in options.items() if isinstance(options, Mapping) else options:
            if isinstance(value, int):
                syscall("fsconfig", context, c.FSCONFIG_SET_FD, key.encode(), None, value, target=f"{kind}: {key}")
            else:
                target = f"{kind}: {key}={value}"
                syscall("fsconfig", context, c.FSCONFIG_SET_STRING, key.encode(), value.encode(), 0, target=target)
        syscall("fsconfig", context, c.FSCONFIG_CMD_CREATE, None, None, 0, target=kind)
        return syscall("fsmount", context, c.FSMOUNT_CLOEXEC, attributes, target=kind)
    finally:
        os.close(context)


def make_private(path: str = "/") -> None:
    """No mount below `path` passes anything on to, or takes anything from, another namespace. mount(2)."""
    _propagate(path, c.MS_REC_PRIVATE)


def make_slave(path: str = "/") -> None:
    """Mounts made on the host later become visible below `path`, but none of ours is seen there. mount(2)."""
    _propagate(path, c.MS_REC_SLAVE)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    syscall("pivot_root", os.fsencode(new), os.fsencode(old), target=new)


def umount(path: str, flags: int = c.MNT_DETACH | c.UMOUNT_NOFOLLOW) -> None:
    """umount2(2); by default lazily, and never through a symbolic link."""
    syscall("umount2", os.fsencode(path), flags, target=path)


def _propagate(path: str, flags: int) -> None:
    syscall("mount", None, os.fsencode(path), None, flags, None, target=path)


def main(path: str, *, recursive: bool) -> None:
    """``python -m mesocosm.kernel.linux.mounts PATH 0|1``: sends a clone of what is at a path to whoever is at standard input.

    For a path on a file system that may not answer. Prints "dir" or "file", or ``errno NUMBER WORDS``.
    """
    import socket
    import stat

    try:
        fd = open_tree(path, recursive=recursive)
        kind = "dir" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
        with socket.socket(fileno=os.dup(0)) as line:
            socket.send_fds(line, [b"tree"], [fd])
        print(kind)
    except OSError as error:
        print(f"errno {error.errno or 0} {error.strerror or error}")


if __name__ == "__main__":
    import sys

    main(sys.argv[1], recursive=sys.argv[2] == "1")
