"""A service that does nothing real, a server around it on a real socket, and a peer that may say whatever it likes."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from mesocosm.kernel.core.errors import ConflictError, NotFoundError, SpecError
from mesocosm.kernel.wire.authority import Access, Principal
from mesocosm.kernel.wire.connection import Limits
from mesocosm.kernel.wire.listening import Listener, bind
from mesocosm.kernel.wire.server import Server


class FakeService:
    """Answers as an agent would, from memory. `finished` are the launches that went on to their end."""

    def __init__(self) -> None:
        self.finished: list[str] = []
        self.begun: list[str] = []
        self.waiting = 0
        self.streaming = 0
        self.gate = trio.Event()
        self.line: dict[str, Any] = {"id": "web.db", "parent": "web", "state": "RUNNING", "pid": 7}

    async def launch_group(self, document: Any) -> Any:
        if "tasks" not in document:
            raise SpecError("'tasks' is missing", path="$.tasks")
        self.begun.append(document["name"])
        if document["name"] == "slow":
            await self.gate.wait()
        self.finished.append(document["name"])
        return {"id": document["name"], "state": "RUNNING", "containers": [document["name"], document["name"] + ".db"]}

    async def run_group(self, document: Any) -> AsyncGenerator[dict[str, Any], None]:
        yield {"v": 1, "seq": 1, "id": document["name"], "type": "planned"}
        yield {"v": 1, "seq": 2, "id": document["name"], "type": "end", "state": "DEAD", "exit": 0}

    async def plan_group(self, document: Any) -> Any:
        return {"v": 1, "group": document["name"], "containers": []}

    async def launch_nested_group(self, container_id: str, tasks: Any) -> Any:
        return {"id": container_id, "containers": [f"{container_id}.{task['name']}" for task in tasks]}

    async def run_nested_group(self, container_id: str, tasks: Any) -> AsyncGenerator[dict[str, Any], None]:
        yield {"v": 1, "seq": 1, "id": container_id, "group": f"{container_id}+1", "type": "end", "state": "DEAD", "exit": 0}

    async def launch_container(self, document: Any) -> Any:
        return {"id": document["container_id"], "command": document["command"]}

    async def wait_container(self, container_id: str) -> Any:
        self.waiting += 1
        try:
            if container_id == "web.db":
                await self.gate.wait()
            return {"id": container_id, "status": 0, "exit": 0, "signal": None, "reason": "exited"}
        finally:
            self.waiting -= 1

    def ended(self, container_id: str) -> Any:
        return {"id": container_id, "exit": 0} if container_id == "ended" else None

    async def kill_container(self, container_id: str, signal: Any) -> None:
        if container_id == "nobody":
            raise NotFoundError("no container 'nobody'", id="nobody")
        if container_id == "bug":
            raise RuntimeError("a bug")
        if container_id == "group":
            raise ExceptionGroup("two", [NotFoundError("inside a group"), NotFoundError("another")])
        self.finished.append(f"kill {container_id} {signal}")

    async def _removed(self, container_id: str) -> None:
        self.finished.append(f"remove {container_id}")

    def begin_removal(self, container_id: str) -> Any:
        if container_id == "alive":
            raise ConflictError("alive is RUNNING", id="alive")
        if container_id != "ended":
            return self._removed(container_id)
        self.finished.append("remove ended at once")
        return None

    def get_containers(self, include_dead: bool) -> Any:  # noqa: FBT001 - as the Protocol has it
        return [self.line] * (20_000 if include_dead else 1)

    async def history(self, container_id: str | None, **bounds: Any) -> Any:
        return {"history": [], "next": None, "notes": [], "durable": 0}

    def explain(self, container_id: str, life: int | None) -> Any:
        return {"id": container_id, "unsendable": object()}

    def set_aside(self, forget: Any) -> Any:
        return {"path": "/run/ledger.db", "trouble": None, "set_aside": []}

    def plugins(self) -> Any:
        return []

    async def audit(self, repair: bool) -> Any:  # noqa: FBT001 - as the Protocol has it
        return {"leftover": [], "missing": [], "strangers": [], "notes": [f"repair: {repair}"]}

    async def events(self, since: int, container_id: str | None) -> AsyncGenerator[dict[str, Any], None]:
        self.streaming += 1
        try:
            seq = since
            while True:
                seq += 1
                yield {"v": 1, "seq": seq, "type": "output", "text": "x" * 1000 if container_id == "flood" else ""}
                if container_id == "web" and seq == 3:
                    await trio.sleep_forever()
        finally:
            self.streaming -= 1

    async def read_logs(
        self, container_id: str, stream: str, offset: int, *, follow: bool, previous: bool
    ) -> AsyncGenerator[tuple[int, bytes, int], None]:
        if container_id == "nobody":
            raise NotFoundError("no container 'nobody'", id="nobody")
        if container_id == "big":
            yield 0, b"z" * 600_000, 0
            return
        if container_id == "flood" and offset < 4096:
            yield offset, b"", 4096 - offset
            offset = 4096
        yield offset, b"hello\n", 0
        yield offset + 6, b"world\n", 0
        if follow:
            await self.gate.wait()

    async def stop_agent(self) -> None:
        self.finished.append("stop")


class Peer:
    """A connection that speaks bytes, and messages when it is asked to."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._held = b""

    async def send(self, *messages: Any) -> None:
        await self.stream.send_all(b"".join(framed(message) for message in messages))

    async def receive(self) -> Any:
        """The next message; None at the end of the connection."""
        while len(self._held) < 4 or len(self._held) < 4 + int.from_bytes(self._held[:4], "big"):
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:  # closed by the other side with something of ours unread
                return None
            if not data:
                return None
            self._held += data
        end = 4 + int.from_bytes(self._held[:4], "big")
        body, self._held = self._held[4:end], self._held[end:]
        return msgpack.unpackb(body)

    async def ask(self, method: str, number: int = 1, **params: Any) -> Any:
        await self.send([0, number, method, [params]])
        return await self.receive()


def framed(message: Any) -> bytes:
    body: bytes = msgpack.packb(message)
    return len(body).to_bytes(4, "big") + body


class Bench:
    """A running server, its service, and where it listens."""

    def __init__(self, server: Server, service: FakeService, listener: Listener) -> None:
        self.server, self.service, self.listener, self.path = server, service, listener, listener.path

    @asynccontextmanager
    async def peer(self) -> AsyncIterator[Peer]:
        async with await trio.open_unix_socket(str(self.path)) as stream:
            yield Peer(stream)


def host(_: socket.socket, __: str) -> Principal:
    return Principal("host", os.geteuid(), os.getegid(), os.getpid())


Serving = Callable[..., AbstractAsyncContextManager[Bench]]


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    """``async with serving(Limits(…)) as bench``: a server for the length of a block."""

    @asynccontextmanager
    async def serve(
        limits: Limits | None = None, identify: Callable[[socket.socket, str], Principal] = host
    ) -> AsyncIterator[Bench]:
        tmp_path.chmod(0o755)
        service = FakeService()
        failure: Exception | None = None
        with bind(tmp_path / "agent.sock") as listener:
            server = Server(service, version="9.9", run_id="abc123", access=Access(os.geteuid()), limits=limits, identify=identify)
            async with trio.open_nursery() as nursery:
                await nursery.start(lambda *, task_status: server.serve(listener, task_status=task_status))
                try:
                    yield Bench(server, service, listener)
                except Exception as error:
                    failure = error
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    return serve


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Returns once `condition` holds; fails after `seconds`."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


@pytest.fixture(name="until")
def until_fixture() -> Any:
    return until


@pytest.fixture(name="framed")
def framed_fixture() -> Any:
    return framed


@pytest.fixture
def open_fds() -> Callable[[], int]:
    """How many file descriptors this process has open."""
    return lambda: len(os.listdir("/proc/self/fd"))
