"""An ordinary user's agent makes itself root of a small world first: one user namespace for it, its launcher and all
its containers.

Inside, it has every capability over what it makes there and none over the host; outside, it is still only that
user. Everything behind this module is one code path with root's agent. The map is the one id that needs nobody's
permission, ``0 UID 1``; setgroups is denied for good (user_namespaces(7)).

A launcher that is still there from an earlier agent is joined: its containers can only be reached from its
namespace. If it was killed, that namespace is found through a container that still lives.
Must run before the process has a second thread.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable

from mesocosm.kernel.core.errors import UnsupportedError
from mesocosm.kernel.launcher.connecting import connect
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import mounts, namespaces
from mesocosm.kernel.linux.pidfds import is_reaped, reopen

_NS_GET_PARENT = 0xB702  # linux/nsfs.h


def confine(run_dir: str, living: Iterable[tuple[int, str]] = ()) -> None:
    """Moves this process into the user namespace of `run_dir`'s launcher, or into a new one, with its own mounts.

    `living`: (pid, identity) of processes that an earlier launcher has left, if any of them is still there.
    UnsupportedError where the kernel or its policy forbids user namespaces.
    """
    uid, gid = os.geteuid(), os.getegid()
    launcher = connect(run_dir)
    try:
        if launcher is not None:
            pid = struct.unpack("3i", launcher.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            _join(os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC))
        elif (world := _world_of(living)) is not None:
            _join(world)
        else:
            namespaces.unshare(c.CLONE_NEWUSER | c.CLONE_NEWNS)
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
    except OSError as error:
        raise UnsupportedError(
            f"this user may not make a user namespace: {error.strerror}",
            syscall="unshare",
            hint="user.max_user_namespaces, kernel.unprivileged_userns_clone or an AppArmor policy forbids it; see meso doctor",
        ) from error
    finally:
        if launcher is not None:
            launcher.close()
    mounts.make_slave("/")


def _join(user: int) -> None:
    try:
        namespaces.setns(user, c.CLONE_NEWUSER)
    finally:
        os.close(user)
    namespaces.unshare(c.CLONE_NEWNS)


def _world_of(living: Iterable[tuple[int, str]]) -> int | None:
    """A descriptor of the user namespace below ours that one of these processes is in, or above it. ioctl_ns(2)."""
    ours = os.stat("/proc/self/ns/user")
    for pid, birth in living:
        pidfd = reopen(pid, birth)
        if pidfd is None:
            continue
        found = -1
        try:
            found = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            while not is_reaped(pidfd):  # else that was somebody else's
                above = fcntl.ioctl(found, _NS_GET_PARENT)
                is_ours = os.path.samestat(os.fstat(above), ours)
                if is_ours:
                    os.close(above)
                    return found
                os.close(found)
                found = above
        except OSError:  # it has gone meanwhile, or is in none below ours
            pass
        finally:
            os.close(pidfd)
        if found >= 0:
            os.close(found)
    return None
