"""Limits hold where they can be set, and are refused in one clear sentence where they cannot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

HOG = ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]  # fills a buffer of that size


def can_limit(world: Any) -> bool:
    """Whether `doctor` says that this user can have limits here."""
    checks = {line["check"]: line for line in world.meso("doctor", "--json").lines}
    return all(checks[f"limit {name}"]["ok"] for name in ("memory", "cpus", "pids"))


def single(world: Any, command: str | list[str], **fields: Any) -> Any:
    task = {"name": "one", "command": command} | fields
    return world.run({"name": "one", "executor": "command", "tasks": [task]})


def test_a_memory_hog_ends_at_its_limit_and_the_reason_is_told(world: Any) -> None:
    if not can_limit(world):
        pytest.skip("this machine cannot: no control group is delegated to this user")

    answer = single(world, HOG, resources={"memory": "24MiB"})

    wait = answer.lines[-1]["containers"]["one"]
    assert answer.code == 137, (answer.out[-2000:], answer.err)
    assert wait["oom"] is True
    assert wait["reason"] == "memory"
    world.meso("rm", "one")


def test_the_same_hog_survives_without_a_limit(world: Any) -> None:
    """The positive control of the test above."""
    answer = single(world, HOG)

    assert answer.code == 0, (answer.out[-2000:], answer.err)
    world.meso("rm", "one")


FORKS = 'for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & started="$started $!"; done; echo all; kill $started'


def test_no_more_processes_than_its_limit(world: Any) -> None:
    if not can_limit(world):
        pytest.skip("this machine cannot: no control group is delegated to this user")

    answer = single(world, FORKS + "; true", resources={"pids": 6})

    text = "".join(line["data"] for line in answer.lines if line["type"] == "output")
    assert "fork" in text.lower(), text
    assert "all" not in text
    world.meso("rm", "one")


def test_the_same_forks_succeed_without_a_limit(world: Any) -> None:
    answer = single(world, FORKS)

    text = "".join(line["data"] for line in answer.lines if line["type"] == "output")
    assert text == "all\n"
    assert answer.code == 0
    world.meso("rm", "one")


def test_a_fifth_of_a_cpu_is_a_fifth(world: Any) -> None:
    if not can_limit(world):
        pytest.skip("this machine cannot: no control group is delegated to this user")
    spin = "timeout 2 sh -c 'while :; do :; done'; true"

    started = time.monotonic()
    single(world, spin, resources={"cpus": 0.2})
    wall = time.monotonic() - started

    world.meso("rm", "one")
    # How much was used is asked of a process that is still there: its own accounting.
    world.run(
        {"name": "one", "executor": "command", "tasks": [
            {"name": "one", "command": "while :; do :; done", "resources": {"cpus": 0.2}},
        ]}, "-d",
    )  # fmt: skip
    pid = world.ps()["one"]["pid"]
    used = cpu_seconds(pid)
    time.sleep(2)
    share = (cpu_seconds(pid) - used) / 2
    world.meso("kill", "-s", "KILL", "one")
    world.meso("wait", "one")
    world.meso("rm", "one")
    assert share < 0.4
    assert wall >= 1.5


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_limit_that_this_user_cannot_have_is_refused_in_one_clear_sentence(world: Any) -> None:
    if can_limit(world):
        pytest.skip("this machine cannot show it: this user can have limits here")
    before_ids = set(world.ps())

    answer = single(world, "true", resources={"memory": "64MiB"})

    assert answer.code == 2, (answer.out, answer.err)
    assert answer.error["code"] == "unsupported"
    assert answer.error["path"] == "$.tasks[0].resources.memory"
    assert answer.error["hint"]
    assert set(world.ps()) == before_ids
    doctor = world.meso("doctor", "--json")
    assert doctor.code == 6
    assert next(line for line in doctor.lines if line["check"] == "limit memory")["hint"]


def test_a_fork_bomb_is_bounded_and_gone_with_its_container(canary: Any) -> None:
    world = canary.world
    if not can_limit(world):
        pytest.skip("this machine cannot: no control group is delegated to this user")
    before = canary.census()
    bomb = {"name": "bomb", "command": "f() { f | f & }; f; sleep 60", "resources": {"pids": 100}}
    world.run({"name": "bomb", "tasks": [bomb]}, "-d")
    time.sleep(0.5)

    started = time.monotonic()
    world.meso("kill", "-s", "KILL", "bomb.bomb")
    world.meso("wait", "bomb")

    assert time.monotonic() - started < 20
    assert world.meso("rm", "bomb").code == 0
    assert left_over(before) == []
    canary.assert_untouched()
