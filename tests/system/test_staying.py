"""An agent whose files are removed under it: it stays reachable, and what runs is not lost by it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.linux import procfs
from mesocosm.kernel.testing.census import Census, census, left_over

pytestmark = pytest.mark.system


class Home:
    """A world of its own with one container in it, and a census from before it had an agent."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.before: Census = census(keys=False)
        task = {"name": "one", "command": "sleep 1000", "kill": {"signal": "KILL"}}
        self.pod = {"name": "one", "executor": "command", "tasks": [task]}
        assert world.run(self.pod, "-d").code == 0
        self.pid = world.ps()["one"]["pid"]
        self.agent = world.agent_pid()
        self.first = procfs.process(self.pid)

    @property
    def lives(self) -> bool:
        """Whether the container does."""
        assert self.first is not None
        return procfs.is_same(self.first)

    def agents(self) -> list[int]:
        """The processes that are agents of this world."""
        mark = f"MESOCOSM_RUN_DIR={self.world.run_dir}".encode()
        found = []
        for pid in procfs.pids():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in environment and "agent" in procfs.arguments_of(pid):
                found.append(pid)
        return found

    def until_bound(self) -> None:
        """Waits until the agent listens under its name again."""
        deadline = time.monotonic() + 30
        while not (self.world.run_dir / "agent.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def home(another_world: Any) -> Iterator[Home]:
    """A world that may be taken apart."""
    made = Home(another_world)
    yield made
    for pid in made.agents():
        os.kill(pid, signal.SIGCONT)


def test_a_socket_that_is_removed_is_bound_anew_before_a_verb_misses_it(home: Home) -> None:
    world = home.world
    for _ in range(3):
        (world.run_dir / "agent.sock").unlink()

        assert world.ps()["one"]["pid"] == home.pid
        assert home.agents() == [home.agent]
    assert "agent.sock had been removed: bound anew" in (world.run_dir / "agent.log").read_text()
    assert world.meso("run", "--", "true").code == 0  # nothing else has changed
    os.kill(home.agent, signal.SIGTERM)  # and what runs goes on, as ever
    while home.agents():
        time.sleep(0.01)
    assert world.ps()["one"]["pid"] == home.pid
    assert world.meso("agent", "--stop").code == 0
    assert left_over(home.before) == []


@pytest.mark.one_world
def test_a_socket_that_is_renamed_is_bound_anew_under_its_own_name(home: Home) -> None:
    world = home.world
    path = world.run_dir / "agent.sock"
    os.rename(path, path.with_name("elsewhere"))
    home.until_bound()

    assert world.ps()["one"]["pid"] == home.pid
    assert world.meso("agent", "--stop").code == 0
    assert left_over(home.before) == []


@pytest.mark.parametrize(
    "how", ["removed", pytest.param("moved", marks=pytest.mark.one_world), pytest.param("replaced", marks=pytest.mark.one_world)]
)
def test_in_a_run_directory_that_is_gone_what_runs_can_still_be_ended(home: Home, how: str) -> None:
    """No agent after this one could find it: so this one shows and ends it, and starts nothing new."""
    world = home.world
    aside = world.directory / "aside"
    if how == "removed":
        place = world.run_dir.stat().st_ino
        while world.run_dir.exists() and world.run_dir.stat().st_ino == place:  # the agent may make its socket again while it goes
            shutil.rmtree(world.run_dir, ignore_errors=True)
    else:
        os.rename(world.run_dir, aside)
    if how == "replaced" and not world.run_dir.exists():
        world.run_dir.mkdir(mode=0o700)
        os.chown(world.run_dir, world.uid, world.gid)
    home.until_bound()

    assert world.ps()["one"]["pid"] == home.pid
    assert home.agents() == [home.agent]
    assert home.lives
    refused = world.meso("run", "--json", "--", "true")
    assert refused.code == 125
    assert refused.error["message"] == "the ledger has been removed, so nothing new is started"
    assert "agent --stop" in refused.error["hint"]
    notes = world.meso("audit", "--json").lines[0]["notes"]
    assert [note for note in notes if "the next agent could not find what runs" in note]
    assert {line["check"]: line["ok"] for line in world.meso("doctor", "--json").lines}["ledger"] is False

    assert world.meso("agent", "--stop").code == 0

    assert not home.lives
    assert left_over(home.before) == []
    assert world.run(home.pod, "-d").code == 0  # the next one begins anew
    assert world.meso("agent", "--stop").code == 0
    shutil.rmtree(aside, ignore_errors=True)


@pytest.mark.one_world
def test_an_agent_that_no_other_could_follow_ends_what_runs_before_it_goes(home: Home) -> None:
    world = home.world
    os.rename(world.run_dir, world.directory / "aside")
    home.until_bound()

    os.kill(home.agent, signal.SIGTERM)

    deadline = time.monotonic() + 60
    while home.agents():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not home.lives
    assert left_over(home.before) == []
    assert "so that is ended first" in (world.directory / "aside" / "agent.log").read_text()


@pytest.mark.one_world
def test_a_verb_that_meets_the_lock_of_an_agent_without_a_socket_says_so_and_starts_no_other(home: Home) -> None:
    world = home.world
    os.kill(home.agent, signal.SIGSTOP)
    (world.run_dir / "agent.sock").unlink()

    began = time.monotonic()
    said = world.meso("ps", "--json")
    took = time.monotonic() - began

    assert said.code == 7
    assert f"process {home.agent}" in said.error["message"]
    assert f"kill -TERM {home.agent}" in said.error["hint"]
    assert took < 30
    assert home.agents() == [home.agent]
    os.kill(home.agent, signal.SIGCONT)
    home.until_bound()
    assert world.ps()["one"]["pid"] == home.pid
    assert world.meso("agent", "--stop").code == 0
    assert left_over(home.before) == []


@pytest.mark.one_world
def test_where_another_agent_has_the_directory_the_first_one_says_how_it_is_ended(home: Home) -> None:
    """While the first one could not look, the directory went and another agent came, which has a state of its own."""
    state = str(home.world.directory / "state-of-another")
    world = dataclasses.replace(home.world, environment={**home.world.environment, "MESOCOSM_STATE_DIR": state})
    os.kill(home.agent, signal.SIGSTOP)
    os.rename(world.run_dir, world.directory / "aside")
    assert world.meso("ps").code == 0  # of the second agent, which knows of nothing
    os.kill(home.agent, signal.SIGCONT)
    log = world.directory / "aside" / "agent.log"
    deadline = time.monotonic() + 30
    while f"kill -TERM {home.agent} ends this agent" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)

    said = world.meso("audit", "--json")

    assert said.code == 6
    found = {each["target"] for each in said.lines[0]["strangers"]}
    assert [target for target in found if "meso-launcher" in target]
    assert said.lines[0]["leftover"] == []
    assert home.lives
    os.kill(home.agent, signal.SIGTERM)
    while home.agent in home.agents():
        time.sleep(0.02)
    assert not home.lives
    assert world.meso("agent", "--stop").code == 0
    assert left_over(home.before) == []


@pytest.mark.one_world
def test_an_agent_that_ends_says_so_and_nothing_of_its_own_socket(another_world: Any) -> None:
    child = another_world.start("agent", "--idle-exit", "1s")

    _, err = child.communicate(timeout=60)

    assert [line.partition(" ")[2].partition(" ")[0] for line in err.splitlines()] == ["agent", "idle"], err
    assert child.returncode == 0
