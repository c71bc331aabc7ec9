"""An ordinary user's agent makes itself root of a small world first: one user namespace for it, its launcher and all
its containers.

Inside, it has every capability over what it makes there and none over the host; outside, it is still only that
user. Everything behind this module is one code path with root's agent. The map is the one id that needs nobody's
permission, ``0 UID 1``; setgroups is denied for good (user_namespaces(7)).

A launcher that is still there from an earlier agent is joined: its containers can only be reached from its
namespace. Must run before the process has a second thread.
"""

from __future__ import annotations

import os
import socket
import struct

from mesocosm.kernel.core.errors import UnsupportedError
from mesocosm.kernel.launcher.connecting import connect
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import mounts, namespaces


def confine(run_dir: str) -> None:
    """Moves this process into the user namespace of `run_dir`'s launcher, or into a new one, with its own mounts.

    UnsupportedError where the kernel or its policy forbids user namespaces.
    """
    uid, gid = os.geteuid(), os.getegid()
    launcher = connect(run_dir)
    try:
        if launcher is not None:
            pid = struct.unpack("3i", launcher.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            try:
                namespaces.setns(user, c.CLONE_NEWUSER)
            finally:
                os.close(user)
            namespaces.unshare(c.CLONE_NEWNS)
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
