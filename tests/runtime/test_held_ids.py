"""User ids of a container that is dead, while one of its processes may not be: nobody else gets them."""

from __future__ import annotations

from typing import Any

import trio
from trio.testing import MockClock

from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.testing.simulation import Simulation

LONG = 3600.0  # seconds: whatever is parked has been tried again by then


def bases(agent: Agent) -> dict[str, Any]:
    return {cell.id: cell.base for cell in agent.world.cells.values() if cell.base is not None}


async def launch(agent: Agent, name: str) -> None:
    await agent.launch_container({"container_id": name, "command": ["sleep", "99999"]})


async def end(agent: Agent, name: str) -> None:
    await agent.kill_container(name)
    await agent.wait_container(name)
    await agent.world.cells[name].dead.wait()


async def test_ids_of_whoever_is_left_behind_are_given_to_nobody_until_he_has_gone(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await launch(agent, "a")
        await launch(agent, "whole")
        simulation.machine.broken.add("cgroup/a")
        await end(agent, "a")
        await end(agent, "whole")
        before = bases(agent)
        assert [row.container for row in agent.world.ledger.parked()] == ["a"]
        await launch(agent, "b")
        assert bases(agent)["b"] == before["whole"], "what nobody has is given again"
        assert before["whole"] != before["a"]
    async with simulation.agent() as agent:
        await launch(agent, "c")
        assert bases(agent)["c"] not in (before["a"], before["whole"]), "nor by the next agent"
        simulation.machine.broken.clear()
        await trio.sleep(LONG)
        assert agent.world.ledger.parked() == []
        await launch(agent, "d")
        assert bases(agent)["d"] == before["a"]
        assert agent.world.ids.held == set()


async def test_ids_that_somebody_nested_has_left_behind_are_those_of_the_container_around_him(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await launch(agent, "a")
        await agent.launch_nested_group("a", [{"name": "x", "command": ["sleep", "99999"]}])
        own = bases(agent)
        assert "a.x" not in own
        simulation.machine.broken.add("cgroup/a.x")
        await end(agent, "a.x")
        simulation.machine.broken.clear()
        simulation.machine.broken.add("cgroup/a.x")
        await end(agent, "a")
        await launch(agent, "b")
        assert bases(agent)["b"] != own["a"]
        simulation.machine.broken.clear()
        await trio.sleep(LONG)
        await launch(agent, "c")
        assert bases(agent)["c"] == own["a"]
