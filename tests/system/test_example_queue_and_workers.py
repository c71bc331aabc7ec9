"""The example `queue-and-workers`: every job is done exactly once; if one member fails all are gone, and it is told who and why."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

EXAMPLE = Path(__file__).resolve().parents[2] / "contrib/examples/queue-and-workers/pod.toml"
NAME = "queue-and-workers"
QUEUE, PRODUCER = f"{NAME}.queue", f"{NAME}.queue.producer"
WORKERS = [f"{NAME}.queue.worker-{number}" for number in (1, 2, 3)]

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not shutil.which("redis-server", path="/usr/bin"), reason="no redis: apt-get install redis-server"),
]


def pod_file(world: Any, *, jobs: int, seconds_per_job: float) -> str:
    """The example with so many jobs that take so long, as a file of the world."""
    pod = tomllib.loads(EXAMPLE.read_text())
    producer, *workers = pod["tasks"][0]["tasks"]
    producer["env"]["JOBS"] = str(jobs)
    for worker in workers:
        worker["env"]["SECONDS_PER_JOB"] = str(seconds_per_job)
    path = Path(world.directory) / "pod.json"
    path.write_text(json.dumps(pod))
    path.chmod(0o644)
    return str(path)


def results(world: Any) -> list[tuple[str, str]]:
    """(job, what came out of it) as the workers wrote them down."""
    files = (world.run_dir / "containers" / NAME / "volumes/results").iterdir()
    job_and_result = [line.split() for file in files for line in file.read_text().splitlines()]
    return [(job, result) for job, result in job_and_result]


def right_result(number: int) -> tuple[str, str]:
    return f"job-{number}", hashlib.sha256(f"job-{number}\n".encode()).hexdigest()


def test_every_job_is_done_exactly_once_and_then_the_pod_ends_by_itself(canary: Any, rounds: Callable[[int, int], int]) -> None:
    world, jobs = canary.world, rounds(40, 3000)
    before = canary.census()

    ran = world.meso("run", "--json", pod_file(world, jobs=jobs, seconds_per_job=0), timeout=600)

    assert ran.code == 0, (ran.out[-2000:], ran.err)
    assert sorted(results(world)) == sorted(right_result(number) for number in range(1, jobs + 1))
    waits = ran.lines[-1]["containers"]
    assert {name: waits[name]["exit"] for name in (QUEUE, PRODUCER, *WORKERS)} == dict.fromkeys((QUEUE, PRODUCER, *WORKERS), 0)
    assert {name for name in waits if waits[name]["reason"] == "exited"} == {PRODUCER, *WORKERS}  # the queue was asked to go
    assert world.meso("rm", NAME).code == 0
    assert left_over(before) == []
    canary.assert_untouched()


@pytest.mark.parametrize("victim", [WORKERS[1], PRODUCER, QUEUE])
def test_when_one_is_killed_all_are_gone_in_order_and_it_is_told_who_and_why(canary: Any, victim: str) -> None:
    world = canary.world
    before = canary.census()
    # More jobs than there is time for: each of them is at work when one is killed.
    running = world.start("run", "--json", pod_file(world, jobs=20_000, seconds_per_job=0.02))
    lines = []
    while sum(line["type"] == "output" and line["data"].endswith("is done\n") for line in lines) < 5:
        text = running.stdout.readline()
        assert text, "the run ended early"
        lines.append(json.loads(text))

    os.kill(world.ps()[victim]["pid"], signal.SIGKILL)

    lines += map(json.loads, running.stdout)
    end = lines[-1]
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGKILL, end
    assert (end["type"], end["state"], end["exit"], end["error"]) == ("end", "DEAD", 128 + signal.SIGKILL, None)
    waits = {name: (wait["exit"], wait["signal"], wait["reason"]) for name, wait in end["containers"].items()}
    others = {NAME, QUEUE, PRODUCER, *WORKERS} - {victim}
    # Who died of itself is the only one whose reason says so. The others were asked to go, and did, unless their world went.
    how = (None, int(signal.SIGKILL), "parent") if victim == QUEUE else (0, None, "group")
    assert waits == {
        **dict.fromkeys(others, how),
        victim: (None, int(signal.SIGKILL), "signaled"),
        NAME: (None, int(signal.SIGKILL), "group"),
    }
    dead = [line["id"] for line in lines if line["type"] == "dead"]
    assert dead[-2:] == [QUEUE, NAME]  # each after all that is nested in it
    assert set(dead[:-2]) == {PRODUCER, *WORKERS}
    assert victim in (QUEUE, dead[0])
    done = [job for job, _ in results(world)]
    assert len(done) == len(set(done))
    assert world.meso("wait", NAME).code == 128 + signal.SIGKILL
    assert world.meso("rm", NAME).code == 0
    assert left_over(before) == []
    canary.assert_untouched()
