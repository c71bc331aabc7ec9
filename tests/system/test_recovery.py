"""What an agent finds that its predecessor has left, in the shapes of other systems' tests of recovery (tests/README.md)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.client import Client, connect
from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

FOREVER = {"command": ["sleep", "1000"], "kill": {"signal": "KILL"}}


def task(name: str, *nested: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, **FOREVER, **({"tasks": list(nested)} if nested else {})}


def of(world: Any, name: str) -> dict[str, dict[str, Any]]:
    return {found: line for found, line in world.ps().items() if found.partition(".")[0] == name}


def pids(world: Any, name: str) -> dict[str, int]:
    return {found: line["pid"] for found, line in of(world, name).items()}


def to_the_ledger(world: Any, *statements: str) -> None:
    """While no agent has it."""
    with contextlib.closing(sqlite3.connect(world.run_dir / "ledger.db")) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()
    for path in world.run_dir.glob("ledger.db*"):
        os.chown(path, world.uid, world.gid)


def forget(world: Any, *ids: str) -> None:
    """The records of these, with those of groups that have no others."""
    names = ", ".join(f"'{found}'" for found in ids)
    to_the_ledger(
        world,
        f"DELETE FROM containers WHERE id IN ({names})",
        "DELETE FROM groups WHERE id NOT IN (SELECT grp FROM containers)",
    )


@contextlib.contextmanager
def client_of(world: Any) -> Iterator[Client]:
    """A connection as the world's user."""
    mine = os.geteuid()
    os.seteuid(world.uid)
    try:
        connected = connect(world.run_dir / "agent.sock", timeout=60)
    finally:
        os.seteuid(mine)
    with connected as client:
        yield client


def test_nested_containers_go_on_and_have_the_same_parents_afterwards(canary: Any) -> None:
    world = canary.world
    before = canary.census(agent=False)
    assert world.run({"name": "pod", "tasks": [task("a", task("b")), task("c")]}, "-d").code == 0
    with client_of(world) as client:
        client.launch_nested_group("pod.a.b", [task("d")])
    had = pids(world, "pod")

    world.end_agent(signal.SIGKILL)

    assert pids(world, "pod") == had
    assert {found: line["parent"] for found, line in of(world, "pod").items()} == {
        "pod": None, "pod.a": "pod", "pod.a.b": "pod.a", "pod.a.b.d": "pod.a.b", "pod.c": "pod",
    }  # fmt: skip
    with client_of(world) as client:
        client.launch_nested_group("pod.a.b.d", [task("e")])
    assert world.meso("kill", "pod").code == 0
    world.meso("wait", "pod")
    assert {line["state"] for line in of(world, "pod").values()} == {"DEAD"}
    assert world.meso("rm", "pod").code == 0
    assert left_over(dataclasses.replace(before, ignore=before.ignore | {world.agent_pid()})) == []
    canary.assert_untouched()


# The others of these shapes are tried on the simulated host: tests/runtime/test_recovery_shapes.py.
SHAPES = {"all of it": ("pod", "pod.a", "pod.a.b", "pod.c"), "a nested one": ("pod.a.b",)}


@pytest.mark.parametrize("lost", SHAPES.values(), ids=SHAPES.keys())
def test_what_the_launcher_has_and_the_ledger_does_not_goes_on_is_shown_and_can_be_ended(
    canary: Any, lost: tuple[str, ...]
) -> None:
    """Their entries are still there, so nothing of them is left in the end."""
    world = canary.world
    before = canary.census(agent=False)
    assert world.run({"name": "pod", "tasks": [task("a", task("b")), task("c")]}, "-d").code == 0
    had = pids(world, "pod")

    world.end_agent(signal.SIGKILL)
    forget(world, *lost)

    assert pids(world, "pod") == had
    assert {line["state"] for line in of(world, "pod").values()} == {"RUNNING"}
    assert world.meso("kill", "-s", "KILL", "pod").code == 0
    assert world.meso("wait", "pod").code in (0, 137)
    for found in sorted(of(world, "pod"), reverse=True):
        world.meso("wait", found)
    assert {line["wait"]["signal"] for line in of(world, "pod").values()} == {9}
    assert world.meso("rm", "pod").code == 0
    assert not [path for path in (world.run_dir / "containers").iterdir() if path.name.startswith("pod")]
    assert left_over(dataclasses.replace(before, ignore=before.ignore | {world.agent_pid()})) == []
    canary.assert_untouched()


def test_stopping_without_an_agent_ends_what_an_earlier_one_has_left(another_world: Any) -> None:
    """As an agent that is told to clean up when it starts."""
    assert another_world.run({"name": "pod", "tasks": [task("a", task("b"))]}, "-d").code == 0
    running = [os.pidfd_open(pid) for pid in pids(another_world, "pod").values()]

    another_world.end_agent(signal.SIGKILL)
    assert another_world.meso("agent", "--stop").code == 0

    for process in running:
        assert select.select([process], [], [], 60)[0]
        os.close(process)
    assert not (another_world.run_dir / "launcher.sock").exists()


def open_files(world: Any, earlier: int) -> int:
    """How many the agent has, once they are no more than that or are not about to be closed; -1 where one may not look."""
    place = f"/proc/{world.agent_pid()}/fd"
    if not os.access(place, os.R_OK):
        return -1
    deadline = time.monotonic() + 3
    while (count := len(os.listdir(place))) > earlier and time.monotonic() < deadline:
        time.sleep(0.05)
    return count


def test_restarting_the_agent_again_and_again_is_seen_by_nobody(
    canary: Any, rounds: Callable[[int, int], int], figure: Callable[..., None]
) -> None:
    """Steady pods: never not ready, never started twice, no event missing or twice, no descriptor more."""
    world, times = canary.world, rounds(4, 100)
    assert world.run({"name": "steady", "tasks": [task("a", task("b")), task("c")]}, "-d").code == 0
    assert world.meso("run", "-d", "--name", "alone", "--", "sleep", "1000").code == 0
    names = {"steady", "alone"}
    had = {found: line for found, line in world.ps().items() if found.partition(".")[0] in names}
    told: list[dict[str, Any]] = []
    hear(world, told)
    files = []

    for number in range(times):
        world.end_agent(signal.SIGTERM if number % 4 == 3 else signal.SIGKILL)
        now = {found: line for found, line in world.ps().items() if found.partition(".")[0] in names}
        assert now == had
        hear(world, told)
        files.append(open_files(world, min(files, default=0)))

    assert [line["seq"] for line in told] == list(range(told[0]["seq"], told[0]["seq"] + len(told)))
    started = Counter(line["id"] for line in told if line["type"] == "started")
    assert {found: started[found] for found in had} == dict.fromkeys(had, 1)
    assert max(files) <= min(files) + 2
    canary.assert_untouched()
    for name in names:
        assert world.meso("kill", "-s", "KILL", name).code == 0
        world.meso("wait", name)
        assert world.meso("rm", name).code == 0
    figure(restarts=times, events=len(told), files=files[-1])


def hear(world: Any, told: list[dict[str, Any]]) -> None:
    """All lines since the last one that is known, until there is none for a while."""
    with client_of(world) as client:
        stream = client.events(told[-1]["seq"] if told else 0)
        try:
            while True:
                told.append(stream.next(timeout=0.3))
        except TimeoutError:
            return


@pytest.mark.needs_root
def test_somebody_elses_control_group_outlives_agents_killed_on_their_way_to_it(
    canary: Any, rounds: Callable[[int, int], int]
) -> None:
    """Wherever the agent is killed: who lives in a group that a launch wants lives on after the next agent's recovery."""
    world = canary.world
    document = {"name": "ghost", "executor": "command", "tasks": [{"name": "ghost", "command": "true"}]}
    effects = json.loads(world.meso("plan", "--json", "-", given=json.dumps(document)).out)["containers"][0]["effects"]
    meets = [number for number, effect in enumerate(effects) if effect["kind"].startswith("cgroup")]
    wanted = [effects[number]["args"]["path"] for number in meets]
    child = subprocess.Popen(["sleep", "1000"])
    try:
        for path in wanted:
            os.mkdir(path)
            Path(path, "cgroup.procs").write_text(str(child.pid))
        # Between the intent (moment 1) and the effect that meets it.
        for moment in range(rounds(meets[0] + 2, 2), meets[0] + 3):
            assert world.launch_by_one_who_dies(document, moment).code != 0
            assert world.ps()["ghost"]["state"] == "DEAD"
            assert child.poll() is None
            assert {Path(path, "cgroup.procs").read_text() for path in wanted} == {f"{child.pid}\n"}
            assert world.meso("rm", "ghost").code == 0
        assert world.run(document).error["code"] == "conflict"
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()
        for path in wanted:
            until_removed(path)
    assert world.launch_by_one_who_dies(document, len(effects) + 1).code != 0  # the control: groups of its own go
    assert world.ps()["ghost"]["state"] == "DEAD"
    assert [path for path in wanted if os.path.exists(path)] == []
    assert world.meso("rm", "ghost").code == 0
    canary.assert_untouched()


def until_removed(group: str) -> None:
    """Its last process may be on its way out."""
    deadline = time.monotonic() + 60
    while os.path.exists(group):
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):
            os.rmdir(group)
        time.sleep(0.01)
