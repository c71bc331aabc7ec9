"""contrib/examples/bounded-legacy: a greedy program within its limits, beside one that has to answer at once.

The effect of every limit is read from the kernel's own counters and from what the program saw of it. How soon the other
one answers is kept as a figure: on a shared machine one run says more about the neighbours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

pytestmark = pytest.mark.system

EXAMPLE = Path(__file__).resolve().parents[2] / "contrib" / "examples" / "bounded-legacy"
BOUNDED, UNBOUNDED = EXAMPLE / "pod.toml", EXAMPLE / "unbounded.toml"
ANSWERED = re.compile(r"answered after p50 ([\d.]+) ms, p99 ([\d.]+) ms, max ([\d.]+) ms\n")


class Outcome:
    """A run of the example to its end: its lines, and the counters of the report's control groups, as last seen."""

    def __init__(self, world: Any, file: Path) -> None:
        if shutil.which("python3", path="/usr/bin") is None:
            pytest.skip("python3 is missing: apt-get install python3-minimal")
        name = tomllib.loads(file.read_text())["name"]
        running = world.start("run", "--json", str(file))
        self.counters: dict[str, int] = {}
        self.most_processes = 0
        self.seconds = 0.0  # for which the report was watched
        self.used: dict[str, float] = {}  # CPU seconds of each of its processes
        lines = []
        with running:
            for text in running.stdout:  # to its end: what a reader has buffered, communicate() does not know
                lines.append(json.loads(text))
                if lines[-1]["type"] == "started" and lines[-1]["id"] == f"{name}.report":
                    self._watch(lines[-1]["pid"])
            self.err = running.stderr.read()
        self.code = running.returncode
        self.said = dict.fromkeys(("report", "counter"), "")
        for line in lines:
            if line["type"] == "output":
                self.said[line["id"].partition(".")[2]] += line["data"]
        self.waits = {member: lines[-1]["containers"][f"{name}.{member}"] for member in self.said}
        assert world.meso("rm", name).code == 0

    def _watch(self, pid: int) -> None:
        groups = control_groups(pid)
        if groups["pids"].name != "report":
            return  # this user has none to give
        began = time.monotonic()
        with contextlib.suppress(OSError):  # they go with the program
            while True:
                for process in (groups["cpu"] / "cgroup.procs").read_text().split():
                    with contextlib.suppress(OSError):
                        self.used[process] = cpu_seconds(process)
                self.seconds = time.monotonic() - began
                for controller, file in (("cpu", "cpu.stat"), ("pids", "pids.events")):
                    pairs = (line.split() for line in (groups[controller] / file).read_text().splitlines())
                    self.counters |= {f"{controller} {key}": int(value) for key, value in pairs}
                self.most_processes = max(self.most_processes, int((groups["pids"] / "pids.current").read_text()))
                time.sleep(0.02)

    @property
    def answers(self) -> dict[str, float]:
        """What the counter says of itself, in milliseconds."""
        found = ANSWERED.fullmatch(self.said["counter"])
        assert found, self.said
        return dict(zip(("p50", "p99", "max"), map(float, found.groups()), strict=True))


def cpu_seconds(pid: str) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def control_groups(pid: int) -> dict[str, Path]:
    """The directory of a process's group for each controller, of either version."""
    found: dict[str, Path] = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(",") if names else ("cpu", "pids"):
            top = Path("/sys/fs/cgroup") / (name if names else "")
            if names or name not in found:
                found[name] = top / path.lstrip("/")
    return found


def can_limit(world: Any) -> bool:
    """Whether `doctor` says that this user can have limits here."""
    checks = {line["check"]: line for line in world.meso("doctor", "--json").lines}
    return all(checks[f"limit {name}"]["ok"] for name in ("memory", "cpus", "pids"))


@pytest.fixture(scope="module")
def bounded(world: Any) -> Outcome:
    """The example with its limits."""
    if not can_limit(world):
        pytest.skip("this machine cannot: no control group is delegated to this user")
    return Outcome(world, BOUNDED)


@pytest.fixture(scope="module")
def free(world: Any) -> Outcome:
    """The same without them, which is the only difference between the two files."""
    documents = [tomllib.loads(file.read_text()) for file in (BOUNDED, UNBOUNDED)]
    assert documents[0]["tasks"][0].pop("resources") == {"cpus": "200m", "memory": "64MiB", "pids": 40}
    assert documents[0]["tasks"] == documents[1]["tasks"]
    return Outcome(world, UNBOUNDED)


def test_the_report_is_made_to_wait_when_it_has_used_up_its_cpu(bounded: Outcome) -> None:
    used = sum(bounded.used.values())

    assert used < 2 * 0.2 * bounded.seconds + 0.2
    # On a machine that is busy enough with others it never gets as much as it may have.
    assert bounded.counters["cpu nr_throttled"] > 0 or used < 0.2 * bounded.seconds


def test_the_report_has_no_more_processes_than_it_may_and_sees_that_it_cannot_fork(bounded: Outcome) -> None:
    assert "Cannot fork" in bounded.said["report"]
    assert "not all branches at once\n" in bounded.said["report"]
    assert bounded.counters["pids max"] > 0
    assert 30 < bounded.most_processes <= 40


def test_the_report_ends_at_its_memory_limit_and_it_is_told_how_large_and_whose_that_is(bounded: Outcome) -> None:
    wait = bounded.waits["report"]

    assert (wait["signal"], wait["reason"], wait["oom"]) == (9, "memory", True)
    assert wait["message"] == "killed at its memory limit of 64 MiB"


def test_the_shop_stays_open_without_its_report(bounded: Outcome) -> None:
    assert (bounded.code, bounded.waits["counter"]["exit"]) == (0, 0), bounded.err
    assert 0 <= bounded.answers["p50"] <= bounded.answers["p99"] <= bounded.answers["max"]


def test_the_same_report_takes_all_of_it_where_nothing_holds_it(free: Outcome) -> None:
    """The positive control of all the above."""
    assert free.said["report"] == "all 100 branches at once\n", free.err
    assert (free.code, free.waits["report"]["exit"], free.waits["counter"]["exit"]) == (0, 0, 0)
    assert free.counters.get("cpu nr_throttled", 0) == 0


def test_how_soon_the_counter_answers_beside_either_is_kept(
    world: Any, bounded: Outcome, free: Outcome, rounds: Callable[[int, int], int], figure: Callable[..., None]
) -> None:
    """Turn by turn, so that the machine's other business falls on both; compared only where there are turns enough."""
    middles: dict[str, list[float]] = {"bounded": [], "unbounded": []}
    for number in range(rounds(1, 10)):
        for report, outcome, file in (("bounded", bounded, BOUNDED), ("unbounded", free, UNBOUNDED)):
            answers = (outcome if number == 0 else Outcome(world, file)).answers
            assert answers["p50"] <= answers["p99"] <= answers["max"]
            middles[report].append(answers["p50"])
            figure(report=report, round=number, **{f"{key}_ms": value for key, value in answers.items()})
    if len(middles["bounded"]) >= 10:
        assert median(middles["bounded"]) < 1.5 * median(middles["unbounded"])


def test_a_user_who_has_no_control_groups_is_told_so_before_anything_runs(world: Any) -> None:
    if can_limit(world):
        pytest.skip("this machine cannot show it: this user can have limits here")
    before = set(world.ps())

    answer = world.meso("run", "--json", str(BOUNDED))

    assert answer.code == 2, answer.out
    assert answer.error["code"] == "unsupported"
    assert answer.error["path"].startswith("$.tasks[0].resources.")
    assert "delegated" in answer.error["hint"]
    assert set(world.ps()) == before
