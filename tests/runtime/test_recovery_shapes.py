"""Nested containers and their recovery on the simulated host, in the shapes of other systems' tests (tests/README.md)."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import ConflictError, MesoError
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.testing.simulation import Simulation

FOREVER = ["ignore", "TERM"]
TREE = {
    "name": "web",
    "tasks": [
        {"name": "a", "command": FOREVER, "tasks": [{"name": "b", "command": FOREVER, "essential": False}], "essential": False},
        {"name": "c", "command": FOREVER},
    ],
}
ALL = ("web", "web.a", "web.a.b", "web.c")


def states(agent: Agent) -> dict[str, str]:
    return {line["id"]: line["state"] for line in agent.get_containers(include_dead=True)}


def lose(simulation: Simulation, *ids: str) -> None:
    """The records of these, and of groups that have no others; what was made for them stays written down."""
    with contextlib.closing(sqlite3.connect(simulation.ledger)) as db:
        db.executemany("DELETE FROM containers WHERE id = ?", [(found,) for found in ids])
        db.execute("DELETE FROM groups WHERE id NOT IN (SELECT grp FROM containers)")
        db.commit()


@pytest.mark.parametrize(
    "lost",
    [ALL, ("web.a.b",), ("web.a", "web.a.b"), ("web.a", "web.a.b", "web.c"), ("web.a",), ("web",)],
    ids=["all", "a nested one", "two levels", "all nested ones", "one in between", "the root"],
)
async def test_orphans_of_the_launcher_go_on_and_end_and_leave_nothing(
    simulation: Simulation, autojump_clock: MockClock, lost: tuple[str, ...]
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
    lose(simulation, *lost)

    async with simulation.agent() as agent:
        assert states(agent) == dict.fromkeys(ALL, "RUNNING")
        await agent.kill_container("web")
        with trio.fail_after(1000):
            for found in ALL:
                assert (await agent.wait_container(found))["signal"] == 9
        await agent.remove_container("web")
        await trio.sleep(10)
        assert simulation.leftovers == []
        assert await simulation.launcher.inventory() == []


async def test_a_known_one_with_known_and_unknown_nested_ones_keeps_all_of_them(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        await agent.launch_nested_group("web.a", [{"name": "x", "command": FOREVER}])
    lose(simulation, "web.a.x")

    async with simulation.agent() as agent:
        assert states(agent) == dict.fromkeys((*ALL, "web.a.x"), "RUNNING")
        await agent.kill_container("web.a.x")
        assert (await agent.wait_container("web.a.x"))["reason"] == "killed"
        assert states(agent) == {**dict.fromkeys(ALL, "RUNNING"), "web.a.x": "DEAD"}


async def test_an_orphan_that_ended_while_no_agent_was_there_is_told_with_its_status_and_its_group_follows(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    """The launcher's notes know its group, which ends as if its record had not been lost; nobody else does."""
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        await agent.launch_container({"container_id": "other", "command": FOREVER})
    lose(simulation, *ALL)
    with contextlib.closing(sqlite3.connect(simulation.ledger)) as db:
        db.execute("UPDATE containers SET spec = x'c1' WHERE id = 'other'")  # so that it shows that something has been lost
        db.commit()
    simulation.launcher.crash("web.c", 3 << 8)

    async with simulation.agent() as agent:
        assert (await agent.wait_container("web.c"))["exit"] == 3
        assert (await agent.wait_container("web"))["group"]["exit"] == 3
        assert states(agent) == {**dict.fromkeys(ALL, "DEAD"), "other": "RUNNING"}


async def test_a_nested_container_ends_alone(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        await agent.kill_container("web.a.b")
        assert (await agent.wait_container("web.a.b"))["reason"] == "killed"
        assert states(agent) == {**dict.fromkeys(ALL, "RUNNING"), "web.a.b": "DEAD"}


async def test_a_parent_that_is_killed_takes_its_children_along_first(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        await agent.kill_container("web.a")
        waits = [await agent.wait_container(found) for found in ("web.a.b", "web.a")]
        assert {wait["reason"] for wait in waits} == {"killed"}
        assert states(agent)["web.c"] == "RUNNING"


@pytest.mark.parametrize(("status", "how"), [(0, "its exit"), (15, "a SIGTERM of somebody else")])
async def test_a_parent_that_ends_takes_its_children_along(
    simulation: Simulation, autojump_clock: MockClock, status: int, how: str
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        simulation.launcher.crash("web.a", status)
        assert (await agent.wait_container("web.a.b"))["reason"] == "parent"
        wait = await agent.wait_container("web.a")
        assert (wait["exit"], wait["signal"]) == ((0, None) if not status else (None, 15)), how


async def test_the_end_can_be_waited_for_after_it_and_after_the_parents(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        await agent.kill_container("web")
        for found in ALL:
            await agent.wait_container(found)
    async with simulation.agent() as agent:
        assert (await agent.wait_container("web.a.b"))["id"] == "web.a.b"
        with pytest.raises(MesoError, match="no container"):
            await agent.wait_container("web.a.never")


async def test_a_nested_container_is_removed_when_it_is_dead_and_not_before(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        with pytest.raises(ConflictError, match="RUNNING"):
            await agent.remove_container("web.a.b")
        await agent.kill_container("web.a.b")
        await agent.wait_container("web.a.b")
        await agent.remove_container("web.a.b")
        assert states(agent).keys() == {"web", "web.a", "web.c"}
        assert "dir/web.a.b" not in simulation.leftovers


async def test_a_nested_container_can_be_removed_after_its_parents_end(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(TREE)
        await agent.kill_container("web")
        await agent.wait_container("web")
        await agent.remove_container("web.a.b")
        assert states(agent) == dict.fromkeys(("web", "web.a", "web.c"), "DEAD")
        await agent.remove_container("web")
        assert (simulation.leftovers, states(agent)) == ([], {})
