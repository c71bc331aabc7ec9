"""One peer: its frames in, its answers and streams out, and what is still going on for it.

Theory: the reader is the only task that looks at the peer's bytes, and it is the brake. It answers itself what needs no
waiting, starts a task for the rest, and does not read on while too much is in flight or too little of what was
answered has been taken. So a peer that pipelines without reading fills its own socket and nothing else.

When the peer goes away (end of file, also of only its sending side), its waits and streams end at once. What
changes the world and was not done at once is in the server's nursery and goes on; only its answer finds nobody.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from mesocosm.kernel.core.errors import (
    ConflictError,
    DeadlineError,
    FrameError,
    InternalError,
    MesoError,
    OverBudgetError,
    SpecError,
    TooLargeError,
)
from mesocosm.kernel.wire import framing, messages, service
from mesocosm.kernel.wire.authority import Principal, may
from mesocosm.kernel.wire.messages import Method, Parsed
from mesocosm.kernel.wire.outbox import Outbox
from mesocosm.kernel.wire.streams import Stream

if TYPE_CHECKING:
    from mesocosm.kernel.wire.server import Server

log = logging.getLogger("mesocosm.wire")
_READ = 64 * 1024  # bytes asked for at once
_STRETCH = 64 * 1024  # bytes of requests looked at before others get a turn
_LAST_WORDS = 1.0  # seconds a peer has to take the reason why it is closed


class Limits(msgspec.Struct, frozen=True):
    """What one peer, and all together, may cost. Seconds, bytes and counts."""

    connections: int = 256
    strangers: int = 16  # connections of peers that may do nothing, beside those
    calls: int = 64  # in flight per connection; then reading stops until one is answered
    lasting: int = 1024  # waits and streams per connection; more are refused, since nobody knows when one ends
    frame_seconds: float = 10.0  # from a frame's first byte to its last
    write_seconds: float = 30.0  # during which a peer takes nothing of an answer
    lag_seconds: float = 10.0  # during which a stream that is not patient finds no room
    queue_bytes: int = 256 * 1024
    answer_bytes: int = 64 * 1024 * 1024  # of one answer or item, which goes out in parts


class Connection:
    """One accepted connection. `run` it in a task; it returns when the peer is gone."""

    def __init__(self, server: Server, sock: socket.socket, principal: Principal) -> None:
        self._server = server
        self._sock = sock
        self._principal = principal
        self._verdicts = {right: may(principal, right, server.access) for right in ("read", "write")}
        self._limits = server.limits
        self._frames = framing.Frames()
        self._outbox = Outbox(sock, bound=self._limits.queue_bytes, patience=self._limits.write_seconds)
        self._ids: set[int] = set()  # requests in flight
        self._calls = 0
        self._call_ended = trio.lowlevel.ParkingLot()
        self._lasting: dict[int, trio.CancelScope] = {}
        self._streams = 0
        self._denial_logged = False
        self._is_empty = True  # the socket had no more than was read last
        self._tasks: trio.Nursery

    async def run(self) -> None:
        """Serves the peer until it is gone, or had to be sent away."""
        async with trio.open_nursery() as self._tasks:
            self._tasks.start_soon(self._send)
            try:
                await self._read()
            except MesoError as error:
                self._outbox.put(messages.refusal(None, messages.rooted(error)))
                await self._outbox.drain(_LAST_WORDS)
            except (OSError, trio.BrokenResourceError):
                pass  # the peer is gone, which means the same as an end of file
            self._tasks.cancel_scope.cancel()

    async def _send(self) -> None:
        await self._outbox.run()
        self._tasks.cancel_scope.cancel()

    # Bytes in

    async def _read(self) -> None:
        started: float | None = None  # when the unfinished frame's first byte was there to be read
        stretch = _STRETCH
        while True:
            body = self._frames.take()
            if body is not None:
                started = None
                stretch -= len(body) + 512
                await self._handle(body)
                if stretch < 0:
                    stretch = _STRETCH
                    await trio.lowlevel.checkpoint()
                continue
            if self._frames.partial and started is None:
                started = trio.current_time()
            data = await self._receive(started)
            if not data:
                if self._frames.partial:
                    raise FrameError("the connection ended in the middle of a frame")
                return
            self._frames.feed(data)

    async def _receive(self, started: float | None) -> bytes:
        while True:
            if self._is_empty:  # a peer that has asked waits for its answer: trying to read now would be in vain
                await self._readable(started)
            try:
                # Without a place for ancillary data the kernel closes every descriptor that was sent along, and says so.
                data, _, flags, _ = self._sock.recvmsg(_READ)
            except BlockingIOError:
                self._is_empty = True
                continue
            self._is_empty = len(data) < _READ
            if flags & socket.MSG_CTRUNC:
                raise FrameError("file descriptors are not taken on this socket")
            if started is not None and trio.current_time() > started + self._limits.frame_seconds:
                raise self._too_slow()
            return data

    async def _readable(self, started: float | None) -> None:
        if started is None:
            await trio.lowlevel.wait_readable(self._sock)
            return
        with trio.move_on_at(started + self._limits.frame_seconds) as scope:
            await trio.lowlevel.wait_readable(self._sock)
        if scope.cancelled_caught:
            raise self._too_slow()

    def _too_slow(self) -> DeadlineError:
        return DeadlineError("the frame took too long", need=f"≤ {self._limits.frame_seconds:g} s")

    # Messages in

    async def _handle(self, body: bytes) -> None:
        try:
            parsed = messages.parse(framing.decode(body))
        except SpecError as error:
            head = framing.head(body)
            if not head or not messages.is_request(*head[:2]):
                raise FrameError(error.message, **error.fields) from None
            await self._refuse(head[1], messages.rooted(error))
            return
        if parsed.id is None:
            self._notified(parsed)
            return
        try:
            await self._request(parsed.id, parsed)
        except MesoError as error:
            await self._refuse(parsed.id, error)

    async def _request(self, number: int, parsed: Parsed) -> None:
        known = messages.METHODS.get(parsed.method)
        denied = self._verdicts[known.right if known else "read"]
        if denied is not None:
            self._log_denial(parsed.method)
            raise denied.with_fields()
        method, request = messages.select(known or messages.find(parsed.method), parsed.params)
        if method.kind == "now":
            await self._answer(number, self._now(method, request, parsed))
            return
        if number in self._ids:
            raise ConflictError("a request with this number is still in flight", have=str(number))
        if method.kind == "call":
            while self._calls >= self._limits.calls:
                await self._call_ended.park()
        elif len(self._lasting) >= self._limits.lasting:
            raise OverBudgetError(
                "too many waits and streams on one connection", have=str(len(self._lasting)), need=f"< {self._limits.lasting}"
            )
        if method.kind == "stream":
            self._ids.add(number)
            scope = self._lasting[number] = trio.CancelScope()
            self._tasks.start_soon(self._stream, number, method, request, parsed.params, scope)
            return
        work = self._begin(method, request, parsed)
        if isinstance(work, Mapping):
            await self._answer(number, work)
            return
        # Nothing may be awaited between beginning a work and giving it to a task: the connection may end at any such point.
        self._ids.add(number)
        if method.kind == "call":
            self._calls += 1
            self._server.tasks.start_soon(self._call, number, method, work)
        else:
            scope = self._lasting[number] = trio.CancelScope()
            self._tasks.start_soon(self._wait, number, method, work, scope)

    def _notified(self, parsed: Parsed) -> None:
        """CANCEL ends a wait or a stream of this connection; nothing else is known, and nothing could be answered."""
        number = parsed.params.get("id")
        if parsed.method == "CANCEL" and type(number) is int and (scope := self._lasting.get(number)) is not None:
            scope.cancel()

    def _log_denial(self, method: str) -> None:
        if not self._denial_logged:
            self._denial_logged = True
            log.warning("denied: %s to %s", method[:80], self._principal)

    # Work

    def _now(self, method: Method, request: messages.Request, parsed: Parsed) -> Any:
        if method.name == "PING":
            return {}
        if method.name == "GET_VERSION":
            told = {"version": self._server.version, "protocol": messages.PROTOCOL, "features": list(messages.FEATURES)}
            return told | ({"set": self._server.set_name} if self._server.set_name else {})
        return self._begin(method, request, parsed)

    def _begin(self, method: Method, request: messages.Request, parsed: Parsed) -> Any:
        try:
            return service.call(method, self._server.service, request, parsed.params)
        except Exception as error:
            raise as_error(error, method.name) from None

    async def _call(self, number: int, method: Method, work: Awaitable[Any]) -> None:
        try:
            try:
                result = await work
            except Exception as error:
                await self._refuse(number, as_error(error, method.name))
            else:
                await self._answer(number, result)
                if method.name == "STOP_AGENT":
                    await self._outbox.drain(_LAST_WORDS)
                    self._server.stopped.set()
        except trio.BrokenResourceError:
            pass  # the peer is gone; what it asked for is done all the same
        finally:
            self._calls -= 1
            self._ids.discard(number)
            self._call_ended.unpark()

    async def _wait(self, number: int, method: Method, work: Awaitable[Any], scope: trio.CancelScope) -> None:
        try:
            with scope:
                try:
                    result = await work
                except Exception as error:
                    await self._refuse(number, as_error(error, method.name))
                else:
                    await self._answer(number, result)
            if scope.cancelled_caught:
                await self._refuse(number, ConflictError("cancelled by its caller"))
        except trio.BrokenResourceError:
            pass
        finally:
            del self._lasting[number]
            self._ids.discard(number)

    async def _stream(
        self, number: int, method: Method, request: messages.Request, params: dict[str, Any], scope: trio.CancelScope
    ) -> None:
        stream = self._new_stream(None if method.patient else self._limits.lag_seconds)
        error: MesoError | None = None
        try:
            with scope:
                try:
                    await self._outbox.send(messages.answer(number, {"stream": stream.number}))
                    await self._pump(stream, service.call(method, self._server.service, request, params))
                except trio.BrokenResourceError:
                    return
                except Exception as caught:
                    error = as_error(caught, method.name)
            if scope.cancelled_caught:
                error = ConflictError("cancelled by its caller")
            stream.end(error)
        finally:
            del self._lasting[number]
            self._ids.discard(number)

    async def _pump(self, stream: Stream, items: AsyncIterator[Any]) -> None:
        try:
            async for item in items:
                await stream.item(item)
        finally:
            if (close := getattr(items, "aclose", None)) is not None:
                await close()

    # Answers out

    async def _answer(self, number: int, result: Any) -> None:
        try:
            body = messages.answer(number, result)
        except InternalError as error:
            log.error("%s", error)
            await self._refuse(number, error)
            return
        if len(body) <= framing.MAX_FRAME:
            if self._outbox.has_room:
                self._outbox.put(body)
            else:
                await self._outbox.send(body)
            return
        if len(body) > self._limits.answer_bytes:
            error_ = TooLargeError("the answer is too long", have=str(len(body)), need=f"≤ {self._limits.answer_bytes} bytes")
            await self._refuse(number, error_)
            return
        stream = self._new_stream(self._limits.write_seconds)
        await self._outbox.send(messages.answer(number, {"$stream": stream.number}))
        try:
            await stream.parts(framing.pack(result))
        except DeadlineError as error:
            stream.end(error)
        else:
            stream.end()

    async def _refuse(self, number: int, error: MesoError) -> None:
        await self._outbox.send(messages.refusal(number, error))

    def _new_stream(self, lag: float | None) -> Stream:
        self._streams += 1
        return Stream(self._outbox, self._streams, lag)


def as_error(error: Exception, what: str) -> MesoError:
    """The error to answer with: a MesoError itself (also from inside a group), anything else as a logged `internal`."""
    if isinstance(error, MesoError):
        return error
    if isinstance(error, ExceptionGroup):
        known, other = error.split(MesoError)
        if known is not None and other is None:
            found: Any = known
            while isinstance(found, BaseExceptionGroup):
                found = found.exceptions[0]
            return as_error(found, what)
    log.error("%s failed in a way that it must not", what, exc_info=error)
    hint = "a bug of mesocosm or of a plug-in; the agent's log has the traceback"
    return InternalError(f"{what}: {type(error).__name__}: {error}", hint=hint)
