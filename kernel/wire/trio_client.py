"""The client for trio programs: many calls and streams beside each other on one connection.

    async with mesocosm.kernel.client.open() as client:
        async for line in client.stream("SUBSCRIBE_EVENTS", since=0): ...

Same protocol and same errors as the synchronous client, which also finds and checks the socket. Cancelling a wait or
leaving a stream tells the agent so; cancelling a call that changes something does not undo it. When the agent is gone, the
client goes on with the next one by itself; see `mesocosm.kernel.resuming`.
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

from mesocosm.kernel.client import RECONNECT, RemoteError, dial
from mesocosm.kernel.core.errors import FrameError, InternalError
from mesocosm.kernel.resuming import RESUMED, find_out
from mesocosm.kernel.wire import framing
from mesocosm.kernel.wire.outbox import Outbox

_READ = 256 * 1024
_QUEUE = 1024 * 1024
_PATIENCE = 120.0
_DIAL = 30.0
_PAUSE = 0.05  # seconds between two attempts to find the next agent
_UNREAD = 64 * 1024 * 1024  # bytes of one stream that its reader may leave here; calls must not wait for a slow reader


@asynccontextmanager
async def open_client(path: str | PathLike[str] | None = None, *, reconnect: float = RECONNECT) -> AsyncIterator[TrioClient]:
    """A client for the length of a block. RemoteError `agent_gone` or `denied` as `mesocosm.kernel.client.connect`, and
    `reconnect` as there: how many seconds to look for the next agent when this one is gone."""
    failure: Exception | None = None
    raw = await trio.to_thread.run_sync(dial, path, _DIAL)
    async with trio.open_nursery() as nursery:
        client = TrioClient(nursery, raw, path, reconnect)
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
    """One agent, and the one that comes after it, for any number of tasks. Made by `open_client`."""

    def __init__(self, nursery: trio.Nursery, raw: Any, path: str | PathLike[str] | None, reconnect: float) -> None:
        self._nursery = nursery
        self._path = path
        self._reconnect = reconnect
        self._renewing = trio.Lock()
        self._lost_at: float | None = None  # since then nobody has answered
        self._begin(raw)

    def _begin(self, raw: Any) -> None:
        self._line = _Line(socket.socket(fileno=raw.detach()))
        self._nursery.start_soon(self._line.run)

    async def call(self, method: str, /, **params: Any) -> Any:
        """One request and its result; RemoteError with the agent's error object. Waits as long as it takes. `unknown_outcome`
        where the agent ended before it answered and it cannot be found out whether it did what it was asked."""
        line = await self._current()
        try:
            return await line.call(method, params)
        except RemoteError as error:
            if error is not line.gone or method == "STOP_AGENT" or not await self._renewed(line):
                raise
            steps = find_out(method, params, error)
        try:
            asked, params = next(steps)
            while True:
                try:
                    result = await self.call(asked, **params)
                except RemoteError as error:
                    asked, params = steps.throw(error)
                else:
                    asked, params = steps.send(result)
        except StopIteration as end:
            return end.value

    async def stream(self, method: str, /, **params: Any) -> AsyncGenerator[Any, None]:
        """The items of a stream, up to its checked end. Close it (`contextlib.aclosing`) to leave early. Events and logs go on
        over the next agent, after the last item that was seen."""
        after = RESUMED.get(method) if self._reconnect else None
        while True:
            line = await self._current()
            try:
                async with aclosing(line.stream(method, params)) as items:
                    async for item in items:
                        if after is not None:
                            params = after(params, item)
                        yield item
                return
            except RemoteError as error:
                if error is not line.gone or after is None or not await self._renewed(line):
                    raise

    async def _current(self) -> _Line:
        """The connection; another one where it is gone already, since nothing has been asked over it."""
        line = self._line
        if line.gone is not None:
            await self._renewed(line)
        return self._line

    async def _renewed(self, line: _Line) -> bool:
        """Whether there is another connection in the place of this one, which is gone."""
        if not self._reconnect or line.gone is None or line.gone.code != "agent_gone":
            return False
        async with self._renewing:
            if line is not self._line:
                return True  # another task was quicker
            if line.is_answered or self._lost_at is None:
                self._lost_at = trio.current_time()
            while trio.current_time() - self._lost_at <= self._reconnect:
                try:
                    self._begin(await trio.to_thread.run_sync(dial, self._path, _DIAL))
                except RemoteError as error:
                    if error.code != "agent_gone":
                        raise
                    await trio.sleep(_PAUSE)
                else:
                    return True
        return False


class _Line:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(0)
        self._outbox = Outbox(sock, bound=_QUEUE, patience=_PATIENCE)
        self._last = 0
        self._answers: dict[int, _Channel] = {}
        self._streams: dict[int, _Channel] = {}
        self.gone: RemoteError | None = None
        self.is_answered = False  # whether anything ever came

    async def run(self) -> None:
        """Until it is cut."""
        with self._sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._outbox.run)
                await self._read()
                nursery.cancel_scope.cancel()

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """One request and its result."""
        async with self._request(method, params) as (_, result):
            if isinstance(result, dict) and "$stream" in result:
                async with aclosing(self._items(result["$stream"])) as items:
                    [whole] = [item async for item in items]
                return whole
            return result

    async def stream(self, method: str, params: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """The items of a stream, up to its checked end."""
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
        if self.gone is not None:
            raise self.gone
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
                self.is_answered = True
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
        self.gone = self.gone or RemoteError(error)
        for channel in (*self._answers.values(), *self._streams.values()):
            channel.fail(self.gone)


def _cut(need: str, have: str) -> RemoteError:
    return RemoteError({"code": "agent_gone", "message": "the stream was cut", "have": have, "need": need})
