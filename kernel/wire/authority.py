"""Who a peer is, and what it may do. Decisions are pure; only `identify` asks the machine.

Theory: a user id says too little. Root inside a container may be uid 0, or the user's own uid, on the host too,
and what it may do must not depend on that. So a peer is first the *process* that connected: a process inside one of
our containers is that container and never a host user. Only then its uid counts.

The process is held by a pidfd from the socket itself (SO_PEERPIDFD, Linux 6.5), so a number that was given to another
process since cannot mislead us: what /proc says of the number is believed only if the pidfd is still alive *after*
it was read. On older kernels the pidfd is opened from SO_PEERCRED's number at accept; what remains there is a peer
that exits between its connect and our accept, and whose number is given anew in between.

A process that is exiting is nobody: cgroup v1 shows an exiting task in the root cgroup, where a host user would be.

The right stays with the connection: who passes an open connection on has passed on what it could do.

Whatever cannot be found out is an `unknown` peer, which may do nothing.
"""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from mesocosm.kernel.core.errors import DeniedError, SpecError
from mesocosm.kernel.core.names import check_name
from mesocosm.kernel.linux.processes import is_exiting
from mesocosm.kernel.wire.messages import Right

SO_PEERPIDFD = 77  # asm-generic/socket.h; Python's socket module has no name for it
NOBODY = 65534  # what an id that has no mapping here is shown as (/proc/sys/kernel/overflowuid)


class Principal(msgspec.Struct, frozen=True):
    """One peer. `container_id` for kind "container"; `why` says what an unknown one could not show."""

    kind: Literal["host", "container", "unknown"]
    uid: int = NOBODY
    gid: int = NOBODY
    pid: int = 0
    container_id: str | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.kind == "container":
            return f"container {self.container_id} (uid {self.uid}, pid {self.pid})"
        return f"{self.kind} peer with uid {self.uid}, pid {self.pid}" + (f": {self.why}" if self.why else "")


class Access(msgspec.Struct, frozen=True):
    """Which host users may do what: `full` everything, `read` only look. The agent's own user and root are always full."""

    agent: int
    full: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()


def may(principal: Principal, right: Right, access: Access) -> DeniedError | None:
    """None if this peer has this right; else the error to answer with. Total: every combination has an answer."""
    if principal.kind == "container":
        return DeniedError(
            "a container may not use the host's socket",
            id=principal.container_id,
            hint="its rights end at its own subtree, for which it gets a socket of its own (api = true)",
        )
    if principal.kind != "host":
        return DeniedError(f"the caller could not be identified: {principal.why or 'unknown'}")
    if principal.uid in (0, access.agent) or (principal.uid != NOBODY and principal.uid in access.full):
        return None
    if principal.uid != NOBODY and principal.uid in access.read:
        if right == "read":
            return None
        return DeniedError(f"uid {principal.uid} may look but not touch", have="read", need=right)
    return DeniedError(f"uid {principal.uid} may not use this agent", have=f"uid {principal.uid}", need=f"uid {access.agent} or 0")


def container_in(cgroups: str, run_id: str) -> str | None:
    """The container id in the text of a /proc/PID/cgroup, None for a process in no container of this agent.

    The id is read from the parts below ``mesocosm-RUN``, as far as they are names: what a container made below its
    own cgroup is still that container, or something inside it. All hierarchies are asked: one suffices.
    """
    for line in cgroups.splitlines():
        parts = line.split(":", 2)[-1].removesuffix(" (deleted)").split("/")
        if f"mesocosm-{run_id}" not in parts:
            continue
        found: list[str] = []
        for part in parts[parts.index(f"mesocosm-{run_id}") + 1 :]:
            try:
                found.append(check_name(part, "$"))
            except SpecError:
                break
        if found:
            return ".".join(found)
    return None


def is_foreign(status: str) -> bool:
    """Whether the text of a /proc/PID/status is of a process in a PID namespace below the one of /proc.

    Such a process is in *a* container: of ours without cgroups (an agent without delegation), or of somebody else.
    """
    match = re.search(r"^NSpid:\s*(.*)$", status, re.M)
    return match is not None and len(match[1].split()) > 1


def identify(peer: socket.socket, run_id: str, *, proc: Path = Path("/proc")) -> Principal:
    """Who is at the other end of an accepted connection. Never raises: what fails makes the peer `unknown`."""
    try:
        pid, uid, gid = struct.unpack("iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except OSError as error:
        return Principal("unknown", why=f"SO_PEERCRED: {error.strerror}")
    unknown = _unknown(uid, gid, pid)
    if pid <= 0:
        return unknown("its process is outside the agent's PID namespace")
    try:
        pidfd = _pidfd(peer, pid)
    except (OSError, ValueError) as error:
        return unknown(f"no pidfd of it: {error}")
    try:
        cgroups = (proc / str(pid) / "cgroup").read_text(errors="replace")
        status = (proc / str(pid) / "status").read_text(errors="replace")
        exiting = is_exiting((proc / str(pid) / "stat").read_text(errors="replace"))
        if exiting or _has_ended(pidfd):
            return unknown("its process has ended")
    except (OSError, ValueError, IndexError) as error:
        return unknown(f"its process cannot be looked at: {error}")
    finally:
        os.close(pidfd)
    container_id = container_in(cgroups, run_id)
    if container_id is not None:
        return Principal("container", uid, gid, pid, container_id)
    if is_foreign(status):
        return unknown("its process is in a container that is not this agent's, or in no cgroup of this agent")
    return Principal("host", uid, gid, pid)


def _unknown(uid: int, gid: int, pid: int) -> Callable[[str], Principal]:
    return lambda why: Principal("unknown", uid, gid, pid, why=why)


def _pidfd(peer: socket.socket, pid: int) -> int:
    try:
        return peer.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # a kernel before 6.5. Anything else: the process is gone
            raise
    return os.pidfd_open(pid)


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
