"""Whoever asked for a launch goes away, loses patience or is killed, at each of its moments; the launcher stands still: what was
begun is carried out or undone whole, a kill is always taken, and the next launch of the same id is served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system
QUIET = {"command": ["sleep", "1000"], "kill": {"signal": "TERM", "grace": "50ms"}}
POD = {"name": "web", "tasks": [{"name": "a", **QUIET}, {"name": "b", **QUIET, "tasks": [{"name": "c", **QUIET}]}]}
IDS = {"web", "web.a", "web.b", "web.b.c"}
LINES = 120  # a launch of it has more, as root and as an ordinary user
HOWS = ["meso kill", "ctrl-C", "SIGTERM", "--timeout", "kill -9"]
if os.environ.get("MESOCOSM_SOAK") == "1":
    HOWS.append("meso kill, and it never moves again")


def test_a_client_that_hangs_up_at_any_moment_of_its_launch_leaves_a_whole_pod_or_none(
    canary: Any, pulse: Any, figure: Callable[..., None], rounds: Callable[[int, int], int]
) -> None:
    world = canary.world
    before = canary.census()
    with pulse() as seen:
        script = str(Path(__file__).with_name("leaver.py"))
        command = world.as_user(world.python, "-B", script, str(world.run_dir / "agent.sock"), str(rounds(8, 1)), str(rounds(1, 3)))
        told = subprocess.run(command, capture_output=True, text=True, env=dict(world.environment), cwd="/", check=False)

    assert told.returncode == 0, told.stdout + told.stderr
    found = json.loads(told.stdout)
    figure(**found, p99_ms=seen.p99_ms, max_ms=seen.max_ms)
    assert found["lines"] > 50
    assert found["turns"] == found["running"] + found["rolled_back"] + found["unknown"]
    assert found["rolled_back"] == 0, "that nobody listens is no reason to give up what was begun"
    assert found["unknown"] <= 2 * rounds(1, 3), "only what had not been looked at yet"
    assert left_over(before) == []
    canary.assert_untouched()


def begin(world: Any, *words: str) -> subprocess.Popen[str]:
    """`meso run --json` of the pod, in the background."""
    client: subprocess.Popen[str] = world.start("run", "--json", *words, "-", stdin=subprocess.PIPE)
    assert client.stdin is not None
    client.stdin.write(json.dumps(POD))
    client.stdin.close()
    return client


def read(client: subprocess.Popen[str], upto: int | str) -> list[dict[str, Any]]:
    """So many event lines, or those up to one of a type."""
    assert client.stdout is not None
    lines: list[dict[str, Any]] = []
    while len(lines) != upto and not (lines and lines[-1].get("type") == upto):
        line = client.stdout.readline()
        if not line:
            break
        lines.append(json.loads(line))
    return lines


def rest(client: subprocess.Popen[str]) -> tuple[list[dict[str, Any]], int]:
    """All other lines, and the exit code."""
    assert client.stdout is not None
    assert client.stderr is not None
    with client.stdout, client.stderr:
        lines = [json.loads(line) for line in client.stdout]
        err = client.stderr.read()
    code = client.wait(timeout=90)
    assert lines or code < 0, err
    return lines, code


def settled(world: Any) -> dict[str, str]:
    """The states of the pod's containers, once they do not change any more."""
    deadline = time.monotonic() + 60
    while True:
        states = {name: line["state"] for name, line in world.ps().items() if name in IDS}
        if set(states.values()) <= {"DEAD"} or (set(states) == IDS and set(states.values()) == {"RUNNING"}):
            return states
        assert time.monotonic() < deadline, states


def forget(world: Any, *, is_running: bool) -> None:
    """So that the next one may have its name."""
    if is_running:
        assert world.meso("kill", "-s", "KILL", "web").code == 0
        world.meso("wait", "web")
    assert world.meso("rm", "web").code == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_interrupted_at_any_moment_ends_its_pod_or_lets_it_be_whole(
    canary: Any, rounds: Callable[[int, int], int], number: signal.Signals
) -> None:
    world = canary.world
    before = canary.census()
    for upto in range(1, LINES, LINES // rounds(3, LINES)):
        client = begin(world)
        read(client, upto)
        client.send_signal(number)
        lines, code = rest(client)

        states = settled(world)
        if number is signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:
            assert code in (125, -number, 128 + number, 137, 143), (upto, code)
            assert set(states.values()) <= {"DEAD"}, (upto, states)
            if lines:
                assert lines[-1]["type"] == "end", (upto, lines[-1])
        if states:
            forget(world, is_running="RUNNING" in states.values())
    assert world.run({"name": "web", "tasks": [{"name": "a", "command": "exit 3"}]}).code == 3
    assert world.meso("rm", "web").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


SIGNALS = {"ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """A process that does nothing at all."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("how", HOWS)
def test_a_launch_whose_launcher_stands_still_can_be_ended_at_once(canary: Any, pulse: Any, figure: Any, how: str) -> None:
    world = canary.world
    before = canary.census()
    with pulse() as seen:
        with standing_still(world.launcher_pid()):
            client = begin(world, *(["--timeout", "500ms"] if how == "--timeout" else []))
            read(client, "admitted")
            began = time.monotonic()
            if how in SIGNALS:
                client.send_signal(SIGNALS[how])
            if how == "kill -9":
                client.wait()
            if how not in ("ctrl-C", "SIGTERM", "--timeout"):
                assert world.meso("kill", "web").code == 0
                assert world.meso("kill", "web").code in (0, 4), "taken once more, or over already"
            assert world.ps()["canary.bird"]["state"] == "RUNNING", "the agent answers"
            if "never" in how:
                lines, code = rest(client)
            elif how == "--timeout":
                time.sleep(0.6)
        if "never" not in how:
            lines, code = rest(client)
        took = time.monotonic() - began

    assert set(settled(world).values()) == {"DEAD"}
    assert code == {"--timeout": 124, "kill -9": -signal.SIGKILL}.get(how, 125)
    if how != "kill -9":
        assert (lines[-1]["state"], lines[-1]["error"]["message"]) == ("ROLLED_BACK", "killed during the launch")
    assert not [line for line in lines if line["type"] == "started"]
    figure(how=how, seconds=round(took, 1), max_ms=seen.max_ms)
    assert took < 60
    assert world.run({"name": "web", "tasks": [{"name": "a", "command": "exit 3"}]}).code == 3
    assert world.meso("rm", "web").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_a_wait_whose_patience_ends_ends_nobody(canary: Any) -> None:
    world = canary.world
    before = world.ps()

    answer = world.meso("wait", "--timeout", "300ms", "canary")

    assert answer.code == 124
    assert {name: line["state"] for name, line in world.ps().items()} == {name: line["state"] for name, line in before.items()}
    canary.assert_untouched()


def test_ten_kills_at_once_of_a_pod_that_does_not_listen_do_not_hold_up_the_eleventh(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    deaf = {"name": "a", "command": "trap '' TERM INT HUP; while :; do sleep 1; done", "kill": {"signal": "TERM", "grace": "1h"}}
    assert world.run({"name": "web", "tasks": [deaf]}, "-d").code == 0
    kills = [world.start("kill", *(["-s", name] if name else []), "web.a") for name in ("TERM", "", "HUP", "", "INT") * 2]
    assert [child.communicate(timeout=90) and child.returncode for child in kills] == [0] * 10
    assert world.ps()["web.a"]["state"] == "STOPPING"

    began = time.monotonic()
    assert world.meso("kill", "-s", "KILL", "web.a").code == 0
    assert world.meso("wait", "web.a").code == 137

    assert time.monotonic() - began < 60, "not the hour that the others would have waited"
    world.meso("wait", "web")
    assert world.meso("rm", "web").code == 0
    assert left_over(before) == []
    canary.assert_untouched()
