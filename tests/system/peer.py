"""A client of the tests' own: says whatever bytes it likes, and reads what it is told. Of the product it knows nothing."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

PATIENCE = 60.0  # seconds for an answer that takes a hundredth of one


def frame(message: Any) -> bytes:
    """A message as it goes over the wire."""
    body = msgpack.packb(message)
    return struct.pack(">I", len(body)) + bytes(body)


class Peer:
    """One connection to an agent's socket: to a path, or one that is there."""

    def __init__(self, to: Path | socket.socket) -> None:
        if isinstance(to, socket.socket):
            self.sock = to
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # Waits its turn where many wait to be taken; with a timeout of Python's, connect(2) would fail at once.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(PATIENCE), 0))
            try:
                self.sock.connect(str(to))
            except OSError:
                self.sock.close()
                raise
        self.sock.settimeout(PATIENCE)
        self._held = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.sock.close()

    def send(self, *messages: Any) -> None:
        """Messages, one frame each."""
        self.sock.sendall(b"".join(frame(message) for message in messages))

    def receive(self) -> Any:
        """The next message; None at the end of the connection."""
        while len(self._held) < 4 or len(self._held) < 4 + int.from_bytes(self._held[:4], "big"):
            try:
                data = self.sock.recv(65536)
            except ConnectionResetError:  # closed with something of ours unread
                return None
            if not data:
                return None
            self._held += data
        end = 4 + int.from_bytes(self._held[:4], "big")
        body, self._held = self._held[4:end], self._held[end:]
        return msgpack.unpackb(body)

    def told(self) -> list[Any]:
        """Every message until the agent closes the connection."""
        messages = []
        while (message := self.receive()) is not None:
            messages.append(message)
        return messages

    def ask(self, method: str, /, number: int = 1, **params: Any) -> Any:
        """One request; its answer, with items of streams and other answers that come before it left out."""
        self.send([0, number, method, [params]])
        while True:
            message = self.receive()
            assert message is not None, "the agent has closed the connection"
            if message[0] == 1 and message[1] == number:
                return message

    def refused(self, method: str, /, **params: Any) -> dict[str, Any]:
        """The error that a request is answered with."""
        answer = self.ask(method, **params)
        assert answer[3] is None, answer
        error: dict[str, Any] = answer[2]
        return error
