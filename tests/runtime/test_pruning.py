"""Dead groups do not pile up: the oldest are forgotten, living ones and the newest dead ones never."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from mesocosm.kernel.runtime import logs, removal
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


async def test_a_former_output_that_cannot_be_listed_is_in_nobodys_way_and_goes_later(
    tmp_path: Path, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(tmp_path)
    async with simulation.agent() as agent:
        await agent.launch_group(single("dead"))
        await agent.kill_container("dead")
        await agent.wait_container("dead")

        with monkeypatch.context() as failing:
            failing.setattr(logs.os, "listdir", partial(fail, os.listdir))
            await removal.prune(agent.world, kept=0)

        assert "dead" not in agent.world.cells
        assert [(row.container, row.note) for row in agent.world.ledger.parked()] == [
            ("dead", f"remove_tree {simulation.host.run_dir}/former: EMFILE")
        ]
        await trio.sleep(10)
        assert agent.world.ledger.parked() == []


def fail(listdir: Callable[[str], list[str]], path: str) -> list[str]:
    """Of one directory."""
    if path.endswith("/former"):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
    return listdir(path)
