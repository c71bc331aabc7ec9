"""Requests and their answers over one connection after the other, without threads or trio: what the client is made of.

What lives here: frames, numbers, streams, what follows when a connection breaks. What must not: methods by name (`client`), and
what may be asked twice (`resuming`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Self

from .dialling import RemoteError, problem
from .resuming import RESUMED, find_out

if TYPE_CHECKING:
    import _socket

MAX_FRAME = 256 * 1024  # bytes
_PAUSE = 0.05  # seconds between two attempts to find the next agent
_SILENCE = 2.0  # seconds, after which whoever waits for an answer knows whether anybody is there
_LONGEST_SILENCE = 30.0


class Exchange:
    """One connection, and the next one when it is cut."""

    def __init__(
        self,
        sock: _socket.socket,
        timeout: float | None,
        *,
        redial: Callable[[], _socket.socket | None] | None = None,
        reconnect: float = 0.0,
    ) -> None:
        """`redial` makes another connection when this one is cut; RemoteError `agent_gone` while there is nobody, None if there
        will be nobody."""
        from msgpack import packb, unpackb

        self._pack, self._unpack = packb, unpackb
        self._sock = sock
        self._timeout = timeout
        self._last = 0
        self._buffer = bytearray()
        self._answers: dict[int, list[Any]] = {}
        self._awaited: set[int] = set()
        self._streams: dict[int, deque[tuple[int, dict[str, Any]]]] = {}
        self._gone: RemoteError | None = None
        self._redial = redial
        self._reconnect = reconnect if redial is not None else 0.0
        self._lost_at: float | None = None  # since then nobody has answered
        self._age = 0  # how many connections there were before this one
        self._silence = _SILENCE / 2
        self.is_answered = False  # whether this connection ever brought anything
        self.on_silence: Callable[[], object] | None = None  # called when the agent is there and does not answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it this client's waits and streams; containers go on."""
        self._reconnect = 0.0
        self._gone = self._gone or problem("agent_gone", "this client was closed")
        self._sock.close()

    def survive(self, redial: Callable[[], _socket.socket | None], seconds: float) -> None:
        """When this connection is cut, `redial` makes the next one, for so many seconds (or until it answers None)."""
        self._redial, self._reconnect = redial, seconds

    def release(self) -> _socket.socket:
        """The connection, which is somebody else's from now on."""
        self._gone = problem("agent_gone", "this client gave its connection away")
        return self._sock

    def fileno(self) -> int:
        """For select and poll: readable when `receive` will not wait."""
        return self._sock.fileno()

    def receive(self) -> None:
        """Reads once what has come, waiting for it if nothing has, and sorts it to the calls and streams it belongs to.

        For a program that reads several streams: ``stream.next(timeout=0)`` then answers at once.
        """
        if not self._gone:
            self._pump(None)

    def call(self, method: str, /, **params: Any) -> Any:
        """One request and its result. RemoteError with the agent's error object; `unknown_outcome` after `timeout`, and where the
        agent ended before it answered and it cannot be found out whether it did what it was asked."""
        return self._ask(method, params, self._timeout, "unknown_outcome")

    def _ask(self, method: str, params: dict[str, Any], timeout: float | None, late: str) -> Any:
        until = None if timeout is None else time.monotonic() + timeout
        number = self._send(method, params)
        try:
            return self._result(number, timeout, late)
        except RemoteError as error:
            if error.code == "timeout":
                self._cancel(number)
            if error is not self._gone or method == "STOP_AGENT":
                raise
            if not self._renew():
                raise self._gone from None
            steps = find_out(method, params, error)
        return self._follow(steps, until, late)

    def _follow(self, steps: Generator[tuple[str, dict[str, Any]], Any, Any], until: float | None, late: str) -> Any:
        try:
            asked = next(steps)
            while True:
                try:
                    left = None if until is None else max(0.0, until - time.monotonic())
                    result = self._ask(*asked, left, late)
                except RemoteError as error:
                    asked = steps.throw(error)
                else:
                    asked = steps.send(result)
        except StopIteration as end:
            return end.value

    def _renew(self) -> bool:
        """Another connection in the place of one that was cut; False if there is none to be had, or should not be."""
        if self._redial is None or not self._reconnect or not self._gone or self._gone.code != "agent_gone":
            return False
        self._lost_at = self._lost_at or time.monotonic()
        while True:
            try:
                sock = self._redial()
            except RemoteError as error:
                if error.code != "agent_gone":
                    raise
            else:
                break
            if time.monotonic() - self._lost_at > self._reconnect:
                return self._give_up(f"the agent is gone, and no other came within {self._reconnect:g} s")
            time.sleep(_PAUSE)
        if sock is None:
            return self._give_up("the agent has ended, and nothing that it ran goes on")
        self._sock.close()
        self._sock, self._gone, self.is_answered = sock, None, False
        self._buffer.clear()
        self._answers.clear()
        self._awaited.clear()
        self._streams = {}
        self._age += 1
        return True

    def _give_up(self, message: str) -> bool:
        self._gone = problem("agent_gone", message)
        self._reconnect = 0.0
        return False

    def stream(self, method: str, /, **params: Any) -> Stream:
        """A request that is answered by a stream, which has begun when this returns."""
        while True:
            number = self._send(method, params)
            try:
                opened = self._receive_answer(number, self._timeout, "unknown_outcome")
                break
            except RemoteError as error:
                if error is not self._gone or method not in RESUMED or not self._renew():
                    raise
        if not isinstance(opened, dict) or "stream" not in opened:
            raise problem("bad_frame", f"{method} was not answered by a stream")
        return Stream(self, opened["stream"], number, method, params)

    def _send(self, method: str, params: dict[str, Any]) -> int:
        while True:  # what could not be handed over whole has not been looked at
            try:
                return self._send_once(method, params)
            except RemoteError as error:
                if error is not self._gone or not self._renew():
                    raise self._gone if error.code == "agent_gone" and self._gone else error from None

    def _send_once(self, method: str, params: dict[str, Any]) -> int:
        if self._gone:
            raise self._gone
        self._last += 1
        try:
            body = self._pack([0, self._last, method, [params]])
        except (TypeError, ValueError, OverflowError, UnicodeError, RecursionError) as error:
            raise problem("bad_input", f"this cannot be sent: {error}") from None
        if len(body) > MAX_FRAME:
            raise problem("too_large", "the request is too long", have=str(len(body)), need=f"≤ {MAX_FRAME} bytes")
        self._sock.settimeout(self._timeout)
        try:
            self._sock.sendall(len(body).to_bytes(4, "big") + body)
        except TimeoutError:
            self._gone = problem("unknown_outcome", f"the agent took no request for {self._timeout} s")
        except OSError:  # the agent has closed the connection; what it said before that says why
            while not self._gone:
                self._pump(None)
        if self._gone:
            raise self._gone
        self._awaited.add(self._last)
        return self._last

    def _result(self, number: int, timeout: float | None, late: str) -> Any:
        result = self._receive_answer(number, timeout, late)
        if isinstance(result, dict) and "$stream" in result:  # an answer too long for one frame: a stream of one item
            [result] = Stream(self, result["$stream"], number, "", {})
        return result

    def _receive_answer(self, number: int, timeout: float | None, late: str) -> Any:
        until = None if timeout is None else time.monotonic() + timeout
        while number not in self._answers:
            if self._gone:
                raise self._gone
            try:
                self._pump_patiently(until)
            except TimeoutError:
                self._awaited.discard(number)
                raise problem(late, f"no answer within {timeout:g} s") from None
        error, result = self._answers.pop(number)
        if error is not None:
            raise RemoteError(error)
        return result

    def _pump_patiently(self, until: float | None) -> None:
        """Tells `on_silence` when nothing comes and not even a PING is answered: a stopped agent, or one that is very busy."""
        if self.on_silence is None:
            self._pump(until)
            return
        for attempt in range(2):
            soon = time.monotonic() + (self._silence if attempt == 0 else _SILENCE / 2)
            try:
                self._pump(soon if until is None else min(soon, until))
                self._silence = min(self._silence * 2, _LONGEST_SILENCE) if attempt else self._silence
                return
            except TimeoutError:
                if until is not None and time.monotonic() >= until:
                    raise
            if attempt == 0:
                self._send_once("PING", {})
        tell, self.on_silence = self.on_silence, None
        tell()
        self._pump(until)

    def _pump(self, until: float | None) -> None:
        """Reads what is there, or waits for it, and sorts it. Sets `_gone` when there will be no more."""
        try:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            data = self._sock.recv(MAX_FRAME)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        if not data:
            self._gone = self._gone or problem("agent_gone", "the agent closed the connection")
            return
        self._lost_at, self.is_answered = None, True
        buffer = self._buffer
        buffer += data
        while len(buffer) >= 4:
            length = int.from_bytes(buffer[:4], "big")
            if len(buffer) < 4 + length <= 4 + MAX_FRAME:
                return
            try:
                message = self._unpack(bytes(buffer[4 : 4 + length])) if length <= MAX_FRAME else None
            except ValueError:
                message = None
            del buffer[: 4 + length]
            self._sort(message, length)

    def _sort(self, message: Any, length: int) -> None:
        match message:
            case [1, None, dict(error), _]:  # about the connection, not about one request: it is being closed
                self._gone = RemoteError(error)
            case [1, int(number), error, result]:
                if number in self._awaited:  # else: an answer that was given up
                    self._awaited.remove(number)
                    self._answers[number] = [error, result]
                    opened = result.get("stream", result.get("$stream")) if isinstance(result, dict) else None
                    if isinstance(opened, int):
                        self._streams.setdefault(opened, deque())
            case [2, "STREAM", [{"stream": int(stream)} as fields]]:
                if stream in self._streams:  # else: one that was closed
                    self._streams[stream].append((length, fields))
            case _:
                self._gone = problem("bad_frame", "what answers there is not an agent of ours")

    def _cancel(self, number: int) -> None:
        body = self._pack([2, "CANCEL", [{"id": number}]])
        try:
            self._sock.sendall(len(body).to_bytes(4, "big") + body)
        except OSError:
            self._gone = self._gone or problem("agent_gone", "the agent closed the connection")


class Stream:
    """The items of a stream, in order. Ends normally only after the agent's own end marker, with every byte accounted for."""

    def __init__(self, client: Exchange, number: int, request: int, method: str, params: dict[str, Any]) -> None:
        self._client = client
        self._method, self._params = method, params
        self._ended = False
        self._begin(number, request)

    def _begin(self, number: int, request: int) -> None:
        self._number = number
        self._request = request
        self._age = self._client._age
        self._held = self._client._streams.setdefault(number, deque())
        self._parts: list[bytes] = []
        self._seq = 0
        self._bytes = 0

    def _resume(self) -> None:
        """Goes on after the last item, over the next connection; RemoteError if that cannot be."""
        client = self._client
        while self._method in RESUMED and (not client._gone or client._renew()):
            try:
                number = client._send(self._method, self._params)
                opened = client._receive_answer(number, client._timeout, "unknown_outcome")
            except RemoteError as error:
                if error is not client._gone:
                    raise
                continue
            self._begin(opened["stream"], number)
            return
        if client._gone and not self._method:  # an answer, which may be asked for again as a whole
            raise client._gone
        gone = client._gone.error["message"] if client._gone else "its connection is gone"
        raise problem("agent_gone", f"the stream was cut: {gone}")

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next item. StopIteration at the end, TimeoutError after `timeout` seconds (ask again), RemoteError otherwise."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            while not self._held:
                if self._client._gone or self._age != self._client._age:
                    self._resume()
                else:
                    self._client._pump(until)
            length, fields = self._held.popleft()
            if fields.get("seq") != self._seq:
                self._finish()
                raise problem("agent_gone", "a part of the stream is missing", have=str(fields.get("seq")), need=str(self._seq))
            if fields.get("end"):
                self._finish()
                if fields.get("error"):
                    raise RemoteError(fields["error"])
                if self._parts or fields.get("bytes") != self._bytes:
                    raise problem("agent_gone", "the stream was cut", have=str(self._bytes), need=f"{fields.get('bytes')} bytes")
                break
            self._seq += 1
            self._bytes += length
            if "part" not in fields:
                return self._seen(fields.get("item"))
            self._parts.append(fields["part"])
            if fields.get("last"):
                packed, self._parts = b"".join(self._parts), []
                return self._seen(self._client._unpack(packed))
        raise StopIteration

    def _seen(self, item: Any) -> Any:
        if self._method in RESUMED and self._client._reconnect:
            self._params = RESUMED[self._method](self._params, item)
        return item

    @property
    def is_ready(self) -> bool:
        """Whether `next` has something to say without reading: what came along with an answer, or that the connection is gone."""
        return bool(self._held or self._client._gone or self._age != self._client._age)

    def close(self) -> None:
        """Tells the agent that no more is wanted. What the stream told of goes on."""
        if not self._ended:
            self._finish()
            if self._age == self._client._age:
                self._client._cancel(self._request)

    def _finish(self) -> None:
        self._ended = True
        if self._age == self._client._age:
            self._client._streams.pop(self._number, None)
