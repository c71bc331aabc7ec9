"""What frames are thrown at: a whole agent on a simulated host, behind the real connection, driven one input at a time.

What lives here: the agent under attack, one conversation with it, and what must hold after every one. What must not: where
inputs come from (`mutation`), and who counts coverage (`frames`).

An input is what one client sends, to its last byte; then the client ends its sending side. Frames, decoding, the table of
methods, the pod file's types, the real isolators (which plan what PLAN_GROUP is given, and what is launched), dispatch, the
launch transaction and the ledger are all the product's own; simulated are the machine and the launcher, and the clock,
which jumps over every wait. A fuzzer calls a function and wants it to return, so trio runs as a guest of that function's loop.

After every input: nothing but messages of the manual's forms came back, errors have a code of the manual and never
`internal`, no exception got as far as the log, nobody is connected any more, and who was refused everything has changed nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import msgpack
import trio
import trio.testing

from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.sets.loading import from_modules
from mesocosm.kernel.sets.planning import Planner
from mesocosm.kernel.testing import HOSTS
from mesocosm.kernel.testing.simulation import Simulation
from mesocosm.kernel.wire import framing
from mesocosm.kernel.wire.authority import Access, Principal
from mesocosm.kernel.wire.connection import Connection
from mesocosm.kernel.wire.server import Server
from mesocosm.plugins.executors import command, default
from mesocosm.plugins.frontends import mesos
from mesocosm.plugins.isolators import cgroups, hardening, namespaces, program, rlimits, rootfs, sandbox, seccomp, volumes

ISOLATORS: dict[str, ModuleType] = {
    "namespaces": namespaces, "cgroups": cgroups, "rootfs": rootfs, "sandbox": sandbox, "volumes": volumes,
    "hardening": hardening, "rlimits": rlimits, "seccomp": seccomp, "program": program,
}  # fmt: skip
CODES = {
    "bad_input", "bad_frame", "too_large", "not_found", "conflict", "dying", "denied", "over_budget", "unsupported",
    "launch_failed", "exec_failed", "timeout", "unknown_outcome",
}  # fmt: skip
DEEDS = {"launch_group", "run_group", "launch_nested_group", "launch_container", "kill_container", "begin_removal", "stop_agent"}
# Whoever is told one of these has changed nothing.
HARMLESS = CODES - {"launch_failed", "exec_failed", "timeout", "unknown_outcome"}
LIFE = 200  # inputs that one simulated host sees: what one of them launched is there for the next
BASE = {"name": "web", "tasks": [{"name": "db", "command": ["ignore", "TERM"]}, {"name": "done", "command": ["exit", "0"]}]}


class Finding(AssertionError):  # noqa: N818 - it is not an error of the test's but what the test is for
    """Something that must not be."""


class Service:
    """The agent; what is to be planned is planned by the real isolators as well. `asked`: how often it was to do something."""

    def __init__(self, agent: Agent, planner: Planner) -> None:
        self._agent = agent
        self._planner = planner
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        self.asked += name in DEEDS
        return getattr(self._agent, name)

    def plan_group(self, document: Any) -> Any:
        """As the agent plans it, and as an agent with the default set would."""
        self._agent.plan_group(document)
        return self._planner.plan_document(document)


class Counted(Connection):
    """A connection that counts the whole frames it looks at."""

    frames = 0

    async def _handle(self, body: bytes) -> None:
        self.frames += 1
        await super()._handle(body)


class SimulatedWorld:
    """The host of `converse`. Open with ``with``; it is renewed after LIFE inputs, and whenever an input stopped the agent."""

    def __init__(self) -> None:
        plugins = from_modules(ISOLATORS, {"mesos": mesos, "default": default, "command": command})
        self._planner = Planner(plugins, HOSTS["root, hybrid"])
        self.frames = 0  # whole ones that a connection has looked at
        self.since_renewal: list[bytes] = []
        self._loop: _Guest | None = None
        self._log = _Ears()

    def __enter__(self) -> Self:
        logging.getLogger("mesocosm").addHandler(self._log)
        logging.getLogger("mesocosm").propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("mesocosm").removeHandler(self._log)
        logging.getLogger("mesocosm").propagate = True
        self._end()

    def converse(self, sent: bytes) -> list[Any]:
        """All that a client is told that sends `sent`. Finding if that, or what became of the agent, breaks a rule."""
        if self._loop is None:
            self._loop = _Guest(self._planner)
            self.since_renewal.clear()
        self.since_renewal.append(sent)
        self._log.heard.clear()
        try:
            messages = self._judged(self._loop, sent)
        except BaseException:
            self._end()
            raise
        if self._loop.over or len(self.since_renewal) >= LIFE:
            self._end()
        return messages

    def _judged(self, loop: _Guest, sent: bytes) -> list[Any]:
        before, loop.service.asked = loop.state(), 0
        frames, told = loop.conversation(sent)
        self.frames += frames
        messages = _messages(told)
        for message in messages:
            _check_form(message)
        if self._log.heard:
            raise Finding(f"the log has an error: {self._log.heard[0]}")
        if loop.server.connections:
            raise Finding("the connection is still there")
        # Only of a lone request is it certain which answer is whose: numbers may come twice, and answers find nobody any more.
        is_refused = frames == 1 and len(messages) == 1 and messages[0][1] is not None and _is_harmless(messages[0])
        if (is_refused or not loop.service.asked) and loop.state() != before:
            raise Finding(f"nothing was to be done, and yet something was: {messages}")
        return messages

    def _end(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None


class _Ears(logging.Handler):
    """Hears what an agent's log would have: an `error` there is a bug."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record))


class _Guest:
    """One simulated host in a trio loop that runs while somebody waits for a conversation."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._directory = tempfile.TemporaryDirectory(prefix="meso-fuzz-")
        self._jobs: deque[Callable[[], object]] = deque()
        self._outcome: Any = None
        self.ready = False
        self._finish = trio.Event()
        trio.lowlevel.start_guest_run(
            self._live,
            run_sync_soon_threadsafe=self._jobs.append,
            done_callback=lambda outcome: setattr(self, "_outcome", outcome),
            host_uses_signal_set_wakeup_fd=True,
            clock=trio.testing.MockClock(autojump_threshold=0),
        )
        self._pump(lambda: self.ready)

    async def _live(self) -> None:
        self.simulation = Simulation(Path(self._directory.name))
        async with self.simulation.agent() as self.agent, trio.open_nursery() as self.nursery:
            await self.agent.launch_group(BASE)
            self.service: Any = Service(self.agent, self._planner)
            self.server = Server(self.service, version="9.9", run_id="abc123", access=Access(os.geteuid()))
            async with trio.open_nursery() as self.server.tasks:  # what `serve` would open; there is no listener here
                await trio.testing.wait_all_tasks_blocked()
                self.ready = True
                await self._finish.wait()
                self.server.tasks.cancel_scope.cancel()

    def state(self) -> object:
        """What must not have changed by a refusal: how much was made, how many programs ran, whether it is to go on."""
        made = sum(what == "do" for what, _ in self.simulation.machine.history)
        return made, len(self.simulation.launcher.started), self.over

    @property
    def over(self) -> bool:
        """Whether this agent has been told to stop."""
        return self.server.stopped.is_set() or self.agent._closing

    def conversation(self, sent: bytes) -> tuple[int, bytes]:
        """How many frames were looked at, and all that one client is told that sends these bytes and ends."""
        told: list[bytes] = []
        frames: list[int] = []

        async def client() -> None:
            ours, theirs = socket.socketpair()
            theirs.settimeout(0)
            connection = Counted(self.server, theirs, Principal("host", os.geteuid(), os.getegid(), os.getpid()))
            self.server.connections += 1
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._serve, connection, theirs)
                nursery.start_soon(_collect, stream, told)
                with contextlib.suppress(trio.BrokenResourceError):  # sent away in the middle
                    await stream.send_all(sent)
                    await trio.testing.wait_all_tasks_blocked()  # whatever can be answered now has been
                    await stream.send_eof()
            await trio.testing.wait_all_tasks_blocked()  # what goes on without its caller
            frames.append(connection.frames)

        self._jobs.append(lambda: self.nursery.start_soon(client))
        self._pump(lambda: bool(frames))
        return frames[0], b"".join(told)

    async def _serve(self, connection: Connection, sock: socket.socket) -> None:
        try:
            with sock:
                await connection.run()
        finally:
            self.server.connections -= 1

    def _pump(self, until: Callable[[], bool]) -> None:
        while not until():
            if self._outcome is not None:
                self._outcome.unwrap()
                raise Finding("the agent has ended")
            self._jobs.popleft()()

    def close(self) -> None:
        """Ends the loop, as kill -9 would end an agent."""
        self._jobs.append(self._finish.set)
        while self._outcome is None:
            self._jobs.popleft()()
        self._directory.cleanup()


async def _collect(stream: trio.SocketStream, into: list[bytes]) -> None:
    try:
        while data := await stream.receive_some(65536):
            into.append(data)
    except trio.BrokenResourceError:  # closed with something of ours unread
        pass


def _messages(told: bytes) -> list[Any]:
    """The messages in what a client was sent; Finding for bytes that are none."""
    found = []
    at = 0
    while at < len(told):
        length = int.from_bytes(told[at : at + 4], "big")
        body = told[at + 4 : at + 4 + length]
        if not 0 < length <= framing.MAX_FRAME or len(body) < length:
            raise Finding(f"an answer of {length} bytes, of which {len(body)} came")
        try:
            found.append(msgpack.unpackb(body))
        except ValueError as error:
            raise Finding(f"an answer that cannot be read: {error}") from None
        at += 4 + length
    return found


def _check_form(message: Any) -> None:
    match message:
        case [1, int() | None, dict(error), None]:
            _check_error(error)
        case [1, int(), None, dict()]:
            pass
        case [2, "STREAM", [{"stream": int(), "seq": int(), **rest}]]:
            if "error" in rest:
                _check_error(rest["error"])
        case _:
            raise Finding(f"not a message of the manual: {message!r:.300}")


def _check_error(error: Any) -> None:
    if error.get("code") not in CODES or not isinstance(error.get("message"), str) or not error["message"]:
        raise Finding(f"not an error of the manual: {error!r:.2000}")


def _is_harmless(message: Sequence[Any]) -> bool:
    """Whether this message says that what was asked for was refused."""
    return message[0] == 1 and message[2] is not None and message[2]["code"] in HARMLESS
