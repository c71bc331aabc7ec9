"""Dead groups do not pile up: the oldest are forgotten, living ones and the newest dead ones never."""

from __future__ import annotations

from pathlib import Path

from mesocosm.kernel.runtime import removal
from mesocosm.kernel.testing.simulation import Simulation


def single(name: str) -> dict[str, object]:
    return {"name": name, "executor": "command", "tasks": [{"name": "t", "command": ["true"]}]}


async def test_only_the_newest_dead_groups_are_kept_and_the_living_stay(tmp_path: Path, autojump_clock: object) -> None:
    simulation = Simulation(tmp_path)
    async with simulation.agent() as agent:
        await agent.launch_group(single("alive"))
        for number in range(6):
            await agent.launch_group(single(f"dead{number}"))
            await agent.kill_container(f"dead{number}")
            await agent.wait_container(f"dead{number}")

        await removal.prune(agent.world, kept=2)

        assert [line["id"] for line in agent.get_containers(include_dead=True)] == ["alive", "dead4", "dead5"]
