"""Launchers that die, one after the other, with and without agents: who knows whom, how ends are learnt, when nothing can start."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.testing.simulation import Simulation


def one(name: str, *command: str) -> dict[str, Any]:
    return {"container_id": name, "command": list(command)}


async def test_ends_under_every_launcher_are_told_once_and_right(simulation: Simulation, autojump_clock: MockClock) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        await agent.launch_container(one("a", "sleep", "5"))
        launcher.die()
        await trio.sleep(0.01)
        await agent.launch_container(one("b", "ignore"))
        launcher.die()
        await trio.sleep(0.01)
        await trio.sleep(1)
        launcher.crash("b", 3 << 8)
        assert ((await agent.wait_container("a"))["exit"], (await agent.wait_container("b"))["exit"]) == (0, 3)
        lines = [line async for line in _until_quiet(agent)]
    assert [line["id"] for line in lines if line["type"] == "dead"] == ["b", "a"]
    assert launcher.deaths == 2


async def _until_quiet(agent: Any) -> Any:
    with trio.move_on_after(5):
        async for line in agent.events(0):
            yield line


async def test_a_launcher_that_cannot_start_refuses_launches_and_what_runs_is_still_heard_of(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        for name in "ab":
            await agent.launch_container(one(name, "sleep", "9999"))
        launcher.broken = True
        launcher.die()
        await trio.sleep(0.01)
        for _ in range(2):
            with pytest.raises(MesoError, match="could not start: it is broken"):
                await agent.launch_container(one("c", "exit", "0"))
        launcher.crash("a", 7 << 8)
        assert (await agent.wait_container("a"))["exit"] == 7
        await agent.kill_container("b")
        assert (await agent.wait_container("b"))["reason"] == "killed"
        assert [line["id"] for line in agent.get_containers()] == []

        launcher.broken = False
        await agent.launch_container(one("c", "exit", "0"))
        assert (await agent.wait_container("c"))["exit"] == 0


async def test_who_was_decided_to_run_and_lost_its_launcher_before_the_barrier_opened_did_not_exit_by_itself(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = simulation.launcher

    async def lose(barrier: str, *, wait: bool = True) -> None:
        await trio.lowlevel.checkpoint()

    async with simulation.agent() as agent:
        await agent.launch_container(one("other", "sleep", "9999"))
        monkeypatch.setattr(launcher, "release", lose)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.launch_container, one("late", "exit", "0"))
            await trio.sleep(0.01)
            launcher.die()
        wait = await agent.wait_container("late")
        assert (wait["exit"], wait["reason"]) == (126, "group")
        assert "none of it ran" in wait["message"]
        assert "late" not in launcher.started
        assert [line["id"] for line in agent.get_containers()] == ["other"]


async def test_the_same_is_said_if_the_agent_died_with_its_launcher(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = simulation.launcher

    async def lose(barrier: str, *, wait: bool = True) -> None:
        await trio.lowlevel.checkpoint()

    async with simulation.agent() as agent:
        await agent.launch_container(one("exits", "exit", "126"))
        await agent.launch_container(one("ran", "ignore"))
        await trio.sleep(1)
        with monkeypatch.context() as lost:
            lost.setattr(launcher, "release", lose)
            await agent.launch_container(one("late", "exit", "0"))
        launcher.die()
    launcher.crash("ran", 126 << 8)
    async with simulation.agent() as agent:
        told = {name: await agent.wait_container(name) for name in ("exits", "ran", "late")}
    assert {name: (wait["exit"], wait["reason"]) for name, wait in told.items()} == {
        "exits": (126, "exited"), "ran": (126, "exited"), "late": (126, "group"),
    }  # fmt: skip
    assert "none of it ran" in told["late"]["message"]
    assert "late" not in launcher.started


async def test_an_agent_that_is_told_to_stop_ends_the_launcher_that_is_just_being_started(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    launcher = simulation.launcher
    launcher.starts_in = 1.0
    async with simulation.agent() as agent:
        await agent.launch_container(one("a", "sleep", "9999"))
        launcher.die()
        await trio.sleep(0.01)
        await agent.stop_agent()
        await trio.sleep(5)
        assert not launcher.alive


@pytest.mark.parametrize("keeper", ["lives", "was killed"])
async def test_ends_that_no_agent_and_no_launcher_saw_are_known_if_a_keeper_saw_them(
    simulation: Simulation, autojump_clock: MockClock, keeper: str
) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        for name in "ab":
            await agent.launch_container(one(name, "ignore"))
    launcher.die()
    launcher.keeper = keeper == "lives"
    launcher.crash("a", 4 << 8)
    async with simulation.agent() as agent:
        wait = await agent.wait_container("a")
        assert (wait["exit"], wait["reason"]) == ((4, "exited") if launcher.keeper else (None, "unknown"))
        assert launcher.keeper or wait["message"]
        assert [line["id"] for line in agent.get_containers()] == ["b"]
        assert [line.container_id for line in await launcher.inventory()] == ["b"]
        simulation.machine.open = {cell.pidfd for cell in agent.world.cells.values() if cell.pidfd is not None}
        await agent.launch_nested_group("b", [{"name": "x", "command": ["exit", "5"]}])
        assert (await agent.wait_container("b.x"))["exit"] == 5
        await agent.kill_container("b")
        assert (await agent.wait_container("b"))["reason"] == "killed"


async def test_one_that_dies_again_and_again_is_started_again_by_launches_alone(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        await agent.launch_container(one("a", "ignore"))
        for _ in range(3):
            launcher.die()
            await trio.sleep(0.1)
        assert not launcher.alive
        assert launcher.deaths == 3
        await agent.launch_container(one("b", "exit", "0"))
        assert (await agent.wait_container("b"))["exit"] == 0
        assert {line.container_id for line in await launcher.inventory()} >= {"a"}
