"""How a client comes to a launcher: the connection of the one that serves, or of one that is started for it.

What lives here besides: the record of an end off the wire, which those without a client read as well. What must not: requests.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgpack
import trio

from mesocosm.kernel.core.errors import InternalError, from_oserror
from mesocosm.kernel.launcher.contract import Ended
from mesocosm.kernel.launcher.passing import send
from mesocosm.kernel.launcher.protocol import SOCKET
from mesocosm.kernel.launcher.starting import start
from mesocosm.kernel.launcher.viewing import is_confined

_GOING = 0.02  # seconds
START_DEADLINE = 10.0  # an interpreter starts in 30 ms; a machine on its knees takes longer


def connect(run_dir: str) -> socket.socket | None:
    """A connection to the launcher of `run_dir`, None if there is none. Connecting alone disturbs nobody. OSError without a
    directory, or a descriptor."""
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{directory}/{SOCKET}")
        except OSError:
            connection.close()
            return None
    finally:
        os.close(directory)
    return connection


class Renewing(NamedTuple):
    """How a client comes to a connection: the launcher's, found or started, and a nursery for who listens on it."""

    run_dir: str
    walker: str | None
    nursery: trio.Nursery

    async def connection(self) -> socket.socket:
        """Of a launcher that is there; InternalError if none can be started, or does not answer in time, LaunchError if the
        machine is in the way."""
        try:
            with trio.fail_after(START_DEADLINE):
                while True:
                    connection = connect(self.run_dir)
                    if connection is None:
                        await start(self.run_dir, self.walker)
                    elif is_confined() and _is_elsewhere(connection):
                        await _dismiss(connection)
                    else:
                        return connection
        except trio.TooSlowError:
            raise too_slow(self.run_dir) from None
        except OSError as error:
            raise from_oserror(error, syscall=None, doing="finding or starting the launcher of", target=self.run_dir) from error


def _is_elsewhere(connection: socket.socket) -> bool:
    """Whether the launcher is in another user namespace than this process: one that an agent was starting when it was killed, and
    that was not there yet when we made ours."""
    pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    try:
        return not os.path.samestat(os.stat(f"/proc/{pid}/ns/user"), os.stat("/proc/self/ns/user"))
    except PermissionError:  # in ours everything is permitted
        return True
    except OSError:  # it has just gone
        return False


async def _dismiss(connection: socket.socket) -> None:
    """Ends a launcher that has no containers yet, since the agent that wanted it never served: it could not be used from here."""
    with connection, suppress(OSError):
        send(connection, msgpack.packb([0, "stop", {}]))
        await trio.sleep(_GOING)


def too_slow(run_dir: str) -> InternalError:
    """What a launcher that does not answer is."""
    return InternalError(f"the launcher did not answer within {START_DEADLINE:.0f} s", target=f"{run_dir}/launcher.log")


def ended_of(body: Mapping[str, Any]) -> Ended:
    """The record of an end, as `protocol` and `fate` have it."""
    user, system, rss = (int(body[name]) for name in ("user_us", "system_us", "max_rss_kib"))
    status = None if body["status"] is None else int(body["status"])
    return Ended(str(body["id"]), status, user, system, rss, float(body["time"]), body.get("why"))
