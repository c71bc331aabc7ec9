"""The launcher's line to the agent: one connection at a time, and nothing said on it ever blocks.

What must not be here: what the messages mean.

Theory: the launcher is the parent that reaps everything, so it may wait for nobody, least of all for an agent that
has been stopped or is busy. What the socket does not take at once is queued here; an agent that leaves too much
unread is hung up on, and finds all it has missed in the inventory when it comes back.

A new connection counts from its first message on; only then does it replace the old one. So whoever connects just
to look (is there a launcher, and which process is it?) disturbs nobody.
"""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack

from mesocosm.kernel.launcher.passing import receive, send
from mesocosm.kernel.launcher.protocol import MAX_MESSAGE

_DONTWAIT = int(socket.MSG_DONTWAIT)
_MAX_UNREAD = 8 * 1024 * 1024  # bytes


class Heard(NamedTuple):
    """A message and its descriptors, which are the caller's; `cut` if not all of them fitted into this process."""

    data: memoryview
    fds: list[int]
    cut: bool


class Line:
    """The listener, those who have connected, and the one of them that is the agent."""

    def __init__(self, listener: socket.socket, poll: select.epoll, on_change: Callable[[], None]) -> None:
        self._listener = listener
        self._poll = poll
        self._on_change = on_change
        self._agent: socket.socket | None = None
        self._buffer = bytearray(MAX_MESSAGE * 2)
        self._newcomers: dict[int, socket.socket] = {}
        self._unread = 0  # bytes in `unsent`
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        poll.register(listener, select.EPOLLIN)

    @property
    def has_agent(self) -> bool:
        """Whether there is somebody who has said something, and has not hung up."""
        return self._agent is not None

    @property
    def is_behind(self) -> bool:
        """Whether the agent has not taken all that was said to it."""
        return bool(self._unsent)

    @property
    def is_connected(self) -> bool:
        """Whether there is an agent, or somebody who may become it."""
        return self._agent is not None or bool(self._newcomers)

    def owns(self, fd: int) -> bool:
        """Whether an event on `fd` is for `turn`."""
        return fd == self._listener.fileno() or fd in self._newcomers or (self._agent is not None and fd == self._agent.fileno())

    def turn(self, fd: int, events: int) -> Heard | None:
        """Deals with an event; what the agent said, if it said something."""
        if fd == self._listener.fileno():
            self._accept()
            return None
        if fd in self._newcomers and not self._promote(fd):
            return None
        if events & select.EPOLLOUT:
            self._flush()
        if self._agent is None or not events & ~select.EPOLLOUT:
            return None
        try:
            data, fds, flags = receive(self._agent, self._buffer, _DONTWAIT)
        except BlockingIOError:  # an event older than this connection
            return None
        except OSError:
            self._hang_up()
            return None
        if not data:
            self._hang_up()
            return None
        return Heard(data, fds, bool(flags & socket.MSG_CTRUNC))

    def send(self, message: list[Any], fds: list[int] | None = None) -> None:
        """Says something, now or when the agent reads again. The descriptors stay the caller's."""
        if self._agent is None:
            return
        data = msgpack.packb(message)
        if not self._unsent:
            try:
                send(self._agent, data, fds or ())
                return
            except BlockingIOError:
                self._poll.modify(self._agent, select.EPOLLIN | select.EPOLLOUT)
            except OSError:
                self._hang_up()
                return
        self._unread += len(data)
        if self._unread > _MAX_UNREAD:
            self._hang_up()
            return
        # Copies: what they are of may be closed, and its number another's, before they are sent.
        self._unsent.append((data, [os.dup(fd) for fd in fds or ()]))

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone again; or no descriptor left, which must not end the parent of everything
            return
        connection.setblocking(False)  # noqa: FBT003 - once, not by a flag of each call
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._newcomers[connection.fileno()] = connection
        self._poll.register(connection, select.EPOLLIN)

    def _promote(self, fd: int) -> bool:
        connection = self._newcomers[fd]
        try:
            speaks = bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except OSError:
            speaks = False
        del self._newcomers[fd]
        if not speaks:
            self._poll.unregister(connection)
            connection.close()
            return False
        self._hang_up()
        self._agent = connection
        return True

    def _flush(self) -> None:
        while self._unsent and self._agent is not None:
            data, fds = self._unsent[0]
            try:
                send(self._agent, data, fds)
            except BlockingIOError:
                return
            except OSError:
                self._hang_up()
                return
            self._unsent.popleft()
            self._unread -= len(data)
            for fd in fds:
                os.close(fd)
        if self._agent is not None:
            self._poll.modify(self._agent, select.EPOLLIN)

    def _hang_up(self) -> None:
        if self._agent is None:
            return
        self._poll.unregister(self._agent)
        self._agent.close()
        self._agent = None
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        self._unread = 0
        self._on_change()
