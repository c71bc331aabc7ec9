"""The soak: random operations on a real machine for a while, and at every quiet point everything that must hold.

    python tests/soak/soak.py [--seconds 600] [--seed N] [--as root|user] [--operations N] [--list]

The operations come from `model.py`: a function of the seed alone. It is printed at the start, and on failure with the command that
does the same operations again; `--operations` ends after so many, `--list` only shows them. As root half of the time is an ordinary
user's, unless `--as` chooses. Not the same in a second run are the moments: how far a launch is when the agent dies in it, in which
order things end that end at once, which pids they have.

The oracles, and what they are here:

O1  census     at every base point (nothing but the canary lives) the machine is as at the first one: processes, control groups,
               mounts, namespaces, devices, System V objects, and the launcher's open files (mesocosm.kernel.testing.census); when
               the launcher was killed, as at the first base point since
O2  ledger     at every quiet point `ps -a` is what the model says, both ways, the directories of containers are those of the
               containers, and `audit` finds nothing (where there is an audit)
O3  one end    every container that ran is told `exited` and `dead` once, with the WAIT that `wait` and `ps` tell, which is one that
               the operations allow and never changes; events are numbered without a gap over all agents
O4  allocation ranges of ids are the only thing that is allocated here: checked where they can be seen, on the simulated host
O5  answers    a connection of its own asks for a sign of life all the while: no answer takes longer than PATIENCE
O6  others     the canary pod has the same processes and goes on beating
O7  secrets    the environment of containers is in no log and in nobody's arguments (events carry the plan, to its own user)
O8  same log   of the same seed: on the simulated host (tests/runtime/test_random_operations.py), where there is no other timing
O9  flat       after WARM base points: descriptors and threads of agent and launcher the same; memory and ledger grow by no more
               than 2 %, or the noise floor NOISE
O10 sentinels  /etc/passwd, /etc/group, the core pattern, our own interpreter and the host's name are as before
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import pytest

from mesocosm.kernel.client import Client, RemoteError, connect
from mesocosm.kernel.linux.probe import run_id
from mesocosm.kernel.testing.census import Census, census, left_over

HERE = Path(__file__).resolve().parent
PATIENCE = 60.0  # seconds for what takes a tenth of one
BASE_EVERY = 150  # operations
WARM = 2  # base points until everything has its size
# The agent at a base point may be one of a second or one of a minute; its worker threads end when they have been idle for a while,
# and the history is full only after 20,000 events.
NOISE = {"agent_kib": 8192, "agent_threads": 40, "launcher_kib": 1024, "ledger_kib": 16384}
SENTINELS = ("/etc/passwd", "/etc/group", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", sys.executable)
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


model = load("mesocosm_soak_model", HERE / "model.py")
worlds = load("mesocosm_soak_worlds", HERE.parent / "system" / "worlds.py")


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


class Soak:
    """One world, its canary and a client that survives its agents."""

    def __init__(self, world: Any, can: set[str]) -> None:
        self.world = world
        self.pulse = Pulse()
        self.pulse.start()
        self.model = model.Model(can)
        self.told = model.Told()
        self.samples: list[dict[str, int]] = []
        self.counts = {"operations": 0, "agents": 1, "quiet": 0}
        self._client: Client | None = None
        self._gates: dict[str, int] = {}
        self._directory = Path(world.directory) / "gates"
        self._directory.mkdir()
        os.chmod(self._directory, 0o755)
        self._left: set[str] = set()  # launches whose client has gone
        self._beats = 0
        self._before: Census | None = None
        self._sentinels = sentinels()
        self.call("LAUNCH_GROUP", group=BIRD)
        self._canary = {name: line["pid"] for name, line in self.lines(canary=True).items() if name.startswith("canary")}

    # -- talking ------------------------------------------------------------------------------------------------

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

    # -- operations ---------------------------------------------------------------------------------------------

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
        self.client.ping()
        self._signal_and_wait(self.world.launcher_pid(), signal.SIGKILL)
        probe = {"name": "probe", "executor": "command", "tasks": [{"name": "probe", "command": ["true"]}]}
        deadline = time.monotonic() + PATIENCE
        while (said := self.code("LAUNCH_GROUP", group=probe)) != "ok":  # until the next one has taken its place
            if said not in ("launch_failed", "dying") or time.monotonic() > deadline:
                raise FoundError(f"after the launcher's death a launch was answered {said}")
            time.sleep(0.05)
        self.client.wait("probe", PATIENCE)
        self.call("REMOVE_CONTAINER", container_id="probe")

    # -- looking ------------------------------------------------------------------------------------------------

    def _check(self, findings: Iterator[str]) -> None:
        if wrong := list(findings):
            raise FoundError("; ".join(wrong[:8]))

    def _quiet(self, made: Any) -> None:
        """Everything that has to end has ended, and all of it is as it has to be."""
        self.counts["quiet"] += 1
        for box in self.model.boxes.values():
            if not box.lives and not box.dead:
                self._wait(made._replace(target=box.id))
        lines = self._settled()
        self._check(self.model.findings(lines))
        unsure = set(self.model.unsure)
        for name in sorted(unsure & lines.keys()):
            if lines[name]["state"] == "RUNNING":
                self.call("KILL_CONTAINER", container_id=name)
                self.client.wait(name, PATIENCE)
            self.call("REMOVE_CONTAINER", container_id=name)
        self._left.clear()
        self.model.done(made)
        self._hear(unsure)
        self._directories()
        self._others()

    def _settled(self) -> dict[str, dict[str, Any]]:
        """The lines, once what is unsure is one or the other: a launch goes on without its client, and perhaps it has not begun."""
        deadline, appear = time.monotonic() + PATIENCE, time.monotonic() + 2
        while True:
            lines = self.lines()
            mine = {name: line for name, line in lines.items() if name.partition(".")[0] in self.model.unsure}
            missing = self._left - lines.keys()
            if {line["state"] for line in mine.values()} <= {"RUNNING", "DEAD"} and not (missing and time.monotonic() < appear):
                return lines
            if time.monotonic() > deadline:
                raise FoundError(f"still neither running nor dead: {mine}")
            time.sleep(0.05)

    def _hear(self, unsure: set[str]) -> None:
        """All events up to the end of a container that is launched to be the last one told of."""
        mark = {"name": "mark", "executor": "command", "tasks": [{"name": "mark", "command": ["true"]}]}
        self.call("LAUNCH_GROUP", group=mark)
        self.client.wait("mark", PATIENCE)
        stream = self.client.events(self.told.seq)
        while True:
            line = stream.next(timeout=PATIENCE)
            self.told.hear(line)
            if line["type"] == "end" and line["id"] == "mark":
                break
        stream.close()
        self.call("REMOVE_CONTAINER", container_id="mark")
        dead = Counter({found: count for found, count in self.told.dead.items() if found.partition(".")[0] in model.NAMES})
        for found in dead:
            if found.partition(".")[0] in unsure:
                self.model.deaths[found] = dead[found]
        self._check(iter(self.told.wrong))
        often, rarely = dead - self.model.deaths, self.model.deaths - dead
        if often or rarely:
            raise FoundError(f"told dead too often: {often}, too rarely: {rarely}")

    def _directories(self) -> None:
        kept = {box.id for box in self.model.boxes.values() if ("rolled_back", None, None) not in box.endings} | self._canary.keys()
        deadline = time.monotonic() + 2 * PATIENCE  # what could not be undone for want of descriptors is parked, and tried again
        while (there := {path.name for path in (self.world.run_dir / "containers").iterdir()}) != kept:
            if kept - there or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if there != kept:
            raise FoundError(
                f"directories without a container: {sorted(there - kept)}; containers without one: {sorted(kept - there)}"
            )
        for container_id in [found for found in self._gates if found not in self.model.boxes]:
            os.close(self._gates.pop(container_id))
            (self._directory / container_id).unlink()
        try:
            found = self.call("AUDIT")
        except RemoteError as error:
            if error.code != "unsupported":
                raise
        else:
            if found.get("leftover") or found.get("missing"):
                raise FoundError(f"audit: {found}")

    def _others(self) -> None:
        lines = self.lines(canary=True)
        pids = {name: lines[name]["pid"] for name in self._canary if name in lines}
        if pids != self._canary:
            raise FoundError(f"the canary was {self._canary} and is {pids}")
        log = self.world.run_dir / "containers/canary.bird/stdout"
        deadline = time.monotonic() + PATIENCE
        while log.stat().st_size <= self._beats:
            if time.monotonic() > deadline:
                raise FoundError("the canary has stopped")
            time.sleep(0.02)
        self._beats = log.stat().st_size
        if (now := sentinels()) != self._sentinels:
            raise FoundError(f"changed: {sorted(name for name in now if now[name] != self._sentinels[name])}")

    def base(self) -> None:
        """Ends and removes all but the canary; then the machine has to be as it was the first time."""
        self._quiet(model.Operation("quiet"))
        for name in sorted(name for name in self.lines() if "." not in name):
            self.code("KILL_CONTAINER", container_id=name)
        for name in sorted(name for name in self.lines() if "." not in name):
            self.client.wait(name, PATIENCE)
            self.call("REMOVE_CONTAINER", container_id=name)
        self.model.clear()
        self._hear(set())
        self._directories()
        agent, launcher = self.world.agent_pid(), self.world.launcher_pid()
        ignore = [agent, os.getpid(), self._canary["canary.bird"]]
        keys = "APART" not in os.environ
        if self._before is None or launcher not in self._before.pids:
            self._before = census(pids=[launcher], ignore=ignore, run_id=run_id(str(self.world.run_dir)), keys=keys)
        left = left_over(dataclasses.replace(self._before, ignore=frozenset(ignore)), seconds=PATIENCE)
        if left:
            raise FoundError(f"the machine is not as it was: {left[:10]}")
        self._secrets()
        self.samples.append({**use("agent", agent), **use("launcher", launcher), "ledger_kib": self._ledger()})
        self._flat()

    def _ledger(self) -> int:
        return sum(path.stat().st_size for path in self.world.run_dir.glob("ledger.db*")) // 1024

    def _secrets(self) -> None:
        for log in ("agent.log", "launcher.log"):
            path = self.world.run_dir / log
            if path.exists() and SECRET in path.read_text(errors="replace"):
                raise FoundError(f"{log} has the environment of a container in it")
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and SECRET.encode() in (entry / "cmdline").read_bytes():
                    raise FoundError(f"process {entry.name} has the environment of a container among its arguments")

    def _flat(self) -> None:
        if len(self.samples) <= WARM:
            return
        first, last = self.samples[WARM - 1], self.samples[-1]
        for what, value in last.items():
            allowed = max(first[what] * 2 // 100, NOISE.get(what, 0))
            if value > first[what] + allowed:
                raise FoundError(f"{what} was {first[what]} and is {value}; allowed is {allowed} more: {self.samples}")

    def close(self) -> None:
        """The connections and the gates."""
        self.pulse.stop()
        for fd in self._gates.values():
            os.close(fd)
        if self._client is not None:
            self._client.close()


def use(name: str, pid: int) -> dict[str, int]:
    """What a process has: KiB of its own, threads, open files as far as they may be counted."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {f"{name}_kib": int(fields["RssAnon"].split()[0]), f"{name}_threads": int(fields["Threads"])}
    with contextlib.suppress(PermissionError):
        found[f"{name}_files"] = len(os.listdir(f"/proc/{pid}/fd"))
    return found


def open_files(pid: int) -> int:
    """How many it may have."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return next(int(line.split()[3]) for line in lines if line.startswith("Max open files"))


def sentinels() -> dict[str, str]:
    """What nobody may change."""
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in SENTINELS}


def abilities(world: Any) -> set[str]:
    """What the machine can do for this user."""
    world.meso("ps")  # an agent
    checks = {line["check"]: line["ok"] for line in world.meso("doctor", "--json").lines}
    found = {"descriptors"} if shutil.which("prlimit") and os.access(f"/proc/{world.agent_pid()}/fd", os.R_OK) else set()
    if checks.get("cgroups") and world.meso("run", "--name", "probe", "--memory", "32MiB", "--", "true").code == 0:
        found.add("limits")
        world.meso("rm", "probe")
    return found | {"launcher"}


def replay(rng: random.Random, can: set[str]) -> Iterator[Any]:
    """The operations of a seed, without a machine."""
    dry = model.Model(can)
    for number in range(1, 10**9):
        made = dry.choose(rng)
        dry.done(made)
        yield made
        if number % BASE_EVERY == 0:
            dry.clear()
            dry.done(model.Operation("quiet"))


def run(kind: str, seed: int, seconds: float, operations: int) -> bool:
    """One world; whether all held. What did not is printed, with the way to see it again."""
    print(f"soak: as {kind}, seed {seed}, for {seconds:.0f} s", flush=True)
    began = time.monotonic()
    with worlds.open_world(kind) as world:
        can = abilities(world)
        soak = Soak(world, can)
        done: list[str] = []
        try:
            soak.base()
            for made in replay(random.Random(seed), can):
                done.append(str(made))
                soak.do(made)
                if len(done) % BASE_EVERY == 0:
                    soak.base()
                if len(done) >= operations or time.monotonic() - began > seconds:
                    break
            soak.base()
            figures = soak.pulse.stop()
            if figures["max_ms"] > PATIENCE * 1000:
                raise FoundError(f"an answer took {figures['max_ms']} ms")
        except (FoundError, RemoteError, AssertionError, OSError) as error:
            print(f"soak: FAILED after {len(done)} operations: {type(error).__name__}: {error}")
            print("soak: the last of them:", *done[-40:], sep="\n    ")
            for log in ("agent.log", "launcher.log"):
                with contextlib.suppress(OSError):
                    print(f"soak: the end of {log}:", (world.run_dir / log).read_text(errors="replace")[-3000:], sep="\n")
            print(f"soak: the same again: make soak ARGS='--as {kind} --seed {seed} --operations {len(done)} --seconds 86400'")
            return False
        finally:
            soak.close()
        told = {"dead": sum(soak.told.dead.values()), "events": soak.told.seq, "bases": len(soak.samples), **figures}
        print(f"soak: {json.dumps({'as': kind, 'seed': seed, **soak.counts, **told, 'can': sorted(can)})}")
        for sample in (soak.samples[0], soak.samples[-1]):
            print(f"soak: {json.dumps(sample)}")
    return True


def main() -> int:
    """The exit code: 0 if everything held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--as", dest="kind", choices=("root", "user"), default=None)
    parser.add_argument("--operations", type=int, default=10**9)
    parser.add_argument("--list", action="store_true", help="only show the operations")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    if given.list:
        shown = replay(random.Random(seed), {"descriptors", "limits", "launcher"})
        for number in range(1, min(given.operations, 1000) + 1):
            print(number, next(shown))
        return 0
    kinds = [given.kind] if given.kind else (["root", "user"] if os.geteuid() == 0 else ["user"])
    for kind in kinds:
        try:
            if not run(kind, seed, given.seconds / len(kinds), given.operations):
                return 1
        except pytest.skip.Exception as reason:  # of a world: no interpreter that this user may start
            print(f"soak: not as {kind}: {reason}")
            if os.environ.get("CI"):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
