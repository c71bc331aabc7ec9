"""The load: many clients of one agent that each launch, wait and remove, one container after the other.

All of them are connections of one process, which does nothing but pass frames (contrib/manual/wire.md): what is to be
measured is the agent, and every microsecond that its clients take is missing from it, since they share its processors.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack

_SIZE = 4  # bytes of a frame's length
_READ = 1 << 16


class _Client:
    """One connection, and what it is doing."""

    def __init__(self, path: str, names: Iterator[str], task: Mapping[str, Any]) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self._names = names
        self._task = task
        self._buffer = b""
        self._steps: Iterator[tuple[str, dict[str, Any]]] = iter(())
        self._last = ""

    def go_on(self) -> bool:
        """Sends the next request; False if there is nothing left to launch."""
        step = next(self._steps, None)
        if step is None:
            name = next(self._names, None)
            if name is None:
                return False
            self._steps = _steps(name, self._task)
            step = next(self._steps)
        self._last, params = step
        body = msgpack.packb([0, 1, self._last, [params]])
        self.socket.send(len(body).to_bytes(_SIZE, "big") + body)
        return True

    def is_answered(self) -> bool:
        """Reads; whether the whole answer is there. SystemExit if it is an error, or the container ended badly."""
        data = self.socket.recv(_READ)
        if not data:
            raise SystemExit("the agent closed the connection")
        self._buffer += data
        if len(self._buffer) < _SIZE + int.from_bytes(self._buffer[:_SIZE], "big"):
            return False
        _, _, error, result = msgpack.unpackb(self._buffer[_SIZE:])
        self._buffer = b""
        if error is not None or (self._last == "WAIT_CONTAINER" and result["exit"] != 0):
            raise SystemExit(f"{self._last} was answered {error or result}")
        return True


def _steps(name: str, task: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "LAUNCH_GROUP", {"group": {"name": name, "executor": "command", "tasks": [task]}}
    yield "WAIT_CONTAINER", {"container_id": name}
    yield "REMOVE_CONTAINER", {"container_id": name}


def run(path: str, task: Mapping[str, Any], names: Iterator[str], clients: int) -> float:
    """Milliseconds for `clients` connections to the socket `path` to launch `task` once under each of `names`."""
    with contextlib.ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        living = {}
        for _ in range(clients):
            client = _Client(path, names, task)
            stack.enter_context(client.socket)
            living[client.socket.fileno()] = client
            poll.register(client.socket, select.EPOLLIN)
        began = time.perf_counter()
        for fd in [fd for fd, client in living.items() if not client.go_on()]:
            del living[fd]
        while living:
            for fd, _ in poll.poll():
                if living[fd].is_answered() and not living[fd].go_on():
                    del living[fd]
        return (time.perf_counter() - began) * 1000
