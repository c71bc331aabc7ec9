"""Receiving a message and its descriptors into a buffer that is there already.

The library's recv_fds makes a buffer of the largest size for each message: 256 KiB that are mapped, touched and
unmapped, which costs more than all else that a notice costs.
"""

from __future__ import annotations

import array
import socket

from mesocosm.kernel.launcher.protocol import MAX_FDS

_WORD = array.array("i").itemsize
_ROOM = socket.CMSG_SPACE(MAX_FDS * _WORD)


def receive(connection: socket.socket, buffer: bytearray, flags: int = 0) -> tuple[memoryview, list[int], int]:
    """The next message (valid until the next call with this buffer), its descriptors (close-on-exec, the caller's), msg_flags."""
    count, ancillary, seen, _ = connection.recvmsg_into([buffer], _ROOM, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _WORD])
    return memoryview(buffer)[:count], list(fds), seen
