"""Rounds: a scenario again and again, each time with the agent, the launcher or both killed at another call, and a look afterwards.

What lives here: who is killed, who comes next, and what has to hold then. What must not: what is done meanwhile
(every_call_scenarios.py); verbs that wait while the agent is killed (every_call_clients.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
from collections.abc import Iterator
from typing import Any

from every_call_machine import AgentDiedError, Machine, miscounted, misnumbered, until
from every_call_scenarios import Scenario, task

from mesocosm.kernel.client import RemoteError
from mesocosm.kernel.linux import pidfds

QUIET = 0.2  # seconds after an answer that belong to it: lines that ride on a later transaction, records that are acknowledged


class Rounds:
    """One scenario, again and again."""

    def __init__(self, machine: Machine, scenario: Scenario) -> None:
        self.machine, self.scenario = machine, scenario
        self.canary: dict[str, Any] = {}
        if scenario.afresh:
            # Once, so that all that is made once is made.
            machine.begin()
            self.stop()
        else:
            client = machine.begin()
            client.launch_group({"name": "canary", "tasks": [task("bird", machine.marks)]})
            self.canary = {each: line["pid"] for each, line in machine.lines().items() if line["state"] == "RUNNING"}
            machine.end()
            machine.begin()  # which has launched nothing yet, as all that come after it
        self.base = machine.census()
        until("a machine that is quiet", self._is_quiet)

    def _is_quiet(self) -> bool:
        before, self.base = self.base, self.machine.census()
        return not before.difference(self.base)

    def stop(self) -> None:
        """Ends agent and launcher as `meso agent --stop` does."""
        assert self.machine.client is not None
        self.machine.client.stop_agent()
        self.machine.agents.dead()
        self.machine.client = None
        self.machine.gone()

    def round(self, at: int, *, after: bool) -> dict[str, Any]:
        """Kills at the `at`-th call, 0: at none; what was seen."""
        machine, scenario = self.machine, self.scenario
        self._forget_marks()
        if scenario.afresh and scenario.from_start:
            shutil.rmtree(machine.run_dir)
        elif scenario.afresh:
            machine.begin()
        since = machine.seq() if os.path.exists(f"{machine.run_dir}/ledger.db") else 0
        scenario.prepare()
        answered = self._act(at, after=after)
        line = self._line(at, machine.end(), after=after, answered=answered)

        def look() -> Iterator[str]:
            machine.begin()
            line["outcome"] = scenario.judge(self._settled(), answered=answered)
            yield from self._again(since)
            yield from self._clean()

        return self._looked(line, look(), since)

    def _forget_marks(self) -> None:
        for name in os.listdir(self.machine.marks):
            os.unlink(self.machine.mark(name))

    def _line(self, at: int, died: dict[str, Any], *, after: bool, answered: bool) -> dict[str, Any]:
        """What is told of a round, but for what came of it."""
        line = {"at": at, "after": after, "last": died["last"], "reached": bool(died["last"]), "answered": answered}
        return line if at else line | {"calls": died["calls"], "names": died["names"]}

    def _looked(self, line: dict[str, Any], look: Iterator[str], since: int) -> dict[str, Any]:
        """The line with all problems: those that `look` finds, and what must hold of any round that is over."""
        problems: list[str] = []
        try:
            problems.extend(look)
        except (ValueError, TimeoutError, RemoteError, AgentDiedError, OSError) as error:
            line["outcome"] = "wrong"
            problems.append(f"{type(error).__name__}: {error}")
        else:
            events = self.machine.events(since)
            problems += [*misnumbered(events, since), *miscounted(events)]
            problems += self.machine.left(self.base)
        return line | {"problems": problems}

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
            yield from self._parked()
            self.stop()
            return
        for pod in self.scenario.pods:
            if pod in lines:
                client.remove(pod)
        yield from self._parked()

    def _parked(self) -> Iterator[str]:
        for what, columns in (("parked", "container, note"), ("aside", "said")):
            if found := self.machine.select(f"SELECT {columns} FROM {what}"):
                yield f"{what}: {found}"


class LauncherRounds(Rounds):
    """The same with the launcher: it is killed, and with `both` the agent: before a call at the same moment, after it a moment
    later, when it may be starting another one. A pod of that launcher which is not meant, `bird`, goes on, and its end is known."""

    def __init__(self, machine: Machine, scenario: Scenario, *, both: bool) -> None:
        scenario.afresh = scenario.without_launcher = True
        super().__init__(machine, scenario)
        self.both = both
        self._is_kept = not both and keeps_ends()

    def round(self, at: int, *, after: bool) -> dict[str, Any]:
        """Kills at the launcher's `at`-th call."""
        machine, scenario = self.machine, self.scenario
        self._forget_marks()
        machine.begin()
        since = machine.seq()
        scenario.launch({"name": "bird", "tasks": [task("bird", machine.marks)]})
        self.canary = {each: line["pid"] for each, line in machine.lines().items() if each.partition(".")[0] == "bird"}
        scenario.prepare()
        [launcher] = machine.launcher()
        ended = os.pidfd_open(launcher)
        machine.agents.seize(launcher)
        machine.agents.arm(at, after=after, of=launcher, along=machine.agents.pid if self.both and not after else 0)
        error = None
        try:
            scenario.act()
        except RemoteError as told:
            error = told.error
        select.select([ended], [], [], QUIET)
        os.close(ended)
        died = machine.agents.kill(launcher)  # in any case: else what follows would be counted, too
        scenario.unseen, scenario.unknown = self.unseen_of(died, after=after), 0
        line = self._line(at, died, after=after, answered=error is None) | {"error": error}

        def look() -> Iterator[str]:
            if error is not None and error["code"] not in ("launch_failed", "dying", *(["agent_gone"] if self.both else [])):
                yield f"{error}"
            if self.both:
                machine.end()
                machine.begin()
            line["outcome"] = scenario.judge(self._settled(), answered=error is None)
            line["unknown"] = scenario.unknown
            yield from self._all_there()
            if self.both:
                yield from self._again(since)
            yield from self._clean()

        return self._looked(line, look(), since)

    def unseen_of(self, died: dict[str, Any], *, after: bool) -> int:
        """How many ends the launcher may have collected, so that its keeper cannot, and who holds the pidfd cannot be asked: since
        the kernel does not keep them, or the agent that held it is killed as well. Of these, and no other, nobody may know."""
        collected: int = died["names"].get("wait4", 0) - (died["last"].startswith("wait4(") and not after)
        return 0 if self._is_kept else collected

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
        client = machine.client
        assert client is not None
        lines = machine.lines()
        if {each: line["pid"] for each, line in lines.items() if each in self.canary and line["state"] == "RUNNING"} != self.canary:
            yield "the canary has noticed"
        for pod in ("pod", "bird"):
            if pod in lines:
                if lines[pod]["state"] != "DEAD":
                    client.kill(pod)
                    client.wait(pod)
                if pod == "bird" and (wait := client.wait("bird.bird"))["reason"] != "killed":
                    yield f"{wait}"
                client.remove(pod)
        yield from self._parked()
        machine.know_keeper()
        self.stop()


def keeps_ends() -> bool:
    """Whether the kernel keeps how a process ended for who holds its pidfd (Linux 6.15)."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    try:
        return pidfds.exit_status(pidfd) is not None
    finally:
        os.close(pidfd)
