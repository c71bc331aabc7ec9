"""The operations, done to a real agent: a connection that outlives agents, pods from the model's, deaths.

What lives here: doing what `model.py` has chosen, and whether its answer is one that it may be. What must not: what has to hold
besides (`oracles.py`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

from mesocosm.kernel.client import Client, RemoteError, connect

PATIENCE = 60.0  # seconds for what takes a tenth of one
SECRET = "hunter2-is-in-no-log"
BIRD = {"name": "canary", "tasks": [{"name": "bird", "command": "while :; do echo beat; sleep 0.05; done"}]}


def load(name: str, path: Path) -> ModuleType:
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = load("mesocosm_soak_model", Path(__file__).with_name("model.py"))


class FoundError(Exception):
    """Something that must hold does not."""


class Pulse(threading.Thread):
    """Asks for a sign of life all the while, on each connection that it is given until that one's agent is gone."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._enough, self._given = threading.Event(), SimpleQueue[Client | None]()
        self._took: list[float] = []

    def go_on(self, client: Client) -> None:
        """Another agent."""
        self._given.put(client)

    def run(self) -> None:
        """Until `stop`."""
        while (client := self._given.get()) is not None:
            with client, contextlib.suppress(RemoteError):
                while not self._enough.wait(0.02):
                    began = time.monotonic()
                    client.ping()
                    self._took.append(time.monotonic() - began)

    def stop(self) -> dict[str, float]:
        """The figures, in milliseconds."""
        self._enough.set()
        self._given.put(None)
        self.join()
        took = sorted(self._took) or [0.0]
        return {"asked": len(took), "p99_ms": round(took[len(took) * 99 // 100] * 1000, 1), "max_ms": round(took[-1] * 1000, 1)}


class Operations:
    """One world, its canary and a client that survives its agents."""

    def __init__(self, world: Any, can: set[str]) -> None:
        self.world = world
        self.pulse = Pulse()
        self.pulse.start()
        self.model = model.Model(can)
        self.counts = {"operations": 0, "agents": 1, "quiet": 0}
        self._client: Client | None = None
        self._gates: dict[str, int] = {}
        self._directory = Path(world.directory) / "gates"
        self._directory.mkdir()
        os.chmod(self._directory, 0o755)
        self._left: set[str] = set()  # launches whose client has gone
        self.call("LAUNCH_GROUP", group=BIRD)
        self._canary = {name: line["pid"] for name, line in self.lines(canary=True).items() if name.startswith("canary")}

    def dial(self) -> Client:
        """A connection as the world's user: who a peer is, is who it was when it connected."""
        mine = os.geteuid()
        with contextlib.ExitStack() as stack:
            if mine != self.world.uid:
                os.seteuid(self.world.uid)
                stack.callback(os.seteuid, mine)
            return connect(self.world.run_dir / "agent.sock", timeout=PATIENCE)

    @property
    def client(self) -> Client:
        """A connection; if there is no agent, the next verb starts one."""
        if self._client is None:
            try:
                self._client = self.dial()
            except RemoteError as error:
                if error.code != "agent_gone":
                    raise
                answer = self.world.meso("ps", "--json")
                if answer.code != 0:
                    raise FoundError(f"ps: {answer.code} {answer.err}") from None
                self.counts["agents"] += 1
                self._client = self.dial()
            self.pulse.go_on(self.dial())
        return self._client

    def call(self, method: str, **params: Any) -> Any:
        """One request."""
        return self.client.call(method, **params)

    def code(self, method: str, **params: Any) -> str:
        """The code of its answer."""
        try:
            self.call(method, **params)
        except RemoteError as error:
            return error.code
        return "ok"

    def lines(self, *, canary: bool = False) -> dict[str, dict[str, Any]]:
        """`ps -a` by id, with the canary's or without."""
        lines = self.call("GET_CONTAINERS", all=True)["containers"]
        return {line["id"]: line for line in lines if canary or line["id"].partition(".")[0] != "canary"}

    def do(self, made: Any) -> None:
        """Carries an operation out; FoundError if its answer is another one than it may be."""
        self.counts["operations"] += 1
        said = getattr(self, f"_{made.kind}")(made) or "ok"
        if said not in made.answers:
            raise FoundError(f"{made} was answered {said!r}, and may be answered {made.answers}")
        if made.kind != "quiet":
            self.model.done(made)

    def document(self, made: Any) -> dict[str, Any]:
        """Its pod."""
        executor = "command" if made.kind == "single" else "default"
        return {
            "name": made.target,
            "executor": executor,
            "tasks": self.tasks(made.tasks, made.target, alone=made.kind == "single"),
        }

    def tasks(self, tasks: Any, around: str, *, alone: bool = False) -> list[dict[str, Any]]:
        """Its tasks, and a gate for each that waits at one."""
        made = []
        for task in tasks:
            container_id = around if alone else f"{around}.{task.name}"
            document: dict[str, Any] = {"name": task.name, "essential": task.essential, "sidecar": task.sidecar}
            document["kill"] = {"signal": "TERM", "grace": "10s"} if task.program == "polite" else {"signal": "KILL"}
            document["env"] = {"TOKEN": SECRET}
            if task.program in ("gate", "polite"):
                self._gate(container_id)
                document["volumes"] = [{"source": f"host:{self._directory}", "target": "/gates"}]
            trap = "trap 'exit 5' TERM; " if task.program == "polite" else ""
            wait = f"{trap}exec 3<>/gates/{container_id}; read code <&3; exit $code"
            document["command"] = {
                "brief": f"exit {task.code}", "hungry": "exec tail /dev/zero", "absent": ["/no/such/program"],
            }.get(task.program, wait)  # fmt: skip
            if task.limited:
                document["resources"] = {"memory": "16MiB" if task.program == "hungry" else "64MiB", "pids": 32}
            if task.tasks:
                document["tasks"] = self.tasks(task.tasks, container_id)
            made.append(document)
        return made

    def _gate(self, container_id: str) -> None:
        box = self.model.boxes.get(container_id)
        if box is not None and not box.dead:
            return  # a launch that is to be refused, since somebody of the name lives
        path = self._directory / container_id
        if container_id in self._gates:
            os.close(self._gates.pop(container_id))
            path.unlink()  # of an earlier one of the name, which may have left something in it
        os.mkfifo(path)
        path.chmod(0o666)
        self._gates[container_id] = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def _launch(self, made: Any) -> str:
        return self.code("LAUNCH_GROUP", group=self.document(made))

    _single = _launch

    def _nested(self, made: Any) -> str:
        return self.code("LAUNCH_NESTED_GROUP", container_id=made.target, tasks=self.tasks(made.tasks, made.target))

    def _begin(self, made: Any) -> Client:
        """A launch on a connection of its own, so many milliseconds later."""
        self.client.ping()
        other = self.dial()
        other._send("LAUNCH_GROUP", {"group": self.document(made)})
        time.sleep(made.number / 1000)
        return other

    def _launch_and_die(self, made: Any) -> None:
        with self._begin(made):
            self._kill_agent(signal.SIGKILL)

    def _launch_and_leave(self, made: Any) -> None:
        self._begin(made).close()
        self._left.add(made.target)

    def _launch_and_kill(self, made: Any) -> str:
        self._begin(made).close()
        self._left.add(made.target)
        return self.code("KILL_CONTAINER", container_id=made.target)

    def _launch_starved(self, made: Any) -> str:
        self.client.ping()
        agent = self.world.agent_pid()
        time.sleep(0.02)  # what has been asked before has been closed
        before = open_files(agent)
        self._limit_files(agent, len(os.listdir(f"/proc/{agent}/fd")) + made.number)
        try:
            return self.code("LAUNCH_GROUP", group=self.document(made))
        finally:
            self._limit_files(agent, before)

    def _limit_files(self, agent: int, number: int) -> None:
        """By a process of the agent's own user: others need a capability for it that not even root has everywhere."""
        subprocess.run(self.world.as_user("prlimit", "--pid", str(agent), f"--nofile={number}:"), check=True)

    def _end(self, made: Any) -> None:
        os.write(self._gates[made.target], f"{made.number}\n".encode())

    def _kill(self, made: Any) -> str:
        return self.code("KILL_CONTAINER", container_id=made.target)

    def _signal(self, made: Any) -> str:
        return self.code("KILL_CONTAINER", container_id=made.target, signal=made.signal)

    def _wait(self, made: Any) -> str:
        try:
            wait = self.client.wait(made.target, PATIENCE)
        except RemoteError as error:
            return error.code
        self._check(self.model.wrong_wait(made.target, wait))
        return "ok"

    def _remove(self, made: Any) -> str:
        return self.code("REMOVE_CONTAINER", container_id=made.target)

    def _agent_dies(self, made: Any) -> None:
        self.client.ping()
        self._kill_agent(signal.Signals[f"SIG{made.signal}"])
        if made.number:  # and the next one in the middle of its beginning
            process = self.world.start("agent", "--idle-exit", "60s")
            time.sleep(made.number / 1000)
            process.kill()
            process.communicate()

    def _kill_agent(self, number: signal.Signals) -> None:
        self._signal_and_wait(self.world.agent_pid(), number)
        if self._client is not None:
            self._client.close()
        self._client = None

    def _signal_and_wait(self, pid: int, number: signal.Signals) -> None:
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, number)
            if not select.select([process], [], [], PATIENCE)[0]:
                raise FoundError(f"process {pid} goes on after {number.name}")
        finally:
            os.close(process)

    def _agent_stops(self, made: Any) -> None:
        self.client.ping()
        agent = os.pidfd_open(self.world.agent_pid())
        signal.pidfd_send_signal(agent, signal.SIGSTOP)
        time.sleep(made.number / 1000)
        signal.pidfd_send_signal(agent, signal.SIGCONT)
        os.close(agent)

    def _launcher_dies(self, _: Any) -> None:
        # It has done all that it was asked before: what was launched with the last breath may never start (system/every_call.py).
        self._probe(())
        self._signal_and_wait(self.world.launcher_pid(), signal.SIGKILL)
        self._probe(("launch_failed", "dying"))  # until the next one has taken its place

    def _probe(self, refusals: Collection[str]) -> None:
        """A container that is launched and ends."""
        probe = {"name": "probe", "executor": "command", "tasks": [{"name": "probe", "command": ["true"]}]}
        deadline = time.monotonic() + PATIENCE
        while (said := self.code("LAUNCH_GROUP", group=probe)) != "ok":
            if said not in refusals or time.monotonic() > deadline:
                raise FoundError(f"beside the launcher's death a launch was answered {said}")
            time.sleep(0.05)
        self.client.wait("probe", PATIENCE)
        self.call("REMOVE_CONTAINER", container_id="probe")

    def _check(self, findings: Iterator[str]) -> None:
        if wrong := list(findings):
            raise FoundError("; ".join(wrong[:8]))


def open_files(pid: int) -> int:
    """How many it may have."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(int(line.split()[3]) for line in lines if line.startswith("Max open files"))
