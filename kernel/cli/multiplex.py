"""Several streams of the agent at once, and signals between them, without threads.

What lives here: opening streams over as few connections as they need, and handing out their items as they come. What
must not: knowing what an item means.

Theory: the client sorts what it reads to the streams it belongs to, so one connection carries hundreds. We wait for the
connections and for a wake-up pipe that signal handlers write to; whatever wakes us, everything that is there is handed
out before we wait again.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from mesocosm.kernel.client import Client, RemoteError, Stream

PER_CONNECTION = 500  # the agent takes 1024 streams on one
Tag = TypeVar("Tag")


class Item(NamedTuple, Generic[Tag]):
    """Something that a stream said: an item, or with `ended` that there is no more, and the `error` if that is why."""

    tag: Tag
    value: Any
    ended: bool = False
    error: RemoteError | None = None


class Multiplexer(Generic[Tag]):
    """Open streams, by tags of the caller's. `connect` makes another connection when the last one is full."""

    def __init__(self, connect: Callable[[], Client], first: Client) -> None:
        self._connect = connect
        self._clients = [first]
        self._room = PER_CONNECTION
        self._streams: dict[Tag, Stream] = {}

    def __contains__(self, tag: Tag) -> bool:
        return tag in self._streams

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, tag: Tag, method: str, **params: Any) -> None:
        """Opens a stream; RemoteError if it is refused at once."""
        if self._room == 0:
            self._clients.append(self._connect())
            self._room = PER_CONNECTION
        self._room -= 1
        self._streams[tag] = self._clients[-1].stream(method, **params)

    def take(self) -> Iterator[Item[Tag]]:
        """Everything that has come, without waiting. A stream that ended or broke is told once and forgotten."""
        for tag, stream in list(self._streams.items()):
            while True:
                try:
                    yield Item(tag, stream.next(timeout=0))
                except TimeoutError:
                    break
                except StopIteration:
                    del self._streams[tag]
                    yield Item(tag, None, ended=True)
                    break
                except RemoteError as error:
                    del self._streams[tag]
                    yield Item(tag, None, ended=True, error=error)
                    break

    def wait(self, seconds: float | None, wakeup: int | None = None) -> None:
        """Until something has come, or `wakeup` is readable, or `seconds` are over."""
        if any(stream.is_ready for stream in self._streams.values()):
            return  # read along with an answer: when another stream was opened, or was opened again with the next agent
        poll = select.poll()
        by_fd = {client.fileno(): client for client in self._clients}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        if wakeup is not None:
            poll.register(wakeup, select.POLLIN)
        for fd, _ in poll.poll(None if seconds is None else max(0, round(seconds * 1000))):
            if fd in by_fd:
                by_fd[fd].receive()

    def close(self) -> None:
        """Closes the connections."""
        self._streams.clear()
        for client in self._clients:
            client.close()


class Signals:
    """SIGINT, SIGTERM and SIGHUP as numbers in a list instead of exceptions, as long as the `with` lasts."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, Any] = {}
        self.fd = -1
        self._write = -1

    def __enter__(self) -> Self:
        self.fd, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in self.NUMBERS:
            # nohup: a hang-up that is ignored stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._write)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, b"!")

    def clear(self) -> None:
        """Empties the wake-up pipe."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.fd, 512):
                pass


def remaining(deadline: float | None) -> float | None:
    """Seconds until a monotonic deadline, None for none."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
