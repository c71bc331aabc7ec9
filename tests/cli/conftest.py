"""An agent that gives canned answers on a real socket: what the command says to it, and shows of it, can be tested alone.

Just enough of the wire (frames, threads), and no behaviour of the agent. `meso` runs the command in this process, `meso_process`
in one of its own, with the run directory in the test's own directory either way.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

from mesocosm.kernel.cli.main import main

Answer = Callable[..., Any]


class Refusal(Exception):  # noqa: N818 - what it stands for is no error of ours
    """Raised by a canned answer: the error object to answer with."""

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message, **fields}


class FakeAgent:
    """Serves `answers` (method → function of the parameters; a generator is a stream) on `path` until closed.

    `asked` is what was asked, in order: (method, parameters).
    """

    def __init__(self, path: Path, answers: Mapping[str, Answer]) -> None:
        self.path = path
        self.answers = dict(answers)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._open: list[socket.socket] = []
        self._streams = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Hangs up on everybody, like an agent that was killed."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        for peer in self._open:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        lock = threading.Lock()
        with peer, contextlib.suppress(OSError, EOFError):
            while True:
                length = int.from_bytes(_exactly(peer, 4), "big")
                kind, *rest = msgpack.unpackb(_exactly(peer, length))
                if kind == 0:
                    number, method, [params] = rest
                    self.asked.append((method, params))
                    threading.Thread(target=self._answer, args=(peer, lock, number, method, params), daemon=True).start()

    def _answer(self, peer: socket.socket, lock: threading.Lock, number: int, method: str, params: dict[str, Any]) -> None:
        def send(message: Any) -> int:
            body = msgpack.packb(message)
            with lock, contextlib.suppress(OSError):
                peer.sendall(len(body).to_bytes(4, "big") + body)
            return len(body)

        try:
            answer = self.answers.get(method)
            if answer is None:
                raise Refusal("unsupported", f"no method {method}")
            result = answer(**params)
        except Refusal as refusal:
            send([1, number, refusal.error, None])
            return
        if not inspect.isgenerator(result):
            send([1, number, None, result])
            return
        with lock:
            self._streams += 1
            stream = self._streams
        send([1, number, None, {"stream": stream}])
        self._send_items(send, stream, result)

    def _send_items(self, send: Callable[[Any], int], stream: int, items: Iterator[Any]) -> None:
        seq = total = 0
        error = None
        try:
            for item in items:
                total += send([2, "STREAM", [{"stream": stream, "seq": seq, "item": item}]])
                seq += 1
        except Refusal as refusal:
            error = refusal.error
        send([2, "STREAM", [{"stream": stream, "seq": seq, "end": True, "bytes": total, **({"error": error} if error else {})}]])


def _exactly(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = peer.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data


class Said(NamedTuple):
    """What the command left behind."""

    code: int
    out: str
    err: str


class Group:
    """Canned answers for the launch of a group: what its members print, and how they end.

    `release` is awaited between `started` and the end; KILL_CONTAINER sets it, and `killed`.
    """

    def __init__(self, *, output: Mapping[tuple[str, str], bytes] | None = None, code: int = 0, hold: bool = False) -> None:
        self.output = dict(output or {})
        self.code = code
        self.release = threading.Event()
        self.kills: list[Any] = []
        self.seq = 0
        if not hold:
            self.release.set()

    def answers(self) -> dict[str, Answer]:
        """For a FakeAgent."""
        return {"LAUNCH_GROUP": self.launch, "KILL_CONTAINER": self.kill, "READ_LOGS": self.read_logs}

    def line(self, kind: str, container_id: str, **fields: Any) -> dict[str, Any]:
        """An event line."""
        self.seq += 1
        return {"v": 1, "seq": self.seq, "time": time.time(), "id": container_id, "type": kind, **fields}

    def launch(self, group: dict[str, Any], stream: bool = False) -> Any:  # noqa: FBT001, FBT002 - the wire's own parameter
        name = group["name"]
        alone = group.get("executor") == "command"
        ids = [name] if alone else [name, *(f"{name}.{task['name']}" for task in group["tasks"])]
        return self.events(name, ids) if stream else {"id": name, "state": "RUNNING", "containers": ids}

    def events(self, name: str, ids: list[str]) -> Iterator[dict[str, Any]]:
        yield self.line("planned", name, containers=ids)
        for each in ids:
            yield self.line("staged", each)
        yield self.line("committed", name)
        for each in ids:
            yield self.line("started", each, pid=1)
        self.release.wait(20)
        waits = {}
        for each in reversed(ids):
            wait = (
                {"id": each, "exit": None, "signal": 15, "reason": "killed"}
                if self.kills
                else {"id": each, "exit": self.code, "signal": None}
            )
            waits[each] = wait
            yield self.line("exited", each, wait=wait)
            yield self.line("dead", each, wait=wait)
        yield {
            **self.line("end", name),
            "state": "DEAD",
            "exit": 143 if self.kills else self.code,
            "containers": waits,
            "error": None,
        }

    def kill(self, container_id: str, signal: int | None = None) -> dict[str, Any]:
        self.kills.append(signal)
        self.release.set()
        return {}

    def read_logs(self, container_id: str, stream: str, offset: int, follow: bool) -> Iterator[dict[str, Any]]:  # noqa: FBT001
        data = self.output.get((container_id, stream), b"")
        for start in range(offset, len(data), 7):  # cut anywhere: also inside characters and escape sequences
            yield {"offset": start, "data": data[start : start + 7]}


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory of this test."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    for name in ("MESOCOSM_SOCKET", "MESOCOSM_SET", "MESOCOSM_ID", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MESOCOSM_RUN_DIR", str(directory))
    monkeypatch.setenv("MESOCOSM_STATE_DIR", str(tmp_path / "state"))
    return directory


@pytest.fixture
def fake_agent(run_dir: Path) -> Iterator[Callable[[Mapping[str, Answer]], FakeAgent]]:
    """Starts a FakeAgent on the default socket."""
    agents: list[FakeAgent] = []

    def start(answers: Mapping[str, Answer]) -> FakeAgent:
        agents.append(FakeAgent(run_dir / "agent.sock", answers))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


@pytest.fixture
def meso(run_dir: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Callable[..., Said]:
    """Runs the command in this process."""

    def run(*words: str) -> Said:
        code = main(words)
        out, err = capsysbinary.readouterr()
        return Said(code, out.decode(), err.decode())

    return run


@pytest.fixture
def meso_process(run_dir: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts the command as a process; what is left of it at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **options: Any) -> subprocess.Popen[bytes]:
        defaults: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-m", "mesocosm.kernel.cli.main", *words]
        started.append(subprocess.Popen(command, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, **{**defaults, **options}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def kit() -> type[Kit]:
    """The classes of this page, for tests that need them by name."""
    return Kit


class Kit:
    """See `kit`."""

    FakeAgent = FakeAgent
    Group = Group
    Refusal = Refusal
