"""Whoever follows what runs goes on over the deaths of agents: no byte, line or exit is lost, and none comes twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.client import connect

pytestmark = pytest.mark.system

TALK = "i=0; until test -e /given/stop; do echo line $i; i=$((i+1)); sleep 0.002; done; echo last of $i; exit 9"


def given(world: Any) -> Any:
    """A directory that containers see as /given."""
    path = world.directory / "given"
    path.mkdir(exist_ok=True)
    path.chmod(0o755)
    (path / "stop").unlink(missing_ok=True)
    return path


def in_background(world: Any, *words: str) -> Callable[[], tuple[int, str, str]]:
    """Starts a verb whose output is read all the while; calling the answer waits for its end."""
    child = world.start(*words)
    said: list[Any] = []
    thread = threading.Thread(target=lambda: said.append(child.communicate()))
    thread.start()

    def end() -> tuple[int, str, str]:
        thread.join(90)
        assert said, f"{words} has not ended"
        return child.returncode, *said[0]

    return end


def check(lines: list[str], err: str = "") -> None:
    """Every line once, in order, up to the last."""
    count = len(lines) - 1
    assert lines == [*(f"line {number}" for number in range(count)), f"last of {count}"], (lines[-3:], err)


def until_connected(world: Any, count: int) -> None:
    """The last so many verbs have a connection: who has none yet when the agent dies finds no agent, and none to start."""
    deadline = time.monotonic() + 60
    while not all(has_socket(child.pid) for child in world.children[-count:]):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_socket(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return any(os.readlink(entry).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir())
    return False


@pytest.mark.one_world
def test_run_logs_wait_and_events_go_on_over_every_death_of_an_agent(
    world: Any, kill_agent: Callable[[Any], None], rounds: Callable[[int, int], int]
) -> None:
    place = given(world)
    run = in_background(world, "run", "--name", "talker", "--volume", f"{place}:/given", "--", "sh", "-c", TALK)
    while "talker" not in world.ps() or world.ps()["talker"]["state"] != "RUNNING":
        time.sleep(0.02)
    logs, wait = in_background(world, "logs", "-f", "talker"), in_background(world, "wait", "talker")
    events = world.start("events", "--json", "--since", "0", "talker")
    until_connected(world, 3)
    for _ in range(rounds(3, 50)):
        kill_agent(world)
        with connect_soon(world) as client:  # nobody here starts it: one of them does
            client.ping()
    (place / "stop").touch()

    code, out, err = run()
    assert code == 9, err
    check(out.splitlines(), err)
    assert logs()[:2] == (0, out)
    code, out, err = wait()
    assert (code, out) == (9, "exit 9\n"), err
    seen = []
    for line in events.stdout:
        seen.append(json.loads(line))
        if seen[-1]["type"] == "end":
            break
    with connect(world.run_dir / "agent.sock") as client:
        again = client.events(0, "talker")
        expected = [next(again) for _ in seen]
    assert seen == expected
    assert world.meso("rm", "talker").code == 0


def connect_soon(world: Any) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            return connect(world.run_dir / "agent.sock")
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.one_world
def test_a_program_that_follows_with_the_client_needs_no_code_for_it(world: Any, kill_agent: Callable[[Any], None]) -> None:
    place = given(world)
    world.meso("run", "-d", "--name", "prog", "--volume", f"{place}:/given", "--", "sh", "-c", TALK)
    read = bytearray()

    def follow() -> None:
        with connect(world.run_dir / "agent.sock") as client:
            for offset, data in client.logs("prog", follow=True):
                assert offset == len(read)
                read.extend(data)

    thread = threading.Thread(target=follow)
    thread.start()
    with connect(world.run_dir / "agent.sock") as client:
        for _ in range(3):
            kill_agent(world)
            world.meso("ps")
            assert client.explain("prog")["state"] == "RUNNING"
        (place / "stop").touch()
        assert client.wait("prog")["exit"] == 9
        thread.join(60)
        check(read.decode().splitlines())
        client.remove("prog")


@pytest.mark.one_world
def test_a_verb_says_that_the_agent_is_stopped_and_answers_when_it_is_not(world: Any) -> None:
    world.meso("ps")
    pid = world.agent_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        child = world.start("ps", "--json")
        line = child.stderr.readline()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "the agent does not answer" in line
    assert child.wait(30) == 0


@pytest.mark.one_world
def test_an_agent_that_was_stopped_stays_stopped_whoever_watched(another_world: Any) -> None:
    """Whoever follows what ran is told how it ended, or that there is nothing to follow any more; nobody starts an agent for it."""
    world = another_world
    world.meso("run", "-d", "--name", "one", "--", "sh", "-c", "echo here; exec sleep 1000")
    run = in_background(world, "run", "--name", "two", "--", "sleep", "1000")
    wait, logs = in_background(world, "wait", "one"), world.start("logs", "-f", "one")
    events = world.start("events", "--json")
    assert logs.stdout.readline() == "here\n"
    while "two" not in (ps := world.ps()) or ps["two"]["state"] != "RUNNING":
        time.sleep(0.02)
    assert events.stdout.readline()

    assert world.meso("agent", "--stop").code == 0

    code, out, err = wait()
    assert (code, out) == (137, "exit 137\n"), err
    assert logs.wait(60) == 0
    _, err = events.communicate(timeout=60)
    assert events.returncode == 7
    assert "nothing that it ran goes on" in err
    run()
    assert not (world.run_dir / "agent.sock").exists()
    assert not (world.run_dir / "launcher.sock").exists()


@pytest.mark.one_world
def test_an_agent_that_was_stopped_while_nothing_ran_stays_stopped(another_world: Any) -> None:
    world = another_world
    world.meso("run", "--", "true")
    events = world.start("events", "--json")
    events.stdout.readline()
    os.kill(world.agent_pid(), signal.SIGTERM)
    _, err = events.communicate(timeout=60)
    assert (events.returncode, "nothing that it ran goes on" in err) == (7, True), err
    assert not (world.run_dir / "agent.sock").exists()
