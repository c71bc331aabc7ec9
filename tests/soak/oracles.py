"""What must hold of everything that is there, at every quiet point: the oracles, in the order of their list (`soak.py`).

What lives here: looking at the machine, the agent and what it has told. What must not: which operations there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from operations import PATIENCE, SECRET, FoundError, Operations, model

from mesocosm.kernel.client import RemoteError
from mesocosm.kernel.linux.probe import run_id
from mesocosm.kernel.testing.census import Census, census, left_over

WARM = 2  # base points until everything has its size
# The agent at a base point may be one of a second or one of a minute; its worker threads end when they have been idle for a while,
# and the history is full only after 20,000 events.
# So with launchers: each has had a largest moment of its own (6.6 to 8 MiB seen; 7.2 before and after 10,000 containers of one).
# An agent that has started a launcher itself, or seen one die, has a descriptor or two more than one that found all of it in place.
NOISE = {"agent_files": 3, "agent_kib": 8192, "agent_threads": 40, "launcher_kib": 2048, "ledger_kib": 16384}
SENTINELS = ("/etc/passwd", "/etc/group", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", sys.executable)


class Soak(Operations):
    """The operations, and the looks in between."""

    def __init__(self, world: Any, can: set[str]) -> None:
        self.told = model.Told()
        self.samples: list[dict[str, int]] = []
        self._beats = 0
        self._before: Census | None = None
        self._opened: Counter[str] = Counter()
        self._sentinels = sentinels()
        super().__init__(world, can)

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
            is_clear = not any("parked" in line for line in mine.values())  # for want of descriptors; it is tried again
            missed = missing and time.monotonic() < appear
            if {line["state"] for line in mine.values()} <= {"RUNNING", "DEAD"} and is_clear and not missed:
                return lines
            if time.monotonic() > deadline:
                raise FoundError(f"still neither running nor dead, or not undone: {mine}")
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
            self._before = settled(census(pids=[launcher], ignore=ignore, run_id=run_id(str(self.world.run_dir)), keys=keys))
        left = left_over(dataclasses.replace(self._before, ignore=frozenset(ignore)), seconds=PATIENCE)
        if left:
            raise FoundError(f"the machine is not as it was: {left[:10]}")
        self._secrets()
        self._flat(lambda: {**use("agent", agent), **use("launcher", launcher), "ledger_kib": self._ledger()})

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

    def _flat(self, look: Callable[[], dict[str, int]]) -> None:
        deadline = time.monotonic() + PATIENCE  # a connection may be about to be closed, a history about to be written
        while (grown := self._grown(now := look())) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.samples.append(now)
        opened = targets(self.world.agent_pid())
        if len(self.samples) == WARM:
            self._opened = opened
        if grown:
            raise FoundError(f"{'; '.join(grown)}: {self.samples}; more open: {opened - self._opened}")

    def _grown(self, now: dict[str, int]) -> list[str]:
        if len(self.samples) < WARM:
            return []
        first = self.samples[WARM - 1]
        allowed = {what: max(first[what] * 2 // 100, NOISE.get(what, 0)) for what in now}
        return [
            f"{what} was {first[what]} and is {value}; allowed is {allowed[what]} more"
            for what, value in now.items()
            if value > first[what] + allowed[what]
        ]

    def close(self) -> None:
        """The connections and the gates."""
        self.pulse.stop()
        for fd in self._gates.values():
            os.close(fd)
        if self._client is not None:
            self._client.close()


def settled(taken: Census) -> Census:
    """The census, once it stays the same: connections that were closed before it may still be open on the other side."""
    deadline, same = time.monotonic() + PATIENCE, 1
    while same < 3:
        time.sleep(0.1)
        again = taken.again()
        difference = taken.difference(again)
        if difference and time.monotonic() > deadline:
            raise FoundError(f"the machine does not come to rest: {difference[:10]}")
        taken, same = again, 1 if difference else same + 1
    return taken


def use(name: str, pid: int) -> dict[str, int]:
    """What a process has: KiB of its own, threads, open files as far as they may be counted."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    found = {f"{name}_kib": int(fields["RssAnon"].split()[0]), f"{name}_threads": int(fields["Threads"])}
    with contextlib.suppress(PermissionError):
        found[f"{name}_files"] = len(os.listdir(f"/proc/{pid}/fd"))
    return found


def targets(pid: int) -> Counter[str]:
    """What a process has open, in words without numbers; nothing where one may not look."""
    found: Counter[str] = Counter()
    with contextlib.suppress(PermissionError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found[re.sub("[0-9]+", "N", os.readlink(path))] += 1
    return found


def sentinels() -> dict[str, str]:
    """What nobody may change."""
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in SENTINELS}
