"""The agent is killed while a verb of the command waits, in a process of its own: it is told all, once, by whoever comes next.

What lives here: one class for each verb, and what it must have said. What must not: what the machine looks like meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from every_call_machine import PATIENCE, Machine, misnumbered, until
from every_call_rounds import Rounds
from every_call_scenarios import Document, Ending, task

from mesocosm.kernel import client as clients
from mesocosm.kernel.client import Client, RemoteError
from mesocosm.kernel.linux.procfs import lock_holder

LINES = 300
PRINTED = "".join(f"{line}\n" for line in ("a", *range(LINES)))
Lines = list[dict[str, Any]]


class ClientRounds(Rounds):
    """A verb that waits for a pod's end, and starts the next agent itself. It says `code` with its own exit code."""

    launches = False
    code = 3

    def __init__(self, machine: Machine) -> None:
        scenario = Ending(machine)
        scenario.afresh = True
        super().__init__(machine, scenario)

    def words(self, since: int) -> list[str]:
        """The verb; `since`: the number of the last event before the pod."""
        raise NotImplementedError

    def misread(self, said: str, since: int) -> Iterator[str]:
        """What is missing in what it said, and what is there twice."""
        raise NotImplementedError

    def hear(self, child: subprocess.Popen[str]) -> str:
        """All that it says."""
        assert child.stdout is not None
        return child.stdout.read()

    def pod(self) -> Document:
        """A pod whose program prints, and ends, once there is a file GATE."""
        counts = f"i=0; while test $i -lt {LINES}; do echo $i; i=$((i+1)); done"
        then = f"until test -e /marks/GATE; do sleep 0.01; done; {counts}; exit 3"
        return {"name": "pod", "tasks": [task("a", self.machine.marks, then)]}

    def round(self, at: int, *, after: bool) -> dict[str, Any]:
        """Kills at the `at`-th call from when the programs may end."""
        machine = self.machine
        self._forget_marks()
        client = machine.begin()
        since = machine.seq()
        if not self.launches:
            client.launch_group(self.pod())
        words = [sys.executable, "-B", "-m", "mesocosm.kernel.cli.main", *self.words(since)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen(words, text=True, **pipes)  # type: ignore[call-overload]
        overdue = threading.Timer(PATIENCE, child.kill)
        overdue.start()
        with child:
            child.stdin.write(json.dumps(self.pod()))
            child.stdin.close()
            until("the mark of a", lambda: os.path.exists(machine.mark("a")))
            until("a client that waits", lambda: self._is_connected(child.pid))
            machine.agents.arm(at, after=after)
            Path(machine.mark("GATE")).touch()
            said = self.hear(child)
            told = child.stderr.read()
        overdue.cancel()
        line = self._line(at, machine.end(), after=after, answered=True) | {"outcome": str(child.returncode)}

        def look() -> Iterator[str]:
            if child.returncode != self.code:
                yield f"exit code {child.returncode}: {told}"
            yield from self.misread(said, since)
            machine.client = self._next() or machine.begin()
            machine.client.wait("pod")
            machine.client.remove("pod")
            yield from self._parked()
            machine.know_keeper()
            machine.client.stop_agent()
            machine.client = None
            until("the agent's end", lambda: lock_holder(f"{machine.run_dir}/agent.lock") is None)  # which may be none of ours
            machine.gone()

        return self._looked(line, look(), since)

    def _next(self) -> Client | None:
        try:
            return clients.connect(f"{self.machine.run_dir}/agent.sock", timeout=PATIENCE, reconnect=0)
        except RemoteError:
            return None

    def _is_connected(self, pid: int) -> bool:
        with contextlib.suppress(FileNotFoundError):  # one that has just been closed
            return any(os.readlink(f"/proc/{pid}/fd/{fd}").startswith("socket:") for fd in os.listdir(f"/proc/{pid}/fd"))
        return False


class Running(ClientRounds):
    """Its events, in order, each once, and what the program prints."""

    launches = True

    def words(self, since: int) -> list[str]:
        return ["run", "--json", "-"]

    def misread(self, said: str, since: int) -> Iterator[str]:
        lines = [json.loads(line) for line in said.splitlines()]
        printed = [line for line in lines if line["type"] == "output"]
        if "".join(line["data"] for line in printed) != PRINTED:
            yield f"it printed {printed}"
        events = [line for line in lines if line["type"] != "output"]
        seqs = [line["seq"] for line in events]
        if seqs != sorted(set(seqs)):
            yield f"numbers {seqs}"
        yield from _ended_once(events)


class Waiting(ClientRounds):
    """How the pod ended, once."""

    def words(self, since: int) -> list[str]:
        return ["wait", "--json", "pod"]

    def misread(self, said: str, since: int) -> Iterator[str]:
        lines = [json.loads(line) for line in said.splitlines()]
        if [line["id"] for line in lines] != ["pod"]:
            yield f"it said {said}"


class Logging(ClientRounds):
    """Every byte that is printed, once."""

    code = 0

    def words(self, since: int) -> list[str]:
        return ["logs", "-f", "pod.a"]

    def misread(self, said: str, since: int) -> Iterator[str]:
        if said != PRINTED:
            yield f"it printed {said!r}"


class Following(ClientRounds):
    """Every event of everybody, numbered without gaps. It goes on for ever, so it is interrupted after the pod's last."""

    code = 128 + signal.SIGINT

    def words(self, since: int) -> list[str]:
        return ["events", "--json", "--since", str(since)]

    def hear(self, child: subprocess.Popen[str]) -> str:
        assert child.stdout is not None
        said = ""
        for line in child.stdout:
            said += line
            if json.loads(line)["type"] == "end":
                child.send_signal(signal.SIGINT)
                break
        return said + child.stdout.read()

    def misread(self, said: str, since: int) -> Iterator[str]:
        events = [json.loads(line) for line in said.splitlines()]
        yield from misnumbered([(line["seq"], 1, line.get("id"), line["type"], line) for line in events], since)
        yield from _ended_once(events)


def _ended_once(events: Lines) -> Iterator[str]:
    told = Counter((line["type"], line.get("id")) for line in events)
    if told["exited", "pod.a"] != 1 or told["dead", "pod.a"] != 1 or sum(told[key] for key in told if key[0] == "end") != 1:
        yield f"{told}"


VERBS: Mapping[str, type[ClientRounds]] = {"run": Running, "wait": Waiting, "logs": Logging, "events": Following}
