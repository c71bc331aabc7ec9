"""No state lasts for ever, and what cannot end or be undone is in nobody's way: each state of the tables, each way out of it."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core import states
from mesocosm.kernel.core.errors import ConflictError, DeadlineError, LaunchError
from mesocosm.kernel.core.states import CONTAINER, DEADLINES, ENDED, GROUP, UNCLAIMED, UNTIMED, State
from mesocosm.kernel.launcher import protocol
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.launch import Launch
from mesocosm.kernel.testing.simulation import Simulation

POD = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "1000"]}, {"name": "b", "command": ["sleep", "1000"]}]}


def test_every_state_has_a_deadline_or_a_reason_for_none() -> None:
    assert {*CONTAINER, *GROUP} == {*DEADLINES, *UNTIMED}
    assert not {*DEADLINES} & {*UNTIMED}
    for state, (seconds, event) in DEADLINES.items():
        assert seconds > 0
        assert any(event in table.get(state, {}) for table in (CONTAINER, GROUP)), "a deadline's event is one that its state knows"


@pytest.mark.parametrize("table", [CONTAINER, GROUP], ids=["container", "group"])
def test_from_every_state_the_end_can_be_reached_by_kills_and_ends_alone(table: Any) -> None:
    ways = ("kill", "failed", "exited", "undone", "all_dead")
    for start in table:
        reached, todo = {start}, [start]
        while todo:
            for event, after in table[todo.pop()].items():
                if event in ways and after not in reached:
                    reached.add(after)
                    todo.append(after)
        assert reached & ENDED, start


def test_the_launcher_waits_for_an_agent_as_long_as_the_table_says() -> None:
    assert protocol.UNCLAIMED == UNCLAIMED


async def held_in(state: State, agent: Agent, simulation: Simulation) -> Launch:
    """A launch that stays in a state before its decision, as if whatever comes next in it never came."""
    launch, _ = await agent._admit_group(POD, "web")
    if state is State.PREPARING:
        simulation.launcher.hanging.add("web.b")
        assert agent.world.nursery is not None
        agent.world.nursery.start_soon(agent._launch_quietly, launch)
        await trio.sleep(0.1)
    elif state is not State.PLANNED:
        transaction = launch.transaction
        transaction.next()
        launch._intend()
        transaction.state = state
        if state is State.STAGED:
            for event in ("prepare", "staged"):
                for member in launch.group.members:
                    agent.world.tree.tell(member, event)
    assert launch.transaction.state is state
    return launch


BEFORE = [State.PLANNED, State.ADMITTED, State.PREPARING, State.STAGED]


@pytest.mark.parametrize("state", BEFORE)
async def test_a_launch_that_stays_in_a_state_is_given_up_at_its_deadline(
    simulation: Simulation, autojump_clock: MockClock, state: State
) -> None:
    async with simulation.agent() as agent:
        launch = await held_in(state, agent, simulation)
        if state in (State.ADMITTED, State.STAGED):
            launch.transaction._outstanding.clear()
        began = trio.current_time()
        await launch.finished.wait()
        took = trio.current_time() - began
        assert DEADLINES[state][0] <= took <= DEADLINES[state][0] + 3
        assert launch.group.state is State.ROLLED_BACK
        assert isinstance(launch.error, DeadlineError)
        assert f"the group was {state}" in launch.error.message
        await trio.sleep(1)
        assert simulation.leftovers == []
        assert simulation.launcher.living == []
        assert {line["state"] for line in agent.get_containers(include_dead=True)} == {"DEAD"}
        simulation.launcher.hanging.clear()
        await agent.launch_group(POD)


@pytest.mark.parametrize("event", ["kill", "failed"])
async def test_a_launch_that_prepares_for_long_leaves_at_once_by_each_way_out(
    simulation: Simulation, autojump_clock: MockClock, event: str
) -> None:
    assert event in GROUP[State.PREPARING]
    async with simulation.agent() as agent:
        launch = await held_in(State.PREPARING, agent, simulation)
        began = trio.current_time()
        if event == "kill":
            await agent.kill_container("web")
        else:
            launch.member_ended("web.a", LaunchError("it fell over", id="web.a"))
        await launch.finished.wait()
        assert trio.current_time() - began < 1
        assert launch.group.state is State.ROLLED_BACK
        await trio.sleep(1)
        assert simulation.leftovers == []


@pytest.mark.parametrize("event", sorted(CONTAINER[State.STOPPING]))
async def test_a_container_that_is_stopping_leaves_by_each_way_out(
    simulation: Simulation, autojump_clock: MockClock, event: str
) -> None:
    task = {"name": "a", "command": ["ignore", "TERM"], "kill": {"grace": "100s"}}
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "web", "tasks": [task]})
        await agent.kill_container("web")
        await trio.sleep(1)
        assert agent.explain("web.a")["state"] == "STOPPING"
        began, least = trio.current_time(), 0.0
        if event == "exited":
            simulation.launcher.crash("web.a")
        elif event == "kill":
            await agent.kill_container("web.a", grace_ms=0)
        else:
            await agent.kill_container("web.a")
            least = 98.0
        await agent.wait_container("web")
        assert least <= trio.current_time() - began <= least + 3, "a second stop never makes it slower"


@pytest.mark.parametrize("event", sorted(CONTAINER[State.DESTROYING]))
async def test_a_container_that_cannot_be_killed_is_shown_and_leaves_by_each_way_out(
    simulation: Simulation, autojump_clock: MockClock, event: str
) -> None:
    simulation.launcher.stuck["web.a"] = 0
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
        await agent.launch_group({"name": "other", "tasks": [{"name": "a", "command": ["sleep", "1000"]}]})
        await agent.kill_container("web")
        await trio.sleep(30)
        lines = {line["id"]: line for line in agent.get_containers(include_dead=True)}
        assert (lines["web.a"]["state"], lines["web.b"]["state"]) == ("DESTROYING", "DEAD")
        (note,) = lines["web.a"]["parked"]
        assert "unkillable in fuse (D)" in note
        assert agent.explain("web.a")["parked"] == [note]
        assert "parked" not in lines["web"]
        told = [line for line in agent.world.journal.read(0)[1] if line["type"] == "parked"]
        assert [(line["id"], line["note"]) for line in told] == [("web.a", note)], "once, however often it is tried"
        if event == "kill":
            await agent.kill_container("web.a")  # again, and never refused
        before = simulation.launcher.stuck["web.a"]
        await trio.sleep(200)
        assert simulation.launcher.stuck["web.a"] > before, "killed again and again"
        assert agent.explain("other.a")["state"] == "RUNNING"
        if event == "exited":
            simulation.launcher.crash("web.a")
        else:
            simulation.launcher.free("web.a")
        assert (await agent.wait_container("web"))["group"]["state"] == "DEAD"
        assert not [line for line in agent.get_containers(include_dead=True) if "parked" in line]
        assert not [path for path in simulation.leftovers if "web" in path and not path.startswith("dir/")]


async def test_an_agent_that_is_told_to_stop_answers_with_what_cannot_be_ended(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    simulation.launcher.stuck["web.a"] = 0
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
        await agent.launch_group({"name": "other", "tasks": [{"name": "a", "command": ["sleep", "1000"]}]})
        with pytest.raises(ConflictError, match=r"web\.a cannot be ended now: .*unkillable in fuse"):
            await agent.stop_agent()
        assert {line["id"] for line in agent.get_containers()} == {"web", "web.a"}
        simulation.launcher.free("web.a")
        await agent.stop_agent()
        assert agent.stopped.is_set()


async def test_a_stuck_container_is_found_again_by_the_next_agent(simulation: Simulation, autojump_clock: MockClock) -> None:
    simulation.launcher.stuck["web.a"] = 0
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
        await agent.kill_container("web")
        await trio.sleep(30)
    async with simulation.agent() as agent:
        await trio.sleep(30)
        (line,) = [line for line in agent.get_containers() if "parked" in line]
        assert line["id"] == "web.a"
        simulation.launcher.free("web.a")
        await agent.wait_container("web")


@pytest.mark.parametrize("target", ["cgroup/web.a", "dir/web.a"])
async def test_an_undo_that_does_not_answer_is_parked_beside_the_others_and_refreshed(
    simulation: Simulation, autojump_clock: MockClock, target: str
) -> None:
    answer = simulation.machine.silent[target] = trio.Event()
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "web", "tasks": [{"name": name, "command": ["exit", "0"]} for name in "ab"]})
        await agent.wait_container("web")
        await agent.remove_container("web")
        assert {path.removesuffix("/log") for path in simulation.leftovers if "web" in path} == {target}, "all else has gone"
        (line,) = agent.get_containers()
        assert (line["id"], line["state"]) == ("web.a", "DEAD")
        assert "ETIMEDOUT" in line["parked"][0]
        with pytest.raises(ConflictError, match="still there") as caught:
            await agent.launch_group(POD)
        assert "held by pid 1 (simulated)" in caught.value.fields["have"]
        told = agent.world.ledger.seq
        simulation.machine.holder = "pid 2 (another)"
        await trio.sleep(600)
        (line,) = agent.get_containers()
        assert "held by pid 2 (another)" in line["parked"][0], "who holds it now"
        assert agent.world.ledger.seq == told, "ten minutes of retries are no line in the log"
        await agent.launch_group({"name": "web", "tasks": [{"name": "c", "command": ["exit", "0"]}]})
        answer.set()
        await trio.sleep(70)
        assert target not in simulation.leftovers
        assert not [line for line in agent.get_containers(include_dead=True) if "parked" in line]


async def test_one_remainder_does_not_make_another_wait(simulation: Simulation, autojump_clock: MockClock) -> None:
    simulation.machine.broken.add("cgroup/old.a")
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "old", "tasks": [{"name": "a", "command": ["exit", "0"]}]})
        await trio.sleep(1000)
        simulation.machine.broken.add("cgroup/new.a")
        await agent.launch_group({"name": "new", "tasks": [{"name": "a", "command": ["exit", "0"]}]})
        await agent.wait_container("new")
        simulation.machine.broken.remove("cgroup/new.a")
        await trio.sleep(5)
        assert "cgroup/new.a" not in simulation.leftovers
        assert "cgroup/old.a" in simulation.leftovers


async def test_an_agent_serves_before_it_retries_what_another_left(simulation: Simulation, autojump_clock: MockClock) -> None:
    targets = [f"cgroup/web.t{number}" for number in range(20)]
    simulation.machine.silent.update({target: trio.Event() for target in targets})
    tasks = [{"name": f"t{number}", "command": ["exit", "0"]} for number in range(20)]
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "web", "tasks": tasks})
        await agent.wait_container("web")
    began = trio.current_time()
    async with simulation.agent() as agent:
        assert trio.current_time() - began < 1
        await agent.launch_group({"name": "late", "tasks": [{"name": "a", "command": ["exit", "0"]}]})
        assert trio.current_time() - began < 2
        assert len([line for line in agent.get_containers() if "parked" in line]) == len(targets)


def test_what_no_table_lists_is_no_way_out() -> None:
    for state in ENDED:
        for table in (CONTAINER, GROUP):
            assert not table.get(state, {})
    with pytest.raises(ConflictError):
        states.step(CONTAINER, State.DEAD, "kill", "x")
