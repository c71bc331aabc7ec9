"""Several want something of the same group at once: kills that overtake a kill that is stuck, launches that meet."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import DyingError, MesoError
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime import admitting
from mesocosm.kernel.testing.simulation import Simulation

STUBBORN = {"name": "web", "tasks": [{"name": "a", "command": ["ignore", "TERM"], "kill": {"signal": "TERM", "grace": "1h"}}]}


async def test_ten_kills_at_once_none_of_which_helps_do_not_hold_up_the_eleventh(
    simulation: Simulation, aftermath: Any, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        after = aftermath(simulation, agent)
        await agent.launch_group(STUBBORN)
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(agent.kill_container, ("web", "web.a")[number % 2], (None, "TERM", "HUP")[number % 3])
        await trio.sleep(60)
        assert agent.world.tree.state("web.a") is State.STOPPING

        began = trio.current_time()
        await agent.kill_container("web.a", "KILL")
        await agent.wait_container("web")

        assert trio.current_time() - began < 1
        assert await after.of("web", ("web",)) is State.DEAD


@pytest.mark.parametrize("stronger", [{"grace_ms": 0}, {"grace_ms": 100}])
async def test_a_kill_with_less_patience_overtakes_one_with_more(
    simulation: Simulation, autojump_clock: MockClock, stronger: dict[str, int]
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(STUBBORN)
        await agent.kill_container("web")
        await trio.sleep(60)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for grace in (5000, stronger["grace_ms"], 3_600_000):
                nursery.start_soon(lambda grace=grace: agent.kill_container("web", grace_ms=grace))

        assert (await agent.wait_container("web.a"))["signal"] == 9
        assert trio.current_time() - began < 1


async def test_kills_during_a_roll_back_that_is_stuck_are_taken_and_nothing_is_undone_twice(
    simulation: Simulation, aftermath: Any, autojump_clock: MockClock
) -> None:
    simulation.machine.busy["cgroup/web.a"] = 10  # a tenth of a second
    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        after = aftermath(simulation, agent)
        errors: list[MesoError] = []

        async def launch() -> None:
            try:
                await agent.launch_group({**STUBBORN, "tasks": [*STUBBORN["tasks"], {"name": "b", "command": ["missing"]}]})
            except MesoError as error:
                errors.append(error)

        nursery.start_soon(launch)
        await trio.sleep(0.01)
        assert agent.explain("web")["group"]["state"] == "ROLLING_BACK"
        for _ in range(10):
            await agent.kill_container("web")

        assert await after.of("web", ("web",)) is State.ROLLED_BACK
        assert errors[0].fields["errno"] == "ENOENT"


@pytest.mark.parametrize("before", ["nothing", "one that is dead"])
async def test_of_two_launches_of_one_id_exactly_one_wins(
    simulation: Simulation, aftermath: Any, autojump_clock: MockClock, before: str
) -> None:
    async with simulation.agent() as agent:
        if before != "nothing":
            await agent.launch_group({"name": "web", "tasks": [{"name": "a", "command": ["exit", "0"]}]})
            await agent.wait_container("web")
            simulation.machine.busy["dir/web.a"] = 5
        after = aftermath(simulation, agent)
        answers: list[str] = []

        async def launch() -> None:
            try:
                answers.append((await agent.launch_group(STUBBORN))["state"])
            except MesoError as error:
                answers.append(error.code)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(launch)

        assert sorted(answers) == ["RUNNING", "conflict", "conflict"]
        assert await after.of("web", ("web",)) is State.RUNNING


async def test_two_nested_launches_that_meet_while_one_makes_room_are_two_groups(
    simulation: Simulation, aftermath: Any, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "home", "tasks": [{"name": "a", "command": ["sleep", "99999"]}]})
        await agent.launch_nested_group("home.a", [{"name": "x", "command": ["exit", "0"]}])
        await agent.wait_container("home.a.x")
        simulation.machine.busy["dir/home.a.x"] = 5  # removing it takes patience
        after = aftermath(simulation, agent, doomed="home.a.y")
        answers: list[str] = []

        async def nest(name: str) -> None:
            answer = await agent.launch_nested_group("home.a", [{"name": name, "command": ["sleep", "9999"]}])
            answers.append(answer["id"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(nest, "x")
            nursery.start_soon(nest, "y")

        assert len(set(answers)) == 2, answers
        groups = {name: agent.world.cells[f"home.a.{name}"].group.id for name in "xy"}
        await agent.kill_container("home.a.y", "KILL")
        await agent.wait_container("home.a.y")
        assert await after.of(groups["x"], ("home.a.x",)) is State.RUNNING


async def test_a_launch_that_waited_while_the_agent_ended_makes_nothing(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it waited to be let in, or for what all containers share."""
    async with simulation.agent() as agent:

        async def end(*_: Any) -> None:
            await agent.retire()

        monkeypatch.setattr(admitting, "make_room", end)
        with pytest.raises(DyingError):
            await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        with pytest.raises(DyingError):
            await agent._hosting.ensure()
        assert agent.get_containers(include_dead=True) == []
    assert simulation.machine.things == {}
