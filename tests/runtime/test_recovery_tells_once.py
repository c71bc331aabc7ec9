"""What an agent that died had told is not told again by the next one, and what it had decided is not forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.testing.simulation import Simulation

PAIR = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "1000"]}, {"name": "b", "command": ["sleep", "1000"]}]}


def told(agent: Agent, container_id: str) -> list[str]:
    """The types of all lines about a container's end."""
    agent.world.ledger.flush()
    _, lines = agent.world.journal.read(0, container_id)
    return [line["type"] for line in lines if line["id"] == container_id and line["type"] in ("exited", "dead")]


async def test_an_exit_that_was_told_and_not_yet_recorded_is_not_told_again(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["sleep", "5"]})
        simulation.machine.busy = dict.fromkeys(simulation.machine.things, 10)
        simulation.launcher.crash("x", 3 << 8)
        while told(agent, "x") != ["exited"]:
            await trio.lowlevel.checkpoint()
    async with simulation.agent() as agent:
        assert (await agent.wait_container("x"))["exit"] == 3
        assert told(agent, "x") == ["exited", "dead"]


async def test_what_was_removed_is_not_found_again_because_the_launcher_remembers_it(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "web", "tasks": [{"name": "a", "command": ["exit", "0"]}]})
        await agent.wait_container("web")
        await agent.remove_container("web")
        assert simulation.launcher.acknowledged == []
    async with simulation.agent() as agent:
        assert agent.get_containers(include_dead=True) == []
        await trio.sleep(1)
        assert sorted(simulation.launcher.acknowledged) == ["web", "web.a"]
        assert told(agent, "web.a") == ["exited", "dead"]


@pytest.mark.parametrize("recorded", [True, False])
async def test_who_was_ended_because_another_failed_is_said_to_have_been(
    simulation: Simulation, autojump_clock: MockClock, *, recorded: bool
) -> None:
    waits: dict[str, Any] = {}
    async with simulation.agent() as agent:
        await agent.launch_group(PAIR)
        if recorded:
            simulation.machine.busy = {path: 50 for path in simulation.machine.things if "web.a" in path}
            simulation.launcher.crash("web.b", 5 << 8)
            await agent.wait_container("web.b")
    if not recorded:
        simulation.launcher.crash("web.b", 5 << 8)
        await trio.sleep(1)
        simulation.launcher.crash("web.a", 9)
        await trio.sleep(1)
        simulation.launcher.crash("web", 9)
    async with simulation.agent() as agent:
        waits = {each: await agent.wait_container(each) for each in ("web", "web.a", "web.b")}
        assert {each: wait["reason"] for each, wait in waits.items()} == {"web": "group", "web.a": "group", "web.b": "exited"}
        assert waits["web"]["group"]["exit"] == 5


async def test_who_died_before_another_failed_died_of_something_else(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(PAIR)
    simulation.launcher.crash("web.a", 9)
    await trio.sleep(1)
    simulation.launcher.crash("web.b", 5 << 8)
    async with simulation.agent() as agent:
        assert (await agent.wait_container("web.a"))["reason"] == "signaled"
        assert (await agent.wait_container("web"))["group"]["exit"] == 137


async def test_all_that_a_kill_was_about_were_killed_whoever_saw_them_end(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(PAIR)
        await agent.kill_container("web")
    while simulation.launcher.living:  # whoever has not died of it yet
        simulation.launcher.crash(simulation.launcher.living[-1], 9)
    async with simulation.agent() as agent:
        reasons = {each: (await agent.wait_container(each))["reason"] for each in ("web", "web.a", "web.b")}
        assert set(reasons.values()) == {"killed"}
