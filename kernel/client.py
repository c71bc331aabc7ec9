"""The client: one file, the standard library and msgpack, no threads, no trio. Copy it where you need it.

    from mesocosm.kernel.client import connect

    with connect() as client:
        client.launch_group({"name": "web", "tasks": [{"name": "db", "command": ["sleep", "10"]}]})

What lives here: frames, requests, answers, streams, where the socket is; `open()`, for programs that use trio, is loaded only
then. What must not: anything of the agent. Theory: a stream that was cut must never look like one that ended. Items are
numbered, the end says how many bytes there were, and both are checked here; whatever does not agree is an `agent_gone`. An
answer that did not come in time is an `unknown_outcome`, since it may have happened all the same.
"""

from __future__ import annotations

import _socket  # what is under `socket`, without its selectors and enum tables: 5 ms that every `meso ps` would pay
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager as Block

    from mesocosm.kernel.wire.trio_client import TrioClient

__all__ = ["Client", "RemoteError", "Stream", "connect", "default_run_dir", "default_socket", "dial", "open"]

MAX_FRAME = 256 * 1024  # bytes


class RemoteError(Exception):
    """`error`: the error object that the agent sent, or that says what became of the agent; `code`: its code."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.error = dict(error)
        self.code = str(self.error.get("code", "internal"))
        super().__init__(str(self.error.get("message", "no message")))

    def __str__(self) -> str:
        known = [key for key in ("path", "id", "target", "errno", "have", "need", "hint") if self.error.get(key)]
        return "; ".join([f"{self.code}: {self.error.get('message', '')}", *(f"{key}: {self.error[key]}" for key in known)])


def _error(code: str, message: str, **fields: Any) -> RemoteError:
    return RemoteError({"code": code, "message": message, **fields})


def default_run_dir() -> str:
    """The run directory: MESOCOSM_RUN_DIR, root's /run/mesocosm, or the user's own (with fallbacks)."""
    if found := os.environ.get("MESOCOSM_RUN_DIR"):
        return found
    uid = os.geteuid()
    if uid == 0:
        return "/run/mesocosm"
    for base in (os.environ.get("XDG_RUNTIME_DIR") or "/", f"/run/user/{uid}"):
        # After `su` the variable is often still that of the other user.
        if os.path.isdir(base) and (status := os.stat(base)).st_uid == uid and not status.st_mode & 0o002:
            return f"{base}/mesocosm"
    return f"/tmp/mesocosm-{uid}"


def default_socket() -> str:
    """The agent's socket: MESOCOSM_SOCKET, else agent.sock in the run directory."""
    return os.environ.get("MESOCOSM_SOCKET") or os.path.join(default_run_dir(), "agent.sock")


def connect(path: str | os.PathLike[str] | None = None, *, timeout: float | None = 120.0) -> Client:
    """A connection to the agent on `path` (default: `default_socket`).

    `timeout` is the longest silence, in seconds, before an ordinary answer is given up; waits and streams have their own.
    RemoteError `agent_gone` when nobody answers there, `denied` when it may not be used, `timeout` when the crowd is too large.
    """
    return Client(dial(path, timeout), timeout)


def dial(path: str | os.PathLike[str] | None, timeout: float | None) -> _socket.socket:
    """The connected socket alone; for a client of another kind. Errors as `connect`."""
    wanted = os.fspath(path) if path is not None else default_socket()
    named = path is not None or any(os.environ.get(name) for name in ("MESOCOSM_SOCKET", "MESOCOSM_RUN_DIR"))
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    directory = -1
    try:
        if timeout is not None:  # with a timeout of Python's, connect(2) would not wait where many others wait to be taken
            timeval = b"".join(part.to_bytes(8, sys.byteorder) for part in divmod(max(1, int(timeout * 1e6)), 10**6))
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, timeval)
        target = wanted
        if len(os.fsencode(wanted)) > 107:  # what fits into a sockaddr_un, unix(7)
            directory = os.open(os.path.dirname(wanted), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            target = f"/proc/self/fd/{directory}/{os.path.basename(wanted)}"
        sock.connect(target)
        sock.settimeout(timeout)
        uid = int.from_bytes(sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)[4:8], sys.byteorder)
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError):
            raise _error("denied", "this user may not use the agent's socket", target=wanted) from None
        if isinstance(error, BlockingIOError):
            raise _error("timeout", f"the agent took no connection for {timeout} s", target=wanted) from None
        message = f"no agent answers: {error.strerror or error}"
        raise _error("agent_gone", message, target=wanted, hint="meso agent starts one") from None
    finally:
        if directory >= 0:
            os.close(directory)
    # A fallback directory below /tmp could be somebody else's trap; a path that was given is the giver's choice.
    if not named and uid not in (0, os.geteuid()):
        sock.close()
        raise _error("denied", f"the agent there runs as uid {uid}", target=wanted, hint="--socket says that you mean it")
    return sock


class Client:
    """One connection. Not for several threads at once; several streams and calls may be open beside each other."""

    def __init__(self, sock: _socket.socket, timeout: float | None) -> None:
        from msgpack import packb, unpackb

        self._pack, self._unpack = packb, unpackb
        self._sock, self._timeout, self._last, self._buffer = sock, timeout, 0, bytearray()
        self._answers: dict[int, list[Any]] = {}
        self._awaited: set[int] = set()
        self._streams: dict[int, deque[tuple[int, dict[str, Any]]]] = {}
        self._gone: RemoteError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and with it this client's waits and streams; containers go on."""
        self._gone = self._gone or _error("agent_gone", "this client was closed")
        self._sock.close()

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
        """One request and its result. RemoteError with the agent's error object; `unknown_outcome` after `timeout`."""
        return self._result(self._send(method, params), self._timeout, "unknown_outcome")

    def stream(self, method: str, /, **params: Any) -> Stream:
        """A request that is answered by a stream, which has begun when this returns."""
        number = self._send(method, params)
        opened = self._receive_answer(number, self._timeout, "unknown_outcome")
        if not isinstance(opened, dict) or "stream" not in opened:
            raise _error("bad_frame", f"{method} was not answered by a stream")
        return Stream(self, opened["stream"], number)

    def _send(self, method: str, params: dict[str, Any]) -> int:
        if self._gone:
            raise self._gone
        self._last += 1
        try:
            body = self._pack([0, self._last, method, [params]])
        except (TypeError, ValueError, OverflowError, UnicodeError, RecursionError) as error:
            raise _error("bad_input", f"this cannot be sent: {error}") from None
        if len(body) > MAX_FRAME:
            raise _error("too_large", "the request is too long", have=str(len(body)), need=f"≤ {MAX_FRAME} bytes")
        self._sock.settimeout(self._timeout)
        try:
            self._sock.sendall(len(body).to_bytes(4, "big") + body)
        except TimeoutError:
            self._gone = _error("unknown_outcome", f"the agent took no request for {self._timeout} s")
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
            [result] = Stream(self, result["$stream"], number)
        return result

    def _receive_answer(self, number: int, timeout: float | None, late: str) -> Any:
        until = None if timeout is None else time.monotonic() + timeout
        while number not in self._answers:
            if self._gone:
                raise self._gone
            try:
                self._pump(until)
            except TimeoutError:
                self._awaited.discard(number)
                raise _error(late, f"no answer within {timeout:g} s") from None
        error, result = self._answers.pop(number)
        if error is not None:
            raise RemoteError(error)
        return result

    def _pump(self, until: float | None) -> None:
        """Reads what is there, or waits for it, and sorts it. Sets `_gone` when there will be no more."""
        try:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            data = self._sock.recv(MAX_FRAME)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            data = b""
        if not data:
            self._gone = self._gone or _error("agent_gone", "the agent closed the connection")
            return
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
                self._gone = _error("bad_frame", "what answers there is not an agent of ours")

    def _cancel(self, number: int) -> None:
        body = self._pack([2, "CANCEL", [{"id": number}]])
        try:
            self._sock.sendall(len(body).to_bytes(4, "big") + body)
        except OSError:
            self._gone = self._gone or _error("agent_gone", "the agent closed the connection")

    def ping(self) -> None:
        """Returns when the agent has answered."""
        self.call("PING")

    def version(self) -> dict[str, Any]:
        """``{"version", "protocol", "features", "set"}`` of the agent; `set` is the name of its plug-in set."""
        return dict(self.call("GET_VERSION"))

    def plan_group(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        """What launching `pod` would do: the object of ``meso plan --json``. Nothing is touched."""
        return dict(self.call("PLAN_GROUP", group=pod))

    def launch_group(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        """Launches a pod, whole or not at all: ``{"id", "state", "containers"}`` once it runs."""
        return dict(self.call("LAUNCH_GROUP", group=pod))

    def run_group(self, pod: Mapping[str, Any]) -> Stream:
        """Launches a pod; its event lines up to the ``end`` line. Closing the stream does not end the pod."""
        return self.stream("LAUNCH_GROUP", group=pod, stream=True)

    def launch_nested_group(self, container_id: str, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Launches tasks, whole or not at all, inside a running container."""
        return dict(self.call("LAUNCH_NESTED_GROUP", container_id=container_id, tasks=tasks))

    def launch_container(self, container_id: str, command: Sequence[str] | str, **fields: Any) -> dict[str, Any]:
        """Launches one container; `fields` are those of a task. A dotted id starts it inside that parent."""
        return dict(self.call("LAUNCH_CONTAINER", container_id=container_id, command=command, **fields))

    def wait(self, container_id: str, timeout: float | None = None) -> dict[str, Any]:
        """How a container ended, once it has: ``{"id", "status", "exit", "signal", …}``. RemoteError `timeout` after that."""
        number = self._send("WAIT_CONTAINER", {"container_id": container_id})
        try:
            return dict(self._result(number, timeout, "timeout"))
        except RemoteError as error:
            if error.code == "timeout":
                self._cancel(number)
            raise

    def kill(self, container_id: str, signal: int | str | None = None) -> None:
        """Begins to end a container by its kill policy; with `signal`, sends that signal once."""
        self.call("KILL_CONTAINER", container_id=container_id, **({} if signal is None else {"signal": signal}))

    def remove(self, container_id: str) -> None:
        """Forgets a dead container and its output."""
        self.call("REMOVE_CONTAINER", container_id=container_id)

    def containers(self, *, all: bool = False) -> list[dict[str, Any]]:  # noqa: A002 - the option is called --all
        """``ps`` lines of the living containers, or of all."""
        return list(self.call("GET_CONTAINERS", all=all)["containers"])

    def explain(self, container_id: str, life: int | None = None) -> dict[str, Any]:
        """Why a container is as it is, or was; `chain` leads from its state to the cause."""
        return dict(self.call("EXPLAIN", container_id=container_id, **({} if life is None else {"life": life})))

    def history(self, container_id: str | None = None, **bounds: float) -> dict[str, Any]:
        """What has been: ``{"history", "next", "notes", "durable"}``; bounds `at since limit`, `cursor`: the last `next`."""
        return dict(self.call("GET_HISTORY", container_id=container_id, **bounds))

    def plugins(self) -> list[dict[str, Any]]:
        """``plugins`` lines: what is loaded, and what is not and why."""
        return list(self.call("GET_PLUGINS")["plugins"])

    def audit(self, *, repair: bool = False) -> dict[str, Any]:
        """The ledger against the machine: ``{"leftover", "missing", "strangers", "notes"}``, after `repair` if asked."""
        return dict(self.call("AUDIT", repair=repair))

    def events(self, since: int = 0, container_id: str | None = None) -> Stream:
        """Event lines numbered above `since`; never ends by itself."""
        return self.stream("SUBSCRIBE_EVENTS", since=since, container_id=container_id)

    def logs(
        self, container_id: str, stream: str = "stdout", offset: int = 0, *, follow: bool = False
    ) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of a container's output; with `follow`, up to its end."""
        asked = {"container_id": container_id, "stream": stream, "offset": offset, "follow": follow}
        return ((item["offset"], item["data"]) for item in self.stream("READ_LOGS", **asked))

    def stop_agent(self) -> None:
        """Ends every container, then the agent."""
        self.call("STOP_AGENT")


class Stream:
    """The items of a stream, in order. Ends normally only after the agent's own end marker, with every byte accounted for."""

    def __init__(self, client: Client, number: int, request: int) -> None:
        self._client, self._number, self._request = client, number, request
        self._parts: list[bytes] = []
        self._seq = self._bytes = 0
        self._ended = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """The next item. StopIteration at the end, TimeoutError after `timeout` seconds (ask again), RemoteError otherwise."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            while not (waiting := self._client._streams.setdefault(self._number, deque())):
                if self._client._gone:
                    raise _error("agent_gone", f"the stream was cut: {self._client._gone.error['message']}")
                self._client._pump(until)
            length, fields = waiting.popleft()
            if fields.get("seq") != self._seq:
                self._finish()
                raise _error("agent_gone", "a part of the stream is missing", have=str(fields.get("seq")), need=str(self._seq))
            if fields.get("end"):
                self._finish()
                if fields.get("error"):
                    raise RemoteError(fields["error"])
                if self._parts or fields.get("bytes") != self._bytes:
                    raise _error("agent_gone", "the stream was cut", have=str(self._bytes), need=f"{fields.get('bytes')} bytes")
                break
            self._seq += 1
            self._bytes += length
            if "part" not in fields:
                return fields.get("item")
            self._parts.append(fields["part"])
            if fields.get("last"):
                packed, self._parts = b"".join(self._parts), []
                return self._client._unpack(packed)
        raise StopIteration

    def close(self) -> None:
        """Tells the agent that no more is wanted. What the stream told of goes on."""
        if not self._ended:
            self._finish()
            self._client._cancel(self._request)

    def _finish(self) -> None:
        self._ended = True
        self._client._streams.pop(self._number, None)


def open(path: str | os.PathLike[str] | None = None) -> Block[TrioClient]:  # noqa: A001 - the contract's name
    """The client for trio programs: ``async with open() as client``. See `mesocosm.kernel.wire.trio_client`."""
    from mesocosm.kernel.wire.trio_client import open_client

    return open_client(path)
