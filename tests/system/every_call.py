"""Kills the agent with -9 before and after every system call of what it does: run by test_every_call.py in a world of its own.

    every_call.py [launcher:|both:|careless:|client:]SCENARIO MARKS ROUNDS SEED

A round: an agent is brought to the marker, does what the scenario is about, and is killed at its N-th system call from there on
(wardens.py); the next agent recovers; then the machine, the ledger, the launcher and the programs themselves are looked at. Then
that agent is killed, a third one recovers, and nothing may have changed. ROUNDS 0: every call of every thread from number SEED on,
each before and after, until the scenario ends by itself twice; otherwise so many of them, at a distance that is coprime to their
number and from a place that SEED says. Programs leave their names in MARKS.

`launcher:` kills the launcher instead, `both:` the agent besides; `careless:` is a control, with agents that tell an exit
of all that they find running; `client:` has for its scenario a verb of the command (run, wait) which waits meanwhile.

A line of JSON for each round: {"at", "after", "last", "reached", "answered", "outcome", "problems"}; the first is of a round in
which nobody is killed and has "calls" and "names" besides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import trio
import wardens

from mesocosm.kernel import client as clients
from mesocosm.kernel.cli import paths
from mesocosm.kernel.client import Client, RemoteError
from mesocosm.kernel.launcher.connecting import connect as to_launcher
from mesocosm.kernel.launcher.passing import receive, send
from mesocosm.kernel.launcher.protocol import MAX_MESSAGE
from mesocosm.kernel.linux.probe import run_id
from mesocosm.kernel.runtime import codec, recovery
from mesocosm.kernel.runtime.launch import Launch
from mesocosm.kernel.runtime.world import Cell, World
from mesocosm.kernel.testing.census import Census, census, left_over

PATIENCE = 30.0  # seconds for what takes some hundredths
QUIET = 0.2  # seconds after an answer that belong to it: lines that ride on a later transaction, records that are acknowledged
TABLES = ("groups", "containers", "entries", "parked")
Document = dict[str, Any]


def until(what: str, condition: Callable[[], Any]) -> Any:
    """What `condition` answers once it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)
    return found


# --- what is looked at ----------------------------------------------------------------------------------------------


class Machine:
    """The run directory, its agents, and what can be seen of them without asking any."""

    def __init__(self, marks: str, mishaps: Mapping[str, Callable[[], None]]) -> None:
        self.marks = marks
        self.run_dir = paths.make_run_dir()
        self.agents = wardens.Agents(mishaps)
        self.client: Client | None = None
        self.keepers: list[int] = []  # pidfds of the launchers, and of the processes above them

    def begin(self, mishap: str = "") -> Client:
        """An agent that serves; `client` is a connection to it."""
        self.agents.start(mishap)
        client = self.attach()
        self.know_keeper()
        return client

    def know_keeper(self) -> None:
        """Who keeps the launcher that there is."""
        for pid in self.launcher():
            with contextlib.suppress(OSError):
                parent = Path(f"/proc/{pid}/status").read_text().partition("\nPPid:")[2].split()[0]
                self.keepers += [os.pidfd_open(int(parent)), os.pidfd_open(pid)]

    def attach(self) -> Client:
        """A new connection to the agent that is on its way up."""
        try:
            ended = os.pidfd_open(self.agents.pid)
        except ProcessLookupError:
            raise AgentDiedError from None
        try:
            self.client = until("an agent that serves", lambda: self._try(ended))
        finally:
            os.close(ended)
        return self.client  # type: ignore[return-value] # just made

    def _try(self, ended: int) -> Client | None:
        try:
            found = clients.connect(f"{self.run_dir}/agent.sock", timeout=PATIENCE)
        except RemoteError:
            if select.select([ended], [], [], 0)[0]:
                raise AgentDiedError from None
            return None
        try:
            found.ping()
        except RemoteError:  # of one that has died
            return None
        return found

    def end(self) -> dict[str, Any]:
        """Ends the agent with -9; how it ended."""
        if self.client is not None:
            self.client.close()
            self.client = None
        return self.agents.kill()

    def lines(self) -> dict[str, dict[str, Any]]:
        """`ps -a` by id."""
        assert self.client is not None
        return {line["id"]: line for line in self.client.containers(all=True)}

    def select(self, statement: str, *values: Any) -> list[Any]:
        """Read from the ledger, whoever writes it."""
        with contextlib.closing(sqlite3.connect(f"file:{self.run_dir}/ledger.db?mode=ro", uri=True, timeout=PATIENCE)) as db:
            return db.execute(statement, values).fetchall()

    def seq(self) -> int:
        """The number of the last event."""
        return int(self.select("SELECT coalesce(max(seq + count - 1), 0) FROM events")[0][0])

    def dump(self, since: int) -> dict[str, set[str]]:
        """The ledger, all of it but the events up to `since`."""
        found = {table: set(map(repr, self.select(f"SELECT * FROM {table}"))) for table in TABLES}
        return found | {"events": set(map(repr, self.select("SELECT * FROM events WHERE seq > ?", since)))}

    def inventory(self) -> dict[str, str]:
        """id → phase, as the launcher says. Only while there is no agent: whoever asks takes its place."""
        connection = to_launcher(self.run_dir)
        if connection is None:
            return {}
        found, kind, buffer = {}, "more", bytearray(MAX_MESSAGE * 4)
        with connection:
            connection.settimeout(PATIENCE)
            send(connection, msgpack.packb([1, "inventory", {}]))
            while kind == "more":
                data, fds, _ = receive(connection, buffer)
                for fd in fds:
                    os.close(fd)
                number, kind, body = msgpack.unpackb(data)
                if number == 0:
                    kind = "more"
                    continue
                found.update({line["id"]: line["phase"] for line in body["lines"]})
        return found

    def launcher(self) -> list[int]:
        """Its pid, if there is one."""
        connection = to_launcher(self.run_dir)
        if connection is None:
            return []
        with connection:
            return [int.from_bytes(connection.getsockopt(1, 17, 12)[:4], sys.byteorder)]  # SOL_SOCKET, SO_PEERCRED

    def gone(self) -> None:
        """Once neither the launchers nor their keepers are there."""
        # Not by connecting: a launcher that is connected to stays.
        until("the launcher's end", lambda: all(self._has_ended(found) for found in self.keepers))
        for found in self.keepers:
            os.close(found)
        self.keepers.clear()

    def _has_ended(self, pidfd: int) -> bool:
        return bool(select.select([pidfd], [], [], 0)[0])

    def census(self) -> Census:
        """Of everything but the agent and what only it holds."""
        keys = "APART" not in os.environ
        agent = [self.agents.pid]
        roots = [f"{self.run_dir}/containers"]
        return census(pids=self.launcher(), roots=roots, ignore=agent, run_id=run_id(self.run_dir), keys=keys)

    def left(self, before: Census) -> list[str]:
        """What is not as it was."""
        return left_over(dataclasses.replace(before, ignore=frozenset([self.agents.pid])), seconds=PATIENCE / 2)

    def events(self, since: int) -> list[tuple[int, int, str, str, dict[str, Any]]]:
        """(number, count, id, type, body) of the rows above `since`."""
        rows = self.select("SELECT seq, count, id, type, body FROM events WHERE seq > ? ORDER BY seq", since)
        return [(seq, count, about, kind, (codec.unpack(body)[1] or {}) if body else {}) for seq, count, about, kind, body in rows]

    def path(self, container_id: str, name: str = "stdout") -> str:
        """Where what it prints is."""
        return f"{self.run_dir}/containers/{container_id}/{name}"

    def mark(self, name: str) -> str:
        """What a program leaves."""
        return os.path.join(self.marks, name)


class AgentDiedError(Exception):
    """It died before it served: its turn had come."""


def misnumbered(events: list[Any], since: int) -> Iterator[str]:
    """Numbers without gaps or repeats."""
    expected = since + 1
    for seq, count, about, kind, _ in events:
        if seq != expected:
            yield f"event {kind} of {about} has number {seq}, not {expected}"
        expected = seq + count


def miscounted(events: list[Any]) -> Iterator[str]:
    """Of each launch one end; of each member one exit and one death if it was committed, none if it was rolled back."""
    told = Counter((about, kind) for _, _, about, kind, _ in events)
    launches = [(about, body) for _, _, about, kind, body in events if kind == "planned"]
    for about, planned in launches:
        key = (about, planned.get("group"))
        kinds = Counter(kind for _, _, other, kind, body in events if (other, body.get("group")) == key)
        if kinds["end"] != 1 or kinds["committed"] + kinds["rolled_back"] != 1:
            yield f"{about}: {kinds['committed']} committed, {kinds['rolled_back']} rolled back, {kinds['end']} ends"
        for member in planned["containers"]:
            for kind in ("exited", "dead"):
                if told[member, kind] != kinds["committed"]:
                    yield f"{member}: {told[member, kind]} {kind}, committed {kinds['committed']}"


# --- scenarios ------------------------------------------------------------------------------------------------------


def task(name: str, marks: str, then: str = "exec sleep 1000") -> Document:
    """A program that says its name, leaves it, and goes on."""
    volumes = [{"source": f"host:{marks}", "target": "/marks"}, {"source": "shared:data", "target": "/data"}]
    command = f"echo {name}; : > /marks/{name}; {then}"
    return {"name": name, "command": command, "volumes": volumes, "kill": {"signal": "KILL"}}


def gated(name: str, marks: str, code: int) -> Document:
    """One that ends with `code` once there is a file GATE."""
    return task(name, marks, f"until test -e /marks/GATE; do sleep 0.01; done; exit {code}")


class Scenario:
    """What is done from the marker on, and what may come of it. `pods`: whose containers are looked at."""

    pods: tuple[str, ...] = ("pod",)
    afresh = False  # from no launcher to none; without the canary, for which there would have to be one
    from_start = False  # the marker is the agent's first instruction
    without_launcher = False  # it was the launcher that was killed: who it had not told of has ended nobody knows how

    def __init__(self, machine: Machine) -> None:
        self.machine, self.marks = machine, machine.marks

    @property
    def client(self) -> Client:
        """The connection to the agent."""
        assert self.machine.client is not None
        return self.machine.client

    def pod(self, names: str, name: str = "pod") -> Document:
        """A pod of programs."""
        return {"name": name, "tasks": [task(each, self.marks) for each in names]}

    def prepare(self) -> None:
        """Up to the marker."""

    def act(self) -> None:
        """From the marker on, to an answer."""

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        """What came of it, in a word; ValueError if that is none of what may."""
        raise NotImplementedError

    def is_unknown(self, wait: Mapping[str, Any]) -> bool:
        """Whether it is said that nobody knows how this one ended, where that may be."""
        return self.without_launcher and wait["status"] is None and wait["reason"] == "unknown"

    def whole(self, pod: str, names: str, states: Mapping[str, str]) -> bool:
        """Whether it runs, all of it, or else there is nothing of it and no program has run; ValueError if neither."""
        ids = [pod, *(f"{pod}.{name}" for name in names)] if "." not in pod else [f"{pod}.{name}" for name in names]
        found = {states.get(each, "none") for each in ids}
        if found == {"RUNNING"}:
            for name, each in zip(names, ids[-len(names) :], strict=True):
                until(f"the mark of {name}", lambda name=name: os.path.exists(self.machine.mark(name)))
                if (printed := Path(self.machine.path(each)).read_text()) != f"{name}\n":
                    raise ValueError(f"{each} printed {printed!r}")
            return True
        if not found <= {"DEAD", "none"}:
            raise ValueError(f"neither whole nor gone: { ({each: states.get(each) for each in ids}) }")
        if ran := [name for name in names if os.path.exists(self.machine.mark(name))]:
            raise ValueError(f"rolled back, but {ran} ran")
        return False


class Launching(Scenario):
    """A pod, from the request to its answer."""

    names = "a"

    def act(self) -> None:
        self.client.launch_group(self.pod(self.names))

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        if self.whole("pod", self.names, states):
            return "whole"
        if answered and not self.without_launcher:
            raise ValueError("it was said to run, and does not")
        return "nothing"


class LaunchingThree(Launching):
    names = "abc"


class Refusing(Scenario):
    """A pod of which one program cannot be executed: it is rolled back."""

    def act(self) -> None:
        pod = self.pod("ab")
        pod["tasks"].append({"name": "c", "command": ["/no/such/program"]})
        try:
            self.client.launch_group(pod)
        except RemoteError as error:
            if error.code == "agent_gone":
                raise

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        if self.whole("pod", "ab", states):
            raise ValueError("it runs")
        return "nothing"


class Nesting(Scenario):
    """A group inside a container that runs."""

    def prepare(self) -> None:
        self.client.launch_group(self.pod("h"))

    def act(self) -> None:
        self.client.launch_nested_group("pod.h", [task("a", self.marks), task("b", self.marks)])

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        if not self.whole("pod", "h", states):
            raise ValueError("the parent is gone")
        if self.whole("pod.h", "ab", states):
            return "whole"
        if answered and not self.without_launcher:
            raise ValueError("it was said to run, and does not")
        return "nothing"


class Killing(Scenario):
    """A pod is killed and waited for."""

    told = False

    def prepare(self) -> None:
        self.told = False
        self.client.launch_group(self.pod("ab"))

    def act(self) -> None:
        self.client.kill("pod")
        self.told = True
        self.client.wait("pod")

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        found = {states.get(each) for each in ("pod", "pod.a", "pod.b")}
        if found == {"DEAD"}:
            for each in ("pod.a", "pod.b"):
                wait = self.client.wait(each)
                if (wait["signal"], wait["reason"]) != (9, "killed") and not self.is_unknown(wait):
                    raise ValueError(f"{each}: {wait}")
            return "dead"
        if self.told:
            raise ValueError(f"the kill was taken, and forgotten: {found}")
        return "whole" if self.whole("pod", "ab", states) else "gone"


class Ending(Scenario):
    """A pod whose programs end by themselves, whoever is there to see it."""

    def prepare(self) -> None:
        tasks = [gated("a", self.marks, 3), gated("b", self.marks, 0)]
        self.client.launch_group({"name": "pod", "tasks": tasks})

    def act(self) -> None:
        Path(self.machine.mark("GATE")).touch()
        self.client.wait("pod")

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        until("its end", lambda: self.machine.lines()["pod"]["state"] == "DEAD")
        waits = {each: self.client.wait(f"pod.{each}") for each in "ab"}
        said = {each: wait["exit"] == (3 if each == "a" else 0) or self.is_unknown(wait) for each, wait in waits.items()}
        if not said["a"] or not (said["b"] or waits["b"]["reason"] == "group"):
            raise ValueError(f"{waits}")
        return "dead"


class Removing(Scenario):
    """A dead pod is forgotten."""

    def prepare(self) -> None:
        self.client.launch_group(self.pod("ab"))
        self.client.kill("pod")
        self.client.wait("pod")

    def act(self) -> None:
        self.client.remove("pod")

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        found = [states.get(each) for each in ("pod", "pod.a", "pod.b")]
        if found == [None] * 3:
            if left := [each for each in os.listdir(f"{self.machine.run_dir}/containers") if each.startswith("pod")]:
                raise ValueError(f"forgotten, but there is {left}")
            return "forgotten"
        if answered or found != ["DEAD"] * 3:
            raise ValueError(f"{found}")
        return "dead"


class Beginning(Scenario):
    """The first agent of a run directory, up to where it serves."""

    afresh = from_start = True
    pods = ()

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        if states:
            raise ValueError(f"{states}")
        self.client.launch_group(self.pod("a"))
        self.whole("pod", "a", {"pod": "RUNNING", "pod.a": "RUNNING"})
        self.client.kill("pod")
        self.client.wait("pod")
        self.client.remove("pod")
        return "serves"


class Stopping(Scenario):
    """All that runs is ended, what it shared is undone, launcher and agent go."""

    afresh = True

    def prepare(self) -> None:
        self.client.launch_group(self.pod("a"))

    def act(self) -> None:
        self.client.stop_agent()

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        if {states.get("pod"), states.get("pod.a")} == {"DEAD"}:
            return "stopped"
        if answered:
            raise ValueError(f"it was said to have ended: {states}")
        if not self.whole("pod", "a", states):
            raise ValueError(f"{states}")
        return "whole"


class Recovering(Scenario):
    """An agent that takes over: what runs, what was half built, what was decided and not begun, what ended meanwhile."""

    from_start = True
    pods = ("run", "half", "decided", "brief")
    mishap = "recovering"

    def prepare(self) -> None:
        machine = self.machine
        machine.end()
        client = machine.begin(self.mishap)
        client.launch_group(self.pod("r", "run"))
        client.launch_nested_group("run.r", [task("n", self.marks)])
        client.launch_group({"name": "brief", "tasks": [gated("e", self.marks, 3)]})
        half = client.run_group(self.pod("ab", "half"))
        for line in half:
            if line["type"] == "staged" and line["id"] == "half.a":
                break
        self.pids = {each: machine.lines()[each]["pid"] for each in ("run", "run.r", "run.r.n", "brief.e")}
        brief = os.pidfd_open(self.pids.pop("brief.e"))
        with contextlib.suppress(RemoteError):
            client.launch_group(self.pod("cd", "decided"))
        machine.end()
        Path(machine.mark("GATE")).touch()
        if not select.select([brief], [], [], PATIENCE)[0]:
            raise TimeoutError("the end of brief")
        os.close(brief)

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        lines = self.machine.lines()
        if not self.whole("run", "r", states) or not self.whole("run.r", "n", states):
            raise ValueError("what ran is gone")
        if (now := {each: lines[each]["pid"] for each in self.pids}) != self.pids:
            raise ValueError(f"{self.pids} are {now}")
        if self.whole("half", "ab", states):
            raise ValueError("what was never decided runs")
        if not self.whole("decided", "cd", states):
            raise ValueError("what was decided does not run")
        until("the end of brief", lambda: self.machine.lines()["brief"]["state"] == "DEAD")
        if (wait := self.client.wait("brief.e"))["exit"] != 3:
            raise ValueError(f"{wait}")
        return "recovered"


def _recovering() -> None:
    """In an agent of its own: `half` stays half built, and with the decision about `decided` it is gone."""
    stage, commit = Launch._stage, Launch._commit

    async def staged(self: Launch, cell: Cell) -> None:
        if cell.id == "half.b":
            await trio.sleep_forever()
        await stage(self, cell)

    def committed(self: Launch) -> None:
        commit(self)
        if self.group.id == "decided":
            os.kill(os.getpid(), signal.SIGKILL)

    Launch._stage, Launch._commit = staged, committed  # type: ignore[method-assign]


def _careless() -> None:
    recover = recovery.recover

    async def telling_again(world: World) -> list[Cell]:
        living = await recover(world)
        for cell in living:
            world.journal.add(cell.id, "exited", {})
        return living

    recovery.recover = telling_again


SCENARIOS: dict[str, type[Scenario]] = {
    "start": Beginning, "launch": Launching, "three": LaunchingThree, "refused": Refusing, "nested": Nesting, "kill": Killing,
    "end": Ending, "remove": Removing, "stop": Stopping, "recovery": Recovering,
}  # fmt: skip
MISHAPS = {"recovering": _recovering}


# --- rounds ---------------------------------------------------------------------------------------------------------


class Rounds:
    """One scenario, again and again."""

    def __init__(self, machine: Machine, scenario: Scenario) -> None:
        self.machine, self.scenario = machine, scenario
        self.canary: dict[str, Any] = {}
        if scenario.afresh:
            # Once, so that all that is made once is made.
            machine.begin()
            self._stop()
        else:
            client = machine.begin()
            client.launch_group({"name": "canary", "tasks": [{"name": "bird", "command": ["sleep", "100000"]}]})
            self.canary = {each: line["pid"] for each, line in machine.lines().items()}
            machine.end()
            machine.begin()  # which has launched nothing yet, as all that come after it
        self.base = machine.census()
        until("a machine that is quiet", self._is_quiet)

    def _is_quiet(self) -> bool:
        before, self.base = self.base, self.machine.census()
        return not before.difference(self.base)

    def _stop(self) -> None:
        assert self.machine.client is not None
        self.machine.client.stop_agent()
        self.machine.agents.dead()
        self.machine.client = None
        self.machine.gone()

    def round(self, at: int, *, after: bool) -> dict[str, Any]:
        """Kills at the `at`-th call, 0: at none; what was seen."""
        machine, scenario = self.machine, self.scenario
        problems: list[str] = []
        for name in os.listdir(machine.marks):
            os.unlink(machine.mark(name))
        if scenario.afresh and scenario.from_start:
            shutil.rmtree(machine.run_dir)
        elif scenario.afresh:
            machine.begin()
        since = machine.seq() if os.path.exists(f"{machine.run_dir}/ledger.db") else 0
        scenario.prepare()
        answered = self._act(at, after=after)
        died = machine.end()
        line = {"at": at, "after": after, "last": died["last"], "reached": bool(died["last"]), "answered": answered}
        try:
            machine.begin()
            outcome = scenario.judge(self._settled(), answered=answered)
            problems += self._again(since)
            problems += self._clean()
        except (ValueError, TimeoutError, RemoteError, AgentDiedError, OSError) as error:
            outcome = "wrong"
            problems.append(f"{type(error).__name__}: {error}")
        else:
            events = machine.events(since)
            problems += [*misnumbered(events, since), *miscounted(events)]
            problems += machine.left(self.base)
        if not at:
            line |= {"calls": died["calls"], "names": died["names"]}
        return {**line, "outcome": outcome, "problems": problems}

    def _act(self, at: int, *, after: bool) -> bool:
        machine, scenario = self.machine, self.scenario
        if scenario.from_start:
            if machine.client is not None:
                machine.end()
            machine.agents.start(at=at, after=after)
        else:
            machine.agents.arm(at, after=after)
        try:
            if scenario.from_start:
                machine.attach()
            scenario.act()
        except (RemoteError, AgentDiedError) as error:
            if isinstance(error, RemoteError) and error.code != "agent_gone":
                raise
            return False
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(machine.agents.pid)
            select.select([ended], [], [], QUIET)
            os.close(ended)
        return True

    def _settled(self) -> dict[str, str]:
        """The states of the scenario's containers, once none of them is on its way."""

        def look() -> dict[str, str] | None:
            lines = {each: line for each, line in self.machine.lines().items() if each not in self.canary}
            moving = [each for each, line in lines.items() if line["state"] != "DEAD" and not self._runs(each, line["state"])]
            return None if moving else {each: line["state"] for each, line in lines.items()} or {"": ""}

        found: dict[str, str] = until("containers that move no more", look)
        found.pop("", None)
        return found

    def _runs(self, container_id: str, state: str) -> bool:
        return state == "RUNNING"

    def _again(self, since: int) -> Iterator[str]:
        """Another recovery, and what it has changed."""
        machine = self.machine
        machine.end()
        before = machine.dump(since)  # not sooner: what is not told yet is none of the next one's doing
        living = {each for each, phase in machine.inventory().items() if phase != "ended"}
        known = {each for (each,) in machine.select("SELECT id FROM containers WHERE state != 'DEAD'")}
        if living != known:
            yield f"the launcher has {sorted(living - known)} that the ledger has not, and not {sorted(known - living)}"
        machine.begin()
        after = machine.dump(since)
        for table in before:
            if gone := before[table] - after[table]:
                yield f"the second recovery took from {table}: {gone}"
            if new := after[table] - before[table]:
                yield f"the second recovery added to {table}: {new}"
        if {each: line["pid"] for each, line in machine.lines().items() if each in self.canary} != self.canary:
            yield "the canary has noticed"

    def _clean(self) -> Iterator[str]:
        machine = self.machine
        client = machine.client
        assert client is not None
        lines = machine.lines()
        for pod in self.scenario.pods:
            if pod in lines and lines[pod]["state"] != "DEAD":
                client.kill(pod)
                client.wait(pod)
        if self.scenario.afresh:
            if lines:
                client.remove("pod")
            self._stop()
            return
        for pod in self.scenario.pods:
            if pod in lines:
                client.remove(pod)
        if parked := machine.select("SELECT container, note FROM parked"):
            yield f"parked: {parked}"


class LauncherRounds(Rounds):
    """The same with the launcher: it is killed, and with `both` the agent, too, as soon as it is known."""

    def __init__(self, machine: Machine, scenario: Scenario, *, both: bool) -> None:
        scenario.afresh = scenario.without_launcher = True
        super().__init__(machine, scenario)
        self.both = both

    def round(self, at: int, *, after: bool) -> dict[str, Any]:
        """Kills at the launcher's `at`-th call."""
        machine, scenario = self.machine, self.scenario
        problems: list[str] = []
        for name in os.listdir(machine.marks):
            os.unlink(machine.mark(name))
        since = machine.seq()
        machine.begin()
        scenario.prepare()
        [launcher] = machine.launcher()
        ended = os.pidfd_open(launcher)
        machine.agents.seize(launcher)
        machine.agents.arm(at, after=after, of=launcher)
        error = None
        try:
            scenario.act()
        except RemoteError as told:
            error = told.error
            if told.code not in ("launch_failed", "dying"):
                problems.append(f"{told.error}")
        select.select([ended], [], [], QUIET)
        os.close(ended)
        died = machine.agents.kill(launcher)  # in any case: else what follows would be counted, too
        line = {"at": at, "after": after, "last": died["last"], "reached": bool(died["last"]), "answered": error is None}
        try:
            if self.both:
                machine.end()
                machine.begin()
            outcome = scenario.judge(self._settled(), answered=error is None)
            problems += self._all_there()
            problems += self._clean()
        except (ValueError, TimeoutError, RemoteError, AgentDiedError, OSError) as wrong:
            outcome = "wrong"
            problems.append(f"{type(wrong).__name__}: {wrong}")
        else:
            events = machine.events(since)
            problems += [*misnumbered(events, since), *miscounted(events)]
            problems += machine.left(self.base)
        if not at:
            line |= {"calls": died["calls"], "names": died["names"]}
        return {**line, "outcome": outcome, "problems": problems, "error": error}

    def _runs(self, container_id: str, state: str) -> bool:
        # Nobody may have opened its barrier: then it ends, and it may take the agent a moment to see that.
        is_pod = "." not in container_id
        return state == "RUNNING" and (is_pod or os.path.exists(self.machine.mark(container_id.rpartition(".")[2])))

    def _all_there(self) -> Iterator[str]:
        """Who is said to run does."""
        for each, line in self.machine.lines().items():
            if line["state"] == "RUNNING":
                try:
                    os.kill(line["pid"], 0)
                except ProcessLookupError:
                    yield f"{each} is said to run, and is gone"

    def _clean(self) -> Iterator[str]:
        machine = self.machine
        assert machine.client is not None
        lines = machine.lines()
        try:
            if "pod" in lines:
                if lines["pod"]["state"] != "DEAD":
                    machine.client.kill("pod")
                    machine.client.wait("pod")
                machine.client.remove("pod")
        except RemoteError as error:
            if error.code != "agent_gone":  # without launcher and containers it is of no use, and leaves
                raise
            machine.agents.dead()
            machine.begin()
            if "pod" in machine.lines():
                machine.client.remove("pod")
        if parked := machine.select("SELECT container, note FROM parked"):
            yield f"parked: {parked}"
        machine.know_keeper()
        with contextlib.suppress(RemoteError):
            machine.client.stop_agent()
        machine.agents.dead()
        machine.client = None
        machine.gone()


class ClientRounds(Rounds):
    """The agent is killed while a verb in a process of its own waits for a pod's end; the verb starts the next one itself."""

    verbs: Mapping[str, list[str]] = {"run": ["run", "--json", "-"], "wait": ["wait", "--json", "pod"]}

    def __init__(self, machine: Machine, verb: str) -> None:
        scenario = Ending(machine)
        scenario.afresh = True
        super().__init__(machine, scenario)
        self.verb = verb

    def round(self, at: int, *, after: bool) -> dict[str, Any]:
        """Kills at the `at`-th call from when the programs may end."""
        machine = self.machine
        for name in os.listdir(machine.marks):
            os.unlink(machine.mark(name))
        machine.begin()
        words = [sys.executable, "-B", "-m", "mesocosm.kernel.cli.main", *self.verbs[self.verb]]
        pod = {"name": "pod", "tasks": [gated("a", machine.marks, 3)]}
        if self.verb == "wait":
            self.scenario.client.launch_group(pod)
        child = subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.write(json.dumps(pod))
        child.stdin.close()
        child.stdin = None
        until("the mark of a", lambda: os.path.exists(machine.mark("a")))
        until("a client that waits", lambda: self._is_connected(child.pid))
        machine.agents.arm(at, after=after)
        Path(machine.mark("GATE")).touch()
        out, told = child.communicate(timeout=PATIENCE)
        died = machine.end()
        problems = [] if child.returncode == 3 else [f"exit code {child.returncode}: {told}"]
        problems += self._misread([json.loads(line) for line in out.splitlines()])
        line = {"at": at, "after": after, "last": died["last"], "reached": bool(died["last"]), "answered": True}
        machine.client = self._next() or machine.begin()
        machine.client.wait("pod")
        machine.client.remove("pod")
        machine.client.stop_agent()
        machine.client = None
        machine.gone()
        problems += machine.left(self.base)
        if not at:
            line |= {"calls": died["calls"], "names": died["names"]}
        return {**line, "outcome": str(child.returncode), "problems": problems}

    def _next(self) -> Client | None:
        try:
            return clients.connect(f"{self.machine.run_dir}/agent.sock", timeout=PATIENCE)
        except RemoteError:
            return None

    def _is_connected(self, pid: int) -> bool:
        return any(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:") for fd in os.listdir(f"/proc/{pid}/fd"))

    def _misread(self, lines: list[dict[str, Any]]) -> Iterator[str]:
        if self.verb == "run":
            seqs = [line["seq"] for line in lines if line["type"] != "output"]
            if seqs != sorted(set(seqs)):
                yield f"numbers {seqs}"
            told = Counter((line["type"], line.get("id")) for line in lines)
            if told["exited", "pod.a"] != 1 or sum(count for (kind, _), count in told.items() if kind == "end") != 1:
                yield f"{told}"


def moments(rounds: int, seed: int, calls: int) -> Iterator[tuple[int, bool]]:
    """(number of the call, whether after it)."""
    if not rounds:
        for number in itertools.count(seed):
            yield number, False
            yield number, True
    chance = random.Random(seed)
    total = 2 * calls
    step = next(step for step in range(max(1, total // rounds), total + 2) if math.gcd(step, total) == 1)
    place = chance.randrange(total)
    for _ in range(rounds):
        yield place // 2 + 1, bool(place % 2)
        place = (place + step) % total


def rounds_of(victim: str, scenario: Scenario) -> Rounds:
    """Those in which `victim` is killed."""
    if victim in ("launcher", "both"):
        return LauncherRounds(scenario.machine, scenario, both=victim == "both")
    return Rounds(scenario.machine, scenario)


def main() -> None:
    """See above."""
    name, marks, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    victim, _, name = name.rpartition(":")
    if victim == "careless":
        _careless()  # here, before there is an agent: in all of them
    machine = Machine(marks, MISHAPS)
    if victim == "client":
        tried: Rounds = ClientRounds(machine, name)
    else:
        tried = rounds_of(victim, SCENARIOS[name](machine))
    whole = tried.round(0, after=False)
    print(json.dumps(whole), flush=True)
    missed = 0
    for at, after in moments(rounds, seed, whole["calls"]):
        line = tried.round(at, after=after)
        print(json.dumps(line), flush=True)
        missed = 0 if line["reached"] else missed + 1
        if line["outcome"] == "wrong" or (not rounds and missed == 4):
            break
    if not tried.scenario.afresh:
        tried._stop()


if __name__ == "__main__":
    main()
