"""The client for trio programs: many calls and streams beside each other on one connection.

    async with mesocosm.kernel.client.open() as client:
        async for line in client.stream("SUBSCRIBE_EVENTS", since=0): ...

Same protocol and same errors as the synchronous client, which also finds and checks the socket. Cancelling a wait or
leaving a stream tells the agent so; cancelling a call that changes something does not undo it.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from os import PathLike
from typing import Any

import msgpack
import trio

from mesocosm.kernel.client import RemoteError, dial
from mesocosm.kernel.core.errors import FrameError, InternalError
from mesocosm.kernel.wire import framing
from mesocosm.kernel.wire.outbox import Outbox

_READ = 256 * 1024
_QUEUE = 1024 * 1024
_PATIENCE = 120.0
_UNREAD = 64 * 1024 * 1024  # bytes of one stream that its reader may leave here; calls must not wait for a slow reader


@asynccontextmanager
async def open_client(path: str | PathLike[str] | None = None) -> AsyncIterator[TrioClient]:
    """A connection for the length of a block. RemoteError `agent_gone` or `denied` as `mesocosm.kernel.client.connect`."""
    raw = await trio.to_thread.run_sync(dial, path, 30.0)
    failure: Exception | None = None
    with socket.socket(fileno=raw.detach()) as sock:
        sock.settimeout(0)
        client = TrioClient(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client._outbox.run)
            nursery.start_soon(client._read)
            try:
                yield client
            except Exception as error:  # kept out of the nursery, which would wrap it in a group
                failure = error
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Channel:
    """What arrived for one request or stream and was not taken yet; `gone` when no more will."""

    def __init__(self) -> None:
        self.held: deque[tuple[int, Any]] = deque()
        self.bytes = 0
        self.gone: RemoteError | None = None
        self._lot = trio.lowlevel.ParkingLot()

    def put(self, length: int, value: Any) -> None:
        self.held.append((length, value))
        self.bytes += length
        self._lot.unpark()

    def fail(self, error: RemoteError) -> None:
        self.gone = self.gone or error
        self._lot.unpark_all()

    async def get(self) -> tuple[int, Any]:
        while not self.held:
            if self.gone is not None:
                raise self.gone
            await self._lot.park()
        length, value = self.held.popleft()
        self.bytes -= length
        return length, value


class TrioClient:
    """One connection, for any number of tasks. Made by `open_client`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._outbox = Outbox(sock, bound=_QUEUE, patience=_PATIENCE)
        self._last = 0
        self._answers: dict[int, _Channel] = {}
        self._streams: dict[int, _Channel] = {}
        self._gone: RemoteError | None = None

    async def call(self, method: str, /, **params: Any) -> Any:
        """One request and its result; RemoteError with the agent's error object. Waits as long as it takes."""
        async with self._request(method, params) as (_, result):
            if isinstance(result, dict) and "$stream" in result:
                async with aclosing(self._items(result["$stream"])) as items:
                    [whole] = [item async for item in items]
                return whole
            return result

    async def stream(self, method: str, /, **params: Any) -> AsyncGenerator[Any, None]:
        """The items of a stream, up to its checked end. Close it (`contextlib.aclosing`) to leave early."""
        async with self._request(method, params) as (number, opened):
            ended = False
            try:
                async with aclosing(self._items(opened["stream"])) as items:
                    async for item in items:
                        yield item
                ended = True
            finally:
                if not ended:
                    self._cancel(number)

    @asynccontextmanager
    async def _request(self, method: str, params: dict[str, Any]) -> AsyncIterator[tuple[int, Any]]:
        if self._gone is not None:
            raise self._gone
        self._last += 1
        number = self._last
        try:
            body = framing.pack([0, number, method, [params]])
        except InternalError as error:
            raise RemoteError({"code": "bad_input", "message": error.message}) from None
        if len(body) > framing.MAX_FRAME:
            raise RemoteError({"code": "too_large", "message": "the request is too long", "have": str(len(body))})
        channel = self._answers[number] = _Channel()
        answered = False
        try:
            try:
                await self._outbox.send(body)
            except trio.BrokenResourceError:
                await channel.get()  # the reader will say why
            _, (error_object, result) = await channel.get()
            answered = True
        finally:
            del self._answers[number]
            if not answered:
                self._cancel(number)
        if error_object is not None:
            raise RemoteError(error_object)
        yield number, result

    async def _items(self, stream: int) -> AsyncGenerator[Any, None]:
        """The items of a stream whose beginning has been announced; RemoteError if it was cut."""
        channel = self._streams[stream]
        seq = total = 0
        parts: list[bytes] = []
        try:
            while True:
                length, fields = await channel.get()
                if fields.get("seq") != seq:
                    raise _cut(f"number {seq}", f"number {fields.get('seq')}")
                if fields.get("end"):
                    if fields.get("error"):
                        raise RemoteError(fields["error"])
                    if parts or fields.get("bytes") != total:
                        raise _cut(f"{fields.get('bytes')} bytes", f"{total} bytes")
                    return
                seq += 1
                total += length
                if "part" not in fields:
                    yield fields.get("item")
                    continue
                parts.append(fields["part"])
                if fields.get("last"):
                    whole, parts = msgpack.unpackb(b"".join(parts)), []
                    yield whole
        finally:
            self._streams.pop(stream, None)

    def _cancel(self, number: int) -> None:
        self._outbox.put(framing.pack([2, "CANCEL", [{"id": number}]]))

    async def _read(self) -> None:
        frames = framing.Frames()
        try:
            while True:
                while (body := frames.take()) is not None:
                    self._sort(msgpack.unpackb(body), len(body))
                try:
                    data = self._sock.recv(_READ)
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self._sock)
                    continue
                if not data:
                    break
                frames.feed(data)
            self._fail({"code": "agent_gone", "message": "the agent closed the connection"})
        except OSError as error:
            self._fail({"code": "agent_gone", "message": f"the connection to the agent broke: {error.strerror}"})
        except (FrameError, ValueError) as error:
            self._fail({"code": "bad_frame", "message": f"what answers there is not an agent of ours: {error}"})

    def _sort(self, message: Any, length: int) -> None:
        match message:
            case [1, None, dict(error), _]:
                self._fail(error)
            case [1, int(number), error, result] if number in self._answers:
                if isinstance(result, dict) and isinstance(opened := result.get("stream", result.get("$stream")), int):
                    self._streams[opened] = _Channel()
                self._answers[number].put(0, (error, result))
            case [2, "STREAM", [{"stream": int(stream)} as fields]] if stream in self._streams:
                channel = self._streams[stream]
                channel.put(length, fields)
                if channel.bytes > _UNREAD:
                    del self._streams[stream]
                    message = "lagged: this program left too much of the stream unread"
                    channel.fail(RemoteError({"code": "timeout", "message": message, "need": f"≤ {_UNREAD} bytes"}))

    def _fail(self, error: dict[str, Any]) -> None:
        self._gone = self._gone or RemoteError(error)
        for channel in (*self._answers.values(), *self._streams.values()):
            channel.fail(self._gone)


def _cut(need: str, have: str) -> RemoteError:
    return RemoteError({"code": "agent_gone", "message": "the stream was cut", "have": have, "need": need})
