"""What is done to an agent from a marker on, and what may come of it if somebody is killed meanwhile.

What lives here: one class for each scenario. What must not: who is killed and when (every_call_rounds.py), how the machine is
looked at (every_call_machine.py). Theory: a scenario says what may have come of it in a word; whatever it cannot say is wrong.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio
from every_call_machine import PATIENCE, Machine, until

from mesocosm.kernel.client import Client, RemoteError
from mesocosm.kernel.runtime.launch import Launch
from mesocosm.kernel.runtime.world import Cell

Document = dict[str, Any]


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
    without_launcher = False  # it was the launcher that was killed: a barrier that had to be opened may never be
    unseen = 0  # ends that the launcher has collected, and nobody may be left who has heard of them
    unknown = 0  # ends of which it is said that nobody knows them

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

    def launch(self, pod: Document) -> None:
        """A pod, whose programs all run when this returns: an answer comes when it has been decided that they will."""
        self.client.launch_group(pod)
        for each in pod["tasks"]:
            until(f"the mark of {each['name']}", lambda name=each["name"]: os.path.exists(self.machine.mark(name)))

    def prepare(self) -> None:
        """Up to the marker."""

    def act(self) -> None:
        """From the marker on, to an answer."""

    def judge(self, states: Mapping[str, str], *, answered: bool) -> str:
        """What came of it, in a word; ValueError if that is none of what may."""
        raise NotImplementedError

    def is_unknown(self, wait: Mapping[str, Any]) -> bool:
        """Whether it is said that nobody knows how this one ended, where that cannot be helped (LauncherRounds.unseen_of)."""
        is_said = wait["status"] is None and wait["reason"] == "unknown"
        self.unknown += is_said
        return is_said and self.unknown <= self.unseen

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
        self.launch(self.pod("h"))

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
        self.launch(self.pod("ab"))

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
        self.launch({"name": "pod", "tasks": tasks})

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
        self.launch(self.pod("ab"))
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
        self.launch(self.pod("a"))

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


SCENARIOS: dict[str, type[Scenario]] = {
    "start": Beginning, "launch": Launching, "three": LaunchingThree, "refused": Refusing, "nested": Nesting, "kill": Killing,
    "end": Ending, "remove": Removing, "stop": Stopping, "recovery": Recovering,
}  # fmt: skip
MISHAPS = {"recovering": _recovering}
