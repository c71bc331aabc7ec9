"""Whoever asked goes away, time runs out, or somebody kills: at every step of every verb, one step after the other.

A step is what one task of the agent does between two points of waiting. Each test counts them: something happens after the
first, in the next run after the second, and so on until the verb is through before it could happen. Whenever it was, the
group is whole or nothing of it is left, the books agree, others have not noticed, and the id can be used again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import MesoError, from_object
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.testing.simulation import Simulation

SLOW = [{"slow": str(number)} for number in (1, 1, 2)]  # effects of outsiders, beside the quick ones; the last member is the last
TASKS = [
    {"name": "a", "command": ["sleep", "9999"], "labels": SLOW[1]},
    {"name": "b", "command": ["ignore", "TERM"], "labels": SLOW[2]},
]
POD = {"name": "web", "tasks": TASKS, "labels": SLOW[0]}
AGAIN = [{"name": "a", "command": ["exit", "0"]}]
MOST = 1000  # steps; a verb has some hundred
KILLED = 4.0  # seconds: a grace of three, and a little


class Ground:
    """A host of its own for one attempt: an agent, a pod that must not notice, one to nest in; and what is asked of the agent."""

    def __init__(self, simulation: Simulation, agent: Agent) -> None:
        self.simulation, self.agent = simulation, agent
        self.error: MesoError | None = None  # what a verb was answered

    async def neighbours(self) -> None:
        for name in ("other", "home"):
            await self.agent.launch_group({"name": name, "tasks": [{"name": "a", "command": ["sleep", "99999"]}]})

    async def first(self) -> None:
        """The launch that also makes what all share."""
        await self.agent.launch_group(POD)

    async def launch(self) -> None:
        await self.agent.launch_group(POD)

    async def replace(self) -> None:
        """A launch that has to make room first, which takes patience."""
        await self.agent.launch_group(POD)

    async def run(self) -> None:
        await self._follow(self.agent.run_group(POD))

    async def run_nested(self) -> None:
        await self._follow(self.agent.run_nested_group("home.a", TASKS))

    async def _follow(self, run: Any) -> None:
        async with aclosing(run) as lines:
            async for line in lines:
                if line["type"] == "end":
                    raise from_object(line["error"])
                if line["type"] == "started":
                    return

    async def nest(self) -> None:
        await self.agent.launch_nested_group("home.a", TASKS)

    async def before(self, verb: str) -> None:
        """What has to have happened before that is asked."""
        if verb != "first":
            await self.neighbours()
        if verb == "replace":
            await self.agent.launch_group({"name": "web", "tasks": AGAIN})
            await self.agent.wait_container("web")
            self.simulation.machine.busy.update({"dir/web": 3, "dir/web.a": 3})

    async def ask(self, verb: str) -> None:
        try:
            await getattr(self, verb)()
        except MesoError as error:
            self.error = error

    async def end(self, *roots: str) -> None:
        """Ends and forgets what runs or has run."""
        agent = self.agent
        for root in roots:
            if root in agent.world.cells:
                if not agent.world.cells[root].dead.is_set():
                    await agent.kill_container(root)
                await agent.wait_container(root)
                await agent.remove_container(root)

    async def serves_again(self, verb: str) -> None:
        """The same id has another life, whatever became of this one; then nothing is left of either."""
        roots = LAUNCHES[verb][1]
        await self.end(*roots)
        if "nest" in verb:
            await self.agent.launch_nested_group("home.a", AGAIN)
        else:
            await self.agent.launch_group({"name": "web", "tasks": AGAIN})
        answer = await self.agent.wait_container(roots[0])
        assert answer.get("group", answer)["exit"] == 0
        await self.end(*roots)
        assert [path for path in self.simulation.leftovers if "web" in path or "home.a." in path] == []


@pytest.fixture
def grounds(tmp_path: Path) -> Callable[[int, str], Any]:
    """``async with grounds(n, verb) as ground``: the n-th of them."""

    @asynccontextmanager
    async def made(number: int, verb: str) -> AsyncIterator[Ground]:
        (tmp_path / str(number)).mkdir()
        simulation = Simulation(tmp_path / str(number))
        async with simulation.agent() as agent:
            ground = Ground(simulation, agent)
            await ground.before(verb)
            yield ground

    return made


LAUNCHES = {
    "first": ("web", ("web",)),
    "launch": ("web", ("web",)),
    "replace": ("web", ("web",)),
    "run": ("web", ("web",)),
    "nest": ("home.a+1", ("home.a.a", "home.a.b")),
    "run_nested": ("home.a+1", ("home.a.a", "home.a.b")),
}
every_launch = pytest.mark.parametrize("verb", LAUNCHES)


@every_launch
async def test_a_client_that_leaves_at_any_step_leaves_a_whole_group_or_none(
    grounds: Any, at_step: Any, aftermath: Any, autojump_clock: MockClock, verb: str
) -> None:
    seen = []
    for number in range(1, MOST):
        async with grounds(number, verb) as ground:
            after = aftermath(ground.simulation, ground.agent)
            with trio.CancelScope() as client, at_step(number, client.cancel) as step:
                await ground.ask(verb)
            state = await after.of(*LAUNCHES[verb])
            # A launch is the agent's own from the moment it is admitted; before that there is nothing of it.
            assert ground.error is None
            assert state in ((None, State.RUNNING, State.DEAD) if step.struck else (State.RUNNING,)), number
            seen.append(state is State.RUNNING)
            await ground.serves_again(verb)
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
    assert seen == sorted(seen), "once admitted, always admitted"
    assert len(seen) > 5


# When it is decided that it starts, and it cannot, it has started and ends. What is in the way of a launch is a conflict.
ENDS = {
    (State.RUNNING, None),
    (State.ROLLED_BACK, "timeout"),
    (State.ROLLED_BACK, "unknown_outcome"),
    (State.DEAD, None),
    (None, "conflict"),
}


@every_launch
async def test_time_that_passes_at_any_step_leaves_a_whole_group_or_none(
    grounds: Any, at_step: Any, aftermath: Any, autojump_clock: MockClock, verb: str
) -> None:
    errors = set()
    for number in range(1, MOST):
        async with grounds(number, verb) as ground:
            after = aftermath(ground.simulation, ground.agent)
            with at_step(number, lambda: autojump_clock.jump(61)) as step:
                await ground.ask(verb)
            state = await after.of(*LAUNCHES[verb])
            told = ground.error.code if ground.error else None
            assert (state, told) in ENDS, number
            errors.add(told)
            await ground.serves_again(verb)
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
    assert errors > {None}


@every_launch
async def test_a_kill_at_any_step_wins_at_once(
    grounds: Any, at_step: Any, aftermath: Any, autojump_clock: MockClock, verb: str
) -> None:
    victim = "home" if "nest" in verb else "web"
    ends = set()
    for number in range(1, MOST):
        async with grounds(number, verb) as ground, trio.open_nursery() as nursery:
            after = aftermath(ground.simulation, ground.agent, doomed="home" if "nest" in verb else "")
            accepted: list[float] = []

            async def kill() -> None:
                try:
                    await ground.agent.kill_container(victim)
                except MesoError as error:
                    assert error.code in ("not_found", "conflict"), error  # noqa: PT017 - too early
                else:
                    accepted.append(trio.current_time())  # noqa: B023
                    with trio.fail_after(KILLED):
                        await ground.agent.wait_container(victim)

            with at_step(number, lambda: nursery.start_soon(kill)) as step:
                await ground.ask(verb)
            state = await after.of(*LAUNCHES[verb])
            assert state in ((None, State.ROLLED_BACK, State.DEAD) if accepted else (State.RUNNING,)), number
            if state is State.ROLLED_BACK or (state is None and accepted):
                assert ground.error is not None
            ends.add(state)
            if "nest" not in verb:
                await ground.serves_again(verb)
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
    assert {State.ROLLED_BACK, State.DEAD} <= ends


@every_launch
async def test_a_member_that_dies_at_any_step_takes_the_launch_along_or_ends_by_the_rules(
    grounds: Any, at_step: Any, aftermath: Any, autojump_clock: MockClock, verb: str
) -> None:
    member = "home.a.a" if "nest" in verb else "web.a"
    ends = set()
    for number in range(1, MOST):
        async with grounds(number, verb) as ground:
            after = aftermath(ground.simulation, ground.agent)

            def crash() -> None:
                if member in ground.simulation.launcher.living:
                    ground.simulation.launcher.crash(member)

            with at_step(number, crash) as step:
                await ground.ask(verb)
            state = await after.of(*LAUNCHES[verb])
            ends.add((state, ground.error.code if ground.error else None))
            await ground.serves_again(verb)
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
    assert ends == {(State.RUNNING, None), (State.ROLLED_BACK, "launch_failed"), (State.DEAD, None)}


@pytest.mark.parametrize("verb", ["kill", "wait", "remove"])
async def test_who_kills_waits_or_removes_may_leave_at_any_step(
    grounds: Any, at_step: Any, aftermath: Any, autojump_clock: MockClock, verb: str
) -> None:
    states = []
    for number in range(1, MOST):
        async with grounds(number, "launch") as ground:
            agent = ground.agent
            await agent.launch_group({**POD, "tasks": [{"name": "a", "command": ["sleep", "1"]}]} if verb != "kill" else POD)
            if verb == "remove":
                await agent.wait_container("web")
                ground.simulation.machine.busy.update({"dir/web": 3, "dir/web.a": 3})
            after = aftermath(ground.simulation, agent, doomed="web")
            with trio.CancelScope() as client, at_step(number, client.cancel) as step:
                await getattr(agent, f"{verb}_container")("web")
            state = await after.of("web", ("web",))
            states.append(state)
            await ground.serves_again("launch")
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
    if verb == "kill":
        assert set(states) <= {State.RUNNING, State.DEAD}
        assert states[-1] is State.DEAD
    else:
        assert set(states) == {State.DEAD} | ({None} if verb == "remove" else set())
        assert verb == "wait" or states[-1] is None


async def test_a_nested_launch_at_any_step_of_its_parents_end_is_refused_or_goes_with_it(
    grounds: Any, at_step: Any, aftermath: Any, autojump_clock: MockClock
) -> None:
    codes = set()
    for number in range(1, MOST):
        async with grounds(number, "nest") as ground, trio.open_nursery() as nursery:
            after = aftermath(ground.simulation, ground.agent, doomed="home")
            with at_step(number, lambda: nursery.start_soon(ground.ask, "nest")) as step:
                await ground.agent.kill_container("home")
                await ground.agent.wait_container("home")
            assert await after.of(*LAUNCHES["nest"]) in (None, State.ROLLED_BACK)
            codes.add(ground.error.code if ground.error else None)
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
    assert "dying" in codes <= {None, "dying", "launch_failed"}  # refused, or admitted already and given up
    assert "home.a.a" not in ground.simulation.launcher.started


@every_launch
async def test_a_launcher_that_dies_at_any_step_leaves_a_whole_group_or_none_and_the_next_one_knows_the_others(
    grounds: Any, at_step: Any, aftermath: Any, autojump_clock: MockClock, verb: str
) -> None:
    ends = set()
    for number in range(1, MOST):
        async with grounds(number, verb) as ground:
            launcher, agent = ground.simulation.launcher, ground.agent
            after = aftermath(ground.simulation, agent)
            with at_step(number, launcher.die) as step:
                await ground.ask(verb)
            state = await after.of(*LAUNCHES[verb])
            if state is not State.RUNNING:
                told = ground.error or from_object(agent.world.groups[LAUNCHES[verb][0]].error)
                assert "launcher" in told.message, number
            ends.add(state)
            if launcher.deaths:
                await ground.serves_again(verb)
                assert set(launcher.living) == {line["id"] for line in agent.get_containers()}
                assert {line.container_id for line in await launcher.inventory() if line.ended is None} == set(launcher.living)
                ground.simulation.machine.open.clear()
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
    # Who was decided to run and had not been let go is DEAD; whether that moment is met is up to the order in which tasks run.
    assert {State.RUNNING, State.ROLLED_BACK} <= ends <= {State.RUNNING, State.ROLLED_BACK, State.DEAD}


async def test_a_kill_whose_launcher_dies_at_any_step_kills_all_the_same(
    grounds: Any, at_step: Any, autojump_clock: MockClock
) -> None:
    for number in range(1, MOST):
        async with grounds(number, "launch") as ground:
            await ground.launch()
            with at_step(number, ground.simulation.launcher.die) as step:
                await ground.agent.kill_container("web")
                answer = await ground.agent.wait_container("web")
            assert (answer["reason"], answer["group"]["state"]) == ("killed", "DEAD")
            wait = await ground.agent.wait_container("web.b")
            assert (wait["reason"], wait["signal"]) == ("killed", 9)
            assert set(ground.simulation.launcher.living) == {"other", "other.a", "home", "home.a"}
        if not step.struck:
            break
    else:
        pytest.fail("it never came to an end")
