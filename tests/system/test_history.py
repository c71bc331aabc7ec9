"""History and explanations on a real kernel: what was removed, who was there, what a killed agent had not written."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

CLIMBER = "x=a; while :; do x=$x$x; done"


def history(world: Any, *words: str) -> list[dict[str, Any]]:
    answer = world.meso("history", "--json", *words)
    assert answer.code == 0, answer.err
    return list(answer.lines)


def test_one_that_was_removed_is_explained_as_it_was_before(world: Any) -> None:
    pod = {"name": "gone", "tasks": [{"name": "a", "command": "exit 3"}, {"name": "b", "command": ["sleep", "1000"]}]}
    assert world.run(pod).code == 3
    before = world.meso("explain", "gone.b", "--json").lines[0]
    assert world.meso("rm", "gone").code == 0

    after = world.meso("explain", "gone.b", "--json").lines[0]

    assert "gone" not in world.ps()
    assert after["chain"] == before["chain"]
    assert after["plan"] == before["plan"]
    assert [(link["kind"], link["id"]) for link in after["chain"]] == [
        ("state", "gone.b"), ("end", "gone.b"), ("state", "gone.a"), ("end", "gone.a"), ("advice", "gone.a"),
    ]  # fmt: skip
    words = world.meso("explain", "gone.b").out
    assert "and that was because of gone.a" in words
    assert "exit code 3" in words


def test_who_was_there_at_a_moment(world: Any) -> None:
    assert world.run({"name": "then", "tasks": [{"name": "t", "command": ["sleep", "1000"]}]}, "-d").code == 0
    moment = time.time()
    world.meso("kill", "then")
    world.meso("wait", "then")
    world.meso("rm", "then")

    assert {line["id"]: line["state"] for line in history(world, "then", "--at", f"@{moment}")} == {
        "then": "RUNNING",
        "then.t": "RUNNING",
    }
    assert history(world, "then", "--at", "now") == []
    assert history(world, "then", "--at", f"@{moment - 3600}") == []
    assert [line["wait"]["reason"] for line in history(world, "then.t")] == ["killed"]


def test_the_error_of_a_launch_that_was_rolled_back_is_said_once(world: Any) -> None:
    pod = {"name": "broken", "tasks": [{"name": "a", "command": ["no-such-program"]}, {"name": "b", "command": ["true"]}]}
    assert world.run(pod).code == 127

    words = world.meso("explain", "broken.b").out

    assert words.count("no-such-program cannot be executed") == 1
    assert words.count("what to do:") == 1
    assert "step" in words
    assert "execveat()" in words


def test_a_death_by_the_memory_limit_of_another_names_whose_it_was(world: Any) -> None:
    if "memory" not in limits(world):
        pytest.skip("this machine cannot limit memory for this user")
    pod = {"name": "fat", "tasks": [{
        "name": "outer", "command": ["sleep", "1000"], "resources": {"memory": "24MiB"},
        "tasks": [{"name": "in", "command": ["sh", "-c", CLIMBER]}],
    }]}  # fmt: skip
    world.run(pod)

    chain = world.meso("explain", "fat.outer.in", "--json").lines[0]["chain"]

    said = " ".join(link["says"] for link in chain if link["kind"] == "limit")
    assert "fat.outer, 24 MiB" in said


def limits(world: Any) -> list[str]:
    """Which limits this world's user can set: asked by trying."""
    done = world.meso("run", "--name", "asked", "--memory", "24MiB", "--", "true")
    world.meso("rm", "asked")
    return ["memory"] if done.code == 0 else []


def test_what_a_killed_agent_had_not_written_is_in_the_history_once(world: Any, rounds: Callable[[int, int], int]) -> None:
    count = rounds(3, 30)
    since = time.time()
    for number in range(count):
        assert world.run({"name": f"k{number % 2}", "tasks": [{"name": "t", "command": f"exit {number % 7}"}]}).code == number % 7
        pidfd = os.pidfd_open(world.agent_pid())
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)

    lines = [line for line in history(world, "--since", f"@{since}") if line["id"] in ("k0.t", "k1.t")]

    assert [line["wait"]["exit"] for line in lines] == [number % 7 for number in range(count)]
    assert max(Counter((line["id"], line["life"]) for line in lines).values()) == 1


def test_a_damaged_history_stops_nobody_and_is_said(another_world: Any) -> None:
    world = another_world
    state = Path(world.environment["MESOCOSM_STATE_DIR"])
    state.mkdir()
    (state / "history.db").write_bytes(os.urandom(50_000))
    for path in (state, state / "history.db"):
        os.chown(path, world.uid, world.gid)

    assert world.run({"name": "web", "tasks": [{"name": "t", "command": ["true"]}]}).code == 0

    answer = world.meso("history")
    assert "web.t" in answer.out
    assert "set aside" in answer.err
    doctor = [json.loads(line) for line in world.meso("doctor", "--json").out.splitlines()]
    assert [line["ok"] for line in doctor if line["check"] == "history"] == [False]


def test_a_state_directory_that_cannot_be_written_stops_nobody_and_is_said(another_world: Any) -> None:
    world = another_world
    state = Path(world.environment["MESOCOSM_STATE_DIR"])
    (state / "history.db").mkdir(parents=True)
    for path in (state, state / "history.db"):
        os.chown(path, world.uid, world.gid)

    assert world.run({"name": "web", "tasks": [{"name": "t", "command": "exit 4"}]}).code == 4
    refused = world.meso("history")
    (state / "history.db").rmdir()

    assert refused.code == 4
    assert "the history cannot be read" in refused.err
    deadline = time.monotonic() + 60
    while (answer := world.meso("history", "--json", "web.t")).code != 0:
        assert time.monotonic() < deadline, answer.err
        time.sleep(0.5)
    assert [line["wait"]["exit"] for line in answer.lines] == [4]


def test_the_agent_answers_while_its_history_is_written(world: Any, pulse: Any, figure: Callable[..., None], rounds: Any) -> None:
    with pulse() as seen:
        for number in range(rounds(2, 40)):
            world.run({"name": f"n{number}", "tasks": [{"name": f"t{task}", "command": ["true"]} for task in range(10)]})
            history(world, "--limit", "5")

    figure(asked=seen.asked, p99_ms=seen.p99_ms, max_ms=seen.max_ms)
    assert seen.asked > 0
