"""A large group is many small turns: whoever else has something to do does it in between."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.testing.simulation import Simulation

MEMBERS = 60
MOST = 20  # members of which something is made or undone in one turn


def large(**last: Any) -> dict[str, Any]:
    tasks = [{"name": f"t{number}", "command": ["sleep", "1000"]} for number in range(MEMBERS)]
    return {"name": "web", "tasks": [*tasks[:-1], tasks[-1] | last]}


class Bystander:
    """Takes every turn that it gets, and sees what has been done since the last one."""

    def __init__(self, simulation: Simulation) -> None:
        self._history = simulation.machine.history
        self.most = 0

    async def watch(self) -> None:
        seen = len(self._history)
        while True:
            await trio.lowlevel.checkpoint()
            now = len(self._history)
            members = {path.split("/")[1] for _, path in self._history[seen:now] if "/" in path}
            self.most, seen = max(self.most, len(members)), now


async def test_others_have_their_turn_while_a_large_group_is_made_ended_and_removed(simulation: Simulation) -> None:
    bystander = Bystander(simulation)
    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        nursery.start_soon(bystander.watch)
        await agent.launch_group(large())
        await agent.kill_container("web", "KILL")
        await agent.wait_container("web")
        await agent.remove_container("web")
        nursery.cancel_scope.cancel()
    assert simulation.leftovers == []
    assert 0 < bystander.most <= MOST


async def test_others_have_their_turn_while_a_large_group_is_rolled_back(simulation: Simulation) -> None:
    bystander = Bystander(simulation)
    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        nursery.start_soon(bystander.watch)
        with pytest.raises(LaunchError):
            await agent.launch_group(large(command=["missing"]))
        nursery.cancel_scope.cancel()
    assert simulation.leftovers == []
    assert 0 < bystander.most <= MOST
