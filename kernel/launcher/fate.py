"""How a process ended that was somebody else's child: what a launcher, or an agent without one, can find out.

Two know: the keeper or launcher that reaped it (RUN_DIR/reaped: exact, with what it used), and the kernel, if somebody holds
its pidfd (PIDFD_GET_INFO, Linux 6.15: the status alone). Both do so only once it has been reaped, so they are asked until
they know, or until nobody can be expected to any more; then the end is unknown, and why is said.
"""

from __future__ import annotations

import time
from typing import Any

from mesocosm.kernel.launcher.reaped import Reaped
from mesocosm.kernel.linux.pidfds import exit_status, is_reaped

AGAIN = 0.01  # seconds until it is worth asking again
_WRITTEN = 0.05  # seconds a keeper is given from reaping to writing before what the kernel knows is enough
_NOBODY = 1.0  # seconds after which nobody will write it down any more
_UNCOLLECTED = 5.0  # seconds somebody may take to reap a child

UNSEEN = "no record of its end was left: agent, launcher and keeper were killed, or could not write it down, before it was told"
_LOST = "its launcher or keeper was killed before it told, and this kernel does not keep how it ended (PIDFD_GET_INFO, Linux 6.15)"
_UNREAPED = "its launcher and its keeper were killed, and whoever is its parent now has not collected how it ended"


def inquire(container_id: str, pidfd: int, pid: int, birth: str, reaped: Reaped, waited: float) -> dict[str, Any] | None:
    """The exit record of a process that ended `waited` seconds ago, as the launcher tells it; None: ask again soon."""
    if (found := recorded(container_id, pid, birth, reaped)) is not None:
        return found
    if not is_reaped(pidfd):
        return None if waited < _UNCOLLECTED else unknown(container_id, _UNREAPED)
    if waited < _WRITTEN:
        return None
    if (status := exit_status(pidfd)) is not None:
        return _ended(container_id, status)
    return None if waited < _NOBODY else unknown(container_id, _LOST)


def recorded(container_id: str, pid: int, birth: str, reaped: Reaped) -> dict[str, Any] | None:
    """The same as a keeper has written it down, if one has."""
    found = reaped.find(pid, birth)
    if found is None:
        return None
    return {
        **_ended(container_id, found.status),
        "user_us": found.user_us, "system_us": found.system_us, "max_rss_kib": found.max_rss_kib, "time": found.time,
    }  # fmt: skip


def unknown(container_id: str, why: str) -> dict[str, Any]:
    """The record of an end that nobody can tell anything about."""
    return {**_ended(container_id, None), "why": why}


def _ended(container_id: str, status: int | None) -> dict[str, Any]:
    return {"id": container_id, "status": status, "user_us": 0, "system_us": 0, "max_rss_kib": 0, "time": time.time()}
