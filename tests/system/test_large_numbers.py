"""Many at once: a crowd of containers, and groups of two hundred, which are counted, found, killed and removed like one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

MEMBERS = 200


def use(pid: int) -> dict[str, int]:
    """What a process has: memory of its own, and open files as far as they may be counted."""
    status = Path(f"/proc/{pid}/status").read_text()
    kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))
    return {"kib": kib, "files": len(os.listdir(f"/proc/{pid}/fd")) if os.access(f"/proc/{pid}/fd", os.R_OK) else -1}


def test_a_crowd_of_containers_lives_at_once_and_every_one_of_them_is_known_and_can_be_ended(
    canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int]
) -> None:
    world, count = canary.world, rounds(100, 1_000)
    before = canary.census()
    agent, launcher = world.agent_pid(), world.launcher_pid()
    empty = {"agent": use(agent), "launcher": use(launcher)}

    with pulse() as seen:
        launched = world.script("crowd.py", json.dumps({"verb": "launch", "count": count, "connections": 8}), timeout=60 + count)
        asked = time.monotonic()
        lines = {name: line for name, line in world.ps().items() if name.startswith("crowd")}
        asked = time.monotonic() - asked
        full = {"agent": use(agent), "launcher": use(launcher)}
        ended = world.script("crowd.py", json.dumps({"verb": "end", "count": count, "connections": 8}), timeout=60 + count)

    assert (launched["errors"], ended["errors"]) == ([], [])
    assert lines.keys() == {f"crowd{number}" for number in range(count)}
    assert {line["state"] for line in lines.values()} == {"RUNNING"}
    assert len({line["pid"] for line in lines.values()}) == count
    assert [name for name in world.ps() if name.startswith("crowd")] == []
    assert left_over(before) == []
    canary.assert_untouched()
    times = {"launch_s": launched["seconds"], "ps_s": round(asked, 2), "end_s": ended["seconds"]}
    figure(count=count, **times, empty=empty, full=full, after={"agent": use(agent), "launcher": use(launcher)}, **vars(seen))


def many(command: str | list[str], **others: Any) -> dict[str, Any]:
    """A pod of two hundred; `others`: members by name that are otherwise."""
    tasks = [{"name": f"t{at}", "command": command, "kill": {"signal": "KILL"}} for at in range(MEMBERS)]
    return {"name": "many", "tasks": [task | others.get(str(task["name"]), {}) for task in tasks]}


def of_many(world: Any) -> list[dict[str, Any]]:
    """Its members' lines of `ps`."""
    return [line for name, line in world.ps().items() if name.startswith("many.")]


def test_two_hundred_members_live_together_and_end_together(canary: Any, pulse: Any, figure: Any) -> None:
    world = canary.world
    before = canary.census()
    with pulse() as seen:
        began = time.monotonic()
        assert world.run(many(["sleep", "1000"]), "-d").code == 0
        up = time.monotonic()
        living = [line["state"] for line in of_many(world)]
        asked = time.monotonic()
        assert world.meso("kill", "many").code == 0
        assert world.meso("wait", "many").code == 0  # nobody failed: they were ended
        over = time.monotonic()
        waits = [line["wait"] for line in of_many(world)]
        assert world.meso("rm", "many").code == 0

    assert living == ["RUNNING"] * MEMBERS
    assert [(wait["signal"], wait["reason"]) for wait in waits] == [(9, "killed")] * MEMBERS
    assert left_over(before) == []
    canary.assert_untouched()
    figure(members=MEMBERS, launch_s=round(up - began, 2), end_s=round(over - asked, 2), **vars(seen))


def test_with_one_of_two_hundred_broken_none_has_run_and_nothing_is_left(canary: Any, pulse: Any, figure: Any) -> None:
    world = canary.world
    before = canary.census()
    marks = Path(world.directory) / "marks"
    marks.mkdir()
    marks.chmod(0o777)
    volumes = [{"source": f"host:{marks}", "target": "/marks"}]
    pod = many("echo > /marks/$MESOCOSM_ID", t137={"command": ["/no/such/program"]})
    pod = pod | {"tasks": [task | {"volumes": volumes} for task in pod["tasks"]]}
    with pulse() as seen:
        began = time.monotonic()
        answer = world.run(pod, "-d")
        took = time.monotonic() - began
        waits = [line["wait"]["reason"] for line in of_many(world)]
        assert world.meso("rm", "many").code == 0

    assert answer.code == 127
    assert (answer.error["id"], answer.error["errno"]) == ("many.t137", "ENOENT")
    assert waits == ["rolled_back"] * MEMBERS
    assert list(marks.iterdir()) == []
    assert left_over(before) == []
    canary.assert_untouched()
    figure(members=MEMBERS, rolled_back_s=round(took, 2), **vars(seen))

    # The positive control: without that one, all the others leave their marks.
    assert world.run(pod | {"tasks": [task for task in pod["tasks"] if task["name"] != "t137"]}).code == 0
    assert len(list(marks.iterdir())) == MEMBERS - 1
    assert world.meso("rm", "many").code == 0
