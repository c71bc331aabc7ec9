"""Sending and receiving a message and its descriptors, the latter into a buffer that is there already.

The library's recv_fds makes a buffer of the largest size for each message: 256 KiB that are mapped, touched and
unmapped, which costs more than all else that a notice costs. Its send_fds builds an array even for no descriptor.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence

from mesocosm.kernel.launcher.protocol import MAX_FDS

_WORD = array.array("i").itemsize
_ROOM = socket.CMSG_SPACE(MAX_FDS * _WORD)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)  # a plain number: an enumeration's own `|` takes as long as the call


def send(connection: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """One message with its descriptors, which stay the caller's."""
    if fds:
        connection.sendmsg((data,), ((socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds)),))
    else:
        connection.send(data)


def receive(connection: socket.socket, buffer: bytearray, flags: int = 0) -> tuple[memoryview, list[int], int]:
    """The next message (valid until the next call with this buffer), its descriptors (close-on-exec, the caller's), msg_flags."""
    count, ancillary, seen, _ = connection.recvmsg_into([buffer], _ROOM, flags | _CLOEXEC)
    if not ancillary:
        return memoryview(buffer)[:count], [], seen
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _WORD])
    return memoryview(buffer)[:count], list(fds), seen
