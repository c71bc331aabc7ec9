"""Launchers that die, one after the other, with and without agents: who knows whom, how ends are learnt, when nothing can start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import LaunchError, MesoError
from mesocosm.kernel.launcher.contract import Orphan
from mesocosm.kernel.runtime import succession
from mesocosm.kernel.testing.simulation import Simulation

LONG = 100.0  # seconds: more than a barrier has to open, and than it takes until an upgrade is tried again


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


def lose_releases(launcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what opens a barrier does not arrive."""

    async def lose(barrier: str, *, wait: bool = True) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(launcher, "release", lose)


async def test_who_was_decided_to_run_and_lost_its_launcher_before_the_barrier_opened_did_not_exit_by_itself(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        await agent.launch_container(one("other", "sleep", "9999"))
        lose_releases(launcher, monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.launch_container, one("late", "exit", "0"))
            await trio.sleep(0.01)
            launcher.die()
        wait = await agent.wait_container("late")
        assert (wait["exit"], wait["reason"]) == (126, "group")
        assert "none of it ran" in wait["message"]
        assert "late" not in launcher.started
        assert [line["id"] for line in agent.get_containers()] == ["other"]


async def test_the_same_is_said_of_each_member_and_of_nobody_that_it_was_killed(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [{"name": name, "command": ["exit", "0"]} for name in ("a", "b")]
    async with simulation.agent() as agent:
        await agent.launch_container(one("other", "sleep", "9999"))
        lose_releases(simulation.launcher, monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.launch_group, {"name": "pod", "tasks": tasks})
            await trio.sleep(0.01)
            simulation.launcher.die()
        waits = [await agent.wait_container(found) for found in ("pod", "pod.a", "pod.b")]
    assert [wait["reason"] for wait in waits] == ["group"] * 3
    assert ["none of it ran" in wait["message"] for wait in waits] == [True] * 3


async def test_the_same_is_said_if_the_agent_died_with_its_launcher(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        await agent.launch_container(one("exits", "exit", "126"))
        await agent.launch_container(one("ran", "ignore"))
        await trio.sleep(1)
        with monkeypatch.context() as lost:
            lose_releases(launcher, lost)
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


async def test_who_is_running_when_its_launcher_is_upgraded_is_not_ended_because_nobody_told_that_it_had_started(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        await trio.sleep(59)
        monkeypatch.setattr(launcher, "_tell", lambda _notice: None)
        await agent.launch_container(one("a", "sleep", "9999"))
        monkeypatch.undo()
        launcher.outdated = True
        await trio.sleep(LONG)
        assert not launcher.outdated
        assert {line["id"]: line["state"] for line in agent.get_containers()} == {"a": "RUNNING"}


@pytest.mark.parametrize("asked", ["renew", "inventory"])
async def test_a_launcher_that_never_answers_refuses_launches_and_holds_up_nobody_who_ends(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    launcher = simulation.launcher
    async with simulation.agent() as agent:
        await agent.launch_container(one("a", "sleep", "9999"))
        monkeypatch.setattr(launcher, asked, _never if asked == "inventory" else _too_slow)
        launcher.die()
        await trio.sleep(0.01)
        for name in "bc":
            with trio.fail_after(LONG), pytest.raises(MesoError, match="did not answer within 10 s"):
                await agent.launch_container(one(name, "exit", "0"))
        monkeypatch.undo()
        await agent.launch_container(one("b", "exit", "0"))
        assert (await agent.wait_container("b"))["exit"] == 0

        monkeypatch.setattr(launcher, "stop", _never)
        with trio.fail_after(LONG):
            await agent.stop_agent()
        assert launcher.living == []


async def _never() -> Any:
    await trio.sleep_forever()


async def _too_slow() -> None:
    await trio.sleep(10)
    raise LaunchError("the launcher did not answer within 10 s")


@pytest.mark.parametrize("fails_at", ["upgrade", "inventory"])
async def test_an_upgrade_that_fails_is_the_death_of_a_launcher_like_any_other(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    launcher = simulation.launcher
    real, asked = getattr(launcher, fails_at), 0

    async def fails() -> Any:
        nonlocal asked
        asked += 1
        if asked > 1:
            return await real()
        if fails_at == "upgrade":  # it dies, and whoever asked for the upgrade wants no notice of that
            told, launcher.send = launcher.send, trio.open_memory_channel[Any](1)[0]
            launcher.die()
            launcher.send = told
        raise LaunchError("the new program did not come up")

    async with simulation.agent() as agent:
        for name in "ab":
            await agent.launch_container(one(name, "sleep", "9999"))
        monkeypatch.setattr(launcher, fails_at, fails)
        launcher.outdated = True
        await trio.sleep(61)
        assert asked == 2, "it is tried again at once"
        assert launcher.alive
        assert {line.container_id for line in await launcher.inventory()} == {"a", "b"}
        launcher.crash("a", 7 << 8)
        assert (await agent.wait_container("a"))["exit"] == 7
        await agent.launch_container(one("c", "exit", "0"))
        assert (await agent.wait_container("c"))["exit"] == 0
        await trio.sleep(LONG)
        assert not launcher.outdated
        assert [line["id"] for line in agent.get_containers()] == ["b"]


async def test_one_that_ends_while_others_are_handed_over_is_not_handed_over_by_a_descriptor_that_is_closed(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "_AT_ONCE", 1)
    launcher, open_, told = simulation.launcher, simulation.machine.open, []
    adopt = launcher.adopt

    async def slowly(orphans: Sequence[Orphan]) -> None:
        assert {orphan.pidfd for orphan in orphans} <= open_
        told.extend(orphan.container_id for orphan in orphans)
        launcher.crash("c")
        await trio.sleep(1)
        monkeypatch.setattr(launcher, "adopt", adopt)
        await adopt(orphans)

    async with simulation.agent() as agent:
        for name in "abc":
            await agent.launch_container(one(name, "sleep", "9999"))
        monkeypatch.setattr(launcher, "adopt", slowly)
        launcher.die()
        assert (await agent.wait_container("c"))["signal"] == 9
        await trio.sleep(10)
        assert told == ["a"]
        assert {line.container_id for line in await launcher.inventory()} == {"a", "b"}
        assert not agent.world.launcher_gone
