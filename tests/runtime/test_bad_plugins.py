"""Plug-ins that raise, hang, lie or talk nonsense, in every hook and in every effect: the launch is refused with an error that
names the plug-in and the hook or step, nothing is left, others do not notice, and the next launch is served."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.contracts import (
    ContainerSpec,
    Descriptor,
    Effect,
    EffectContext,
    Fact,
    Grant,
    Plan,
    Step,
    Undo,
    Watch,
)  # fmt: skip
from mesocosm.kernel.core.errors import MesoError, UnknownOutcomeError
from mesocosm.kernel.core.states import State
from mesocosm.kernel.hookspecs import hookimpl
from mesocosm.kernel.runtime import effects, patience
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.testing.simulation import Simulation

TASKS = [{"name": "a", "command": ["sleep", "9999"], "labels": {"bad": "yes"}}, {"name": "b", "command": ["sleep", "9999"]}]
BAD = {"name": "web", "tasks": TASKS}
GOOD = {"name": "web", "tasks": [{"name": "a", "command": ["exit", "0"]}]}
NAME = "extra0"  # of the plug-in under test, in the simulated set


def raises(error: BaseException) -> Any:
    raise error


def refers_to_itself() -> Any:
    found: list[Any] = []
    found.append(found)
    return found


def sleeps() -> Any:
    time.sleep(3600)


def spins() -> Any:
    while True:
        try:
            while True:
                pass
        except Exception:
            continue


class BadIsolator:
    """Plans badly for containers with the label `bad`."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    @hookimpl
    def plan(self, container: ContainerSpec) -> Any:
        return self._answer() if "bad" in container.labels else None


THING = [Effect("thing", {"path": "x/web.a"}, (Undo("rmdir", "x/web.a"),))]
ANSWERS: dict[str, Callable[[], Any]] = {
    "raises": lambda: raises(ValueError("no idea")),
    "runs out of memory": lambda: raises(MemoryError()),
    "runs out of stack": lambda: raises(RecursionError("too deep")),
    "leaves": lambda: sys.exit(3),
    "asserts": lambda: raises(AssertionError),
    "sleeps": sleeps,
    "spins": spins,
    "answers text": lambda: "a plan",
    "answers a list of plans": lambda: [Plan()],
    "answers a class": lambda: Plan,
    "effects are a number": lambda: Plan(effects=5),  # type: ignore[arg-type]
    "effects are None": lambda: Plan(effects=[None]),  # type: ignore[list-item]
    "an effect of no kind": lambda: Plan([Effect("no such kind")]),
    "an effect whose kind is a list": lambda: Plan([Effect([])]),  # type: ignore[arg-type]
    "an effect without arguments": lambda: Plan([Effect("thing")]),
    "an effect whose arguments are None": lambda: Plan([Effect("thing", None)]),  # type: ignore[arg-type]
    "an undo of no kind": lambda: Plan([Effect("thing", {"path": "x/web.a"}, (Undo("explode", "x/web.a"),))]),
    "an undo that is text": lambda: Plan([Effect("thing", {"path": "x/web.a"}, "rmdir")]),  # type: ignore[arg-type]
    "an undo of nothing": lambda: Plan([Effect("thing", {"path": "x/web.a"}, (Undo("rmdir", None),))]),  # type: ignore[arg-type]
    "undoes are a number": lambda: Plan([Effect("thing", {"path": "x/web.a"}, 7)]),  # type: ignore[arg-type]
    "a step of no kind": lambda: Plan(setup=[Step("magic")]),
    "a step that is text": lambda: Plan(setup=["mount"]),  # type: ignore[list-item]
    "a step whose arguments are no map": lambda: Plan(setup=[Step("tmpfs", 5)]),  # type: ignore[arg-type]
    "a step that refers to nothing": lambda: Plan(setup=[Step("tmpfs", {"fd": Fact(77, "fd")})]),
    "a step that refers to an unknown fact": lambda: Plan(THING, [Step("bind", {"fd": Fact(0, "no")})]),
    "a step that refers to an unknown grant": lambda: Plan(setup=[Step("tmpfs", {"uid": Grant("the moon")})]),
    "an effect that refers to nothing": lambda: Plan([Effect("thing", {"path": Fact(9, "x")})]),
    "a value that is no data": lambda: Plan(setup=[Step("tmpfs", {"target": object()})]),
    "a value that is a function": lambda: Plan([Effect("thing", {"path": "x/web.a", "call": print})]),
    "a value that refers to itself": lambda: Plan(setup=[Step("tmpfs", {"target": refers_to_itself()})]),
    "a number that is too long": lambda: Plan(setup=[Step("tmpfs", {"size": 2**200})]),
    "text that is no text": lambda: Plan(setup=[Step("tmpfs", {"target": "\ud800"})]),
    "a plan of 64 MiB": lambda: Plan(setup=[Step("tmpfs", {"target": "x" * 2**26})]),
    "a million steps": lambda: Plan(setup=[Step("tmpfs", {"target": "/x"})] * 10**6),
    "an environment that is a list": lambda: Plan(env=["PATH"]),  # type: ignore[arg-type]
    "a watch that is text": lambda: Plan(watches=["oom"]),  # type: ignore[list-item]
    "a watch without a name": lambda: Plan(watches=[Watch(None, {"x": object()})]),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real agent waits for is too long for a test; a plan of 64 MiB takes a third of a second."""
    monkeypatch.setattr(patience, "HOOK_SECONDS", 1.0)
    monkeypatch.setattr(effects, "QUICK_SECONDS", 0.5)


async def refused(simulation: Simulation, agent: Agent, aftermath: Any, document: Any = BAD) -> MesoError:
    """The error of a launch that others do not notice, and that leaves nothing in the way of the next."""
    await agent.launch_group({"name": "other", "tasks": [{"name": "a", "command": ["sleep", "99999"]}]})
    after = aftermath(simulation, agent, stray="bad/web.a")
    with pytest.raises(MesoError) as caught:
        await agent.launch_group(document)
    assert await after.of("web", ("web",)) in (None, State.ROLLED_BACK)
    assert "web.a" not in simulation.launcher.started
    await agent.launch_group(GOOD)
    assert (await agent.wait_container("web"))["group"]["exit"] == 0
    return caught.value


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_a_planner_that_does_not_plan_refuses_its_own_launch_and_is_named(
    tmp_path: Path, aftermath: Any, autojump_clock: MockClock, answer: Callable[[], Any]
) -> None:
    simulation = Simulation(tmp_path, BadIsolator(answer))
    async with simulation.agent() as agent:
        error = await refused(simulation, agent, aftermath)

    assert error.fields["plugin"] == NAME, error
    assert error.fields["id"] == "web.a", error
    assert "step" in error.fields or any(word in error.message for word in ("plan", "step", "effect")), error
    assert len(str(error)) < 5000


async def test_who_may_be_slow_is_told_by_the_clock_of_the_machine(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The control: a planner that takes its time, and no more than it may, is waited for."""
    simulation = Simulation(tmp_path, BadIsolator(lambda: time.sleep(0.3)))
    async with simulation.agent() as agent:
        assert (await agent.launch_group(BAD))["state"] == "RUNNING"


class BadKind:
    """An effect kind, quick or (with a deadline) slow."""

    def __init__(self, do: Callable[..., Any], deadline: float | None = None) -> None:
        self.name = "bad"
        self._do = do
        if deadline is not None:
            self.deadline = deadline

    def do(self, args: Any, context: EffectContext) -> Any:
        return self._do()

    def find(self, prefix: str) -> list[str]:
        return []


class Maker(BadIsolator):
    """Plans an effect of a bad kind, between two good ones."""

    def __init__(self, kind: BadKind) -> None:
        made = [Effect("thing", {"path": f"{name}/web.a"}, (Undo("unlink", f"{name}/web.a"),)) for name in ("first", "last")]
        super().__init__(lambda: Plan([made[0], Effect("bad", {}, (Undo("unlink", "bad/web.a"),)), made[1]]))
        self._kind = kind

    @hookimpl
    def effect_kinds(self) -> list[Any]:
        return [self._kind]


async def hangs() -> Any:
    await trio.sleep_forever()


async def hangs_shielded() -> Any:
    with trio.CancelScope(shield=True):
        await trio.sleep(100)
    return {}


async def swallows_its_cancellation() -> Any:
    for _ in range(50):
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
    return {"fd": None}


async def answers(value: Any) -> Any:
    return value


async def fails(error: BaseException) -> Any:
    raise error


QUICK: dict[str, Callable[[], Any]] = {
    "raises": lambda: raises(ValueError("no idea")),
    "leaves": lambda: sys.exit(3),
    "sleeps": sleeps,
    "spins": spins,
    "answers None": lambda: None,
    "answers text": lambda: "made",
    "answers a coroutine": lambda: iter(()),
}
SLOW: dict[str, Callable[[], Any]] = {
    "raises at once": lambda: raises(ValueError("no idea")),
    "raises": lambda: fails(ValueError("no idea")),
    "raises a group": lambda: fails(ExceptionGroup("two", [ValueError("1"), OSError(5, "2")])),
    "leaves": lambda: fails(SystemExit(3)),
    "answers None": lambda: answers(None),
    "answers text": lambda: answers("made"),
    "is not to be awaited": dict,
    "hangs": hangs,
    "hangs shielded": hangs_shielded,
    "swallows its cancellation": swallows_its_cancellation,
}


@pytest.mark.parametrize(
    "kind",
    [*(BadKind(do) for do in QUICK.values()), *(BadKind(do, 10.0) for do in SLOW.values())],
    ids=[*(f"quick: {name}" for name in QUICK), *(f"slow: {name}" for name in SLOW)],
)
async def test_an_effect_that_is_none_rolls_back_its_own_launch_and_is_named(
    tmp_path: Path, aftermath: Any, autojump_clock: MockClock, kind: BadKind
) -> None:
    simulation = Simulation(tmp_path, Maker(kind))
    async with simulation.agent() as agent:
        error = await refused(simulation, agent, aftermath)

    assert error.fields["plugin"] == NAME
    assert error.fields["id"] == "web.a"
    assert (error.fields["step"]["stage"], error.fields["step"]["kind"]) == ("effect", "bad")
    undone = [path for what, path in simulation.machine.history if what == "undo"]
    assert undone.index("bad/web.a") < undone.index("first/web.a")


@pytest.mark.parametrize("fact", [Descriptor(987654), Descriptor(-1), None, object()], ids=["closed", "negative", "None", "object"])
async def test_facts_that_are_none_hold_up_nobody(
    tmp_path: Path, aftermath: Any, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, fact: Any
) -> None:
    simulation = Simulation(tmp_path, Maker(BadKind(lambda: {"fd": fact})))
    close = simulation.machine.close
    monkeypatch.setattr(
        simulation.machine, "close", lambda fd: close(fd) if fd in simulation.machine.open else raises(OSError(9, "EBADF"))
    )
    async with simulation.agent() as agent:
        after = aftermath(simulation, agent, stray="bad/web.a")
        await agent.launch_group(BAD)
        assert await after.of("web", ("web",)) is State.RUNNING


@pytest.mark.parametrize("do", [hangs, hangs_shielded, swallows_its_cancellation])
async def test_a_kill_wins_over_an_effect_that_hangs(
    tmp_path: Path, aftermath: Any, autojump_clock: MockClock, do: Callable[[], Any]
) -> None:
    simulation = Simulation(tmp_path, Maker(BadKind(do, 10_000.0)))
    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        after = aftermath(simulation, agent, stray="bad/web.a")
        errors: list[MesoError] = []

        async def launch() -> None:
            try:
                await agent.launch_group(BAD)
            except MesoError as error:
                errors.append(error)

        nursery.start_soon(launch)
        await trio.sleep(1)
        began = trio.current_time()
        for victim in ("web.b", "web", "web.a"):
            await agent.kill_container(victim)
        await agent.wait_container("web")

        assert trio.current_time() - began < 3
        assert errors[0].message == "killed during the launch"
        if do is not hangs:
            with pytest.raises(MesoError, match=f"the plug-in {NAME} is still busy"):
                await agent.launch_group(GOOD)
        assert await after.of("web", ("web",)) is State.ROLLED_BACK
        assert (await agent.launch_group(GOOD))["state"] == "RUNNING"


async def test_what_a_stray_effect_makes_after_all_is_undone(tmp_path: Path, aftermath: Any, autojump_clock: MockClock) -> None:
    async def late() -> Any:
        with trio.CancelScope(shield=True):
            await trio.sleep(100)
        simulation.machine.make("bad", "bad/web.a")
        return {"fd": Descriptor(simulation.machine.descriptor())}

    simulation = Simulation(tmp_path, Maker(BadKind(late, 10.0)))
    async with simulation.agent() as agent:
        with pytest.raises(UnknownOutcomeError):
            await agent.launch_group(BAD)
        assert "bad/web.a" not in simulation.leftovers
        await trio.sleep(50)
        assert agent.world.strays == {"web.a": [NAME]}
        await trio.sleep(100)
        assert ("do", "bad/web.a") in simulation.machine.history
        assert simulation.leftovers == []
        assert simulation.machine.open == set()
        assert agent.world.strays == {}
