"""Executors, front-ends and host effects that raise, hang or talk nonsense: whoever asked for them is refused and told whose fault
it is; a group that runs goes on and ends all the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from mesocosm.kernel.contracts import ContainerSpec, Effect, GroupView, HostFacts, Kill, Pod, Translation, Undo
from mesocosm.kernel.core.containers import single_container
from mesocosm.kernel.core.errors import MesoError, SpecError
from mesocosm.kernel.core.states import State
from mesocosm.kernel.hookspecs import hookimpl
from mesocosm.kernel.runtime import patience
from mesocosm.kernel.testing import simulation as simulations
from mesocosm.kernel.testing.simulated_plugins import simulated_plugins
from mesocosm.kernel.testing.simulation import Simulation

GOOD = {"name": "web", "tasks": [{"name": "a", "command": ["exit", "0"]}]}
OTHER = {"name": "other", "tasks": [{"name": "a", "command": ["sleep", "99999"]}]}
BAD = {"name": "web", "executor": "bad", "tasks": [{"name": "a", "command": ["sleep", "5"]}]}
TWO = {**BAD, "tasks": [{"name": "a", "command": ["exit", "3"]}, {"name": "b", "command": ["sleep", "5"]}]}


def raises(error: BaseException) -> Any:
    raise error


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real agent waits for is too long for a test."""
    monkeypatch.setattr(patience, "HOOK_SECONDS", 0.3)


@pytest.fixture
def equipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Simulation]:
    """``equipped("executors", plugin)``: a simulated host whose set has one more plug-in, called `bad`."""

    def made(kind: str, plugin: Any) -> Simulation:
        def plugins(*given: Any) -> Any:
            found = simulated_plugins(*given)
            found.take(kind, "bad", plugin)
            return found

        monkeypatch.setattr(simulations, "simulated_plugins", plugins)
        return Simulation(tmp_path)

    return made


class BadExecutor:
    """Arranges and reacts as it is told."""

    name = "bad"

    def __init__(self, arrange: Callable[[Pod], Any] | None = None, react: Callable[[GroupView, str], Any] | None = None) -> None:
        self._arrange, self._react = arrange, react

    @hookimpl
    def executor(self) -> Any:
        return self

    def arrange(self, pod: Pod) -> Any:
        if self._arrange is not None:
            return self._arrange(pod)
        singles = [single_container(pod, task, f"$.tasks[{at}]") for at, task in enumerate(pod.tasks)]
        return [singles[0], *(replaced(each, id=f"{pod.name}.{at}") for at, each in enumerate(singles[1:]))]

    def react(self, group: GroupView, ended: str) -> Any:
        return [] if self._react is None else self._react(group, ended)


def replaced(spec: ContainerSpec, **fields: Any) -> ContainerSpec:
    import msgspec

    return msgspec.structs.replace(spec, **fields)


ARRANGEMENTS: dict[str, Callable[[Pod], Any]] = {
    "raises": lambda _: raises(ValueError("no idea")),
    "leaves": lambda _: sys.exit(3),
    "sleeps": lambda _: time.sleep(3600),
    "answers None": lambda _: None,
    "answers a number": lambda _: 5,
    "nothing": lambda _: [],
    "never ends": lambda _: iter(lambda: time.sleep(0), 1),
    "text": lambda pod: [pod.name],
    "of another's id": lambda _: [ContainerSpec(id="other", command=("exit", "0"))],
    "in another's group": lambda pod: [ContainerSpec(id=pod.name), ContainerSpec(id="other.b", command=("exit", "0"))],
    "with a child of nobody": lambda pod: [ContainerSpec(id=pod.name), ContainerSpec(id=f"{pod.name}.x.y", command=("exit", "0"))],
    "children first": lambda pod: [ContainerSpec(id=f"{pod.name}.x", command=("exit", "0")), ContainerSpec(id=pod.name)],
    "one twice": lambda pod: [ContainerSpec(id=pod.name), ContainerSpec(id=pod.name)],
    "of an id that is none": lambda pod: [ContainerSpec(id=pod.name), ContainerSpec(id=f"{pod.name}.../../etc")],
    "of an id that is a number": lambda _: [ContainerSpec(id=5)],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
async def test_an_executor_that_cannot_arrange_refuses_its_own_group_and_is_named(
    equipped: Any, aftermath: Any, autojump_clock: MockClock, arrange: Callable[[Pod], Any]
) -> None:
    simulation = equipped("executors", BadExecutor(arrange))
    async with simulation.agent() as agent:
        await agent.launch_group(OTHER)
        after = aftermath(simulation, agent)
        with pytest.raises(MesoError) as caught:
            await agent.launch_group(BAD)

        assert await after.of("web", ("web",)) is None
        assert caught.value.fields["plugin"] == "bad", caught.value
        assert isinstance(caught.value, SpecError) or "arrange()" in caught.value.message
        await agent.launch_group(GOOD)
        assert (await agent.wait_container("web"))["group"]["exit"] == 0


REACTIONS: dict[str, Callable[[GroupView, str], Any]] = {
    "raises": lambda *_: raises(ValueError("no idea")),
    "leaves": lambda *_: sys.exit(3),
    "sleeps": lambda *_: time.sleep(3600),
    "answers None": lambda *_: None,
    "answers a number": lambda *_: 5,
    "never ends": lambda *_: iter(lambda: time.sleep(0), 1),
    "text": lambda *_: ["web"],
    "None": lambda *_: [None],
    "raises on the way": lambda *_: (raises(ValueError("later")) for _ in range(2)),
    "a reason that is none": lambda *_: [Kill("web", object())],  # type: ignore[arg-type]
    "blames what is nobody": lambda *_: [Kill("web", "group", object())],  # type: ignore[arg-type]
    "kills a number": lambda *_: [Kill(5, "group")],  # type: ignore[arg-type]
}


@pytest.mark.parametrize("react", REACTIONS.values(), ids=REACTIONS)
async def test_an_executor_whose_opinion_is_nonsense_is_told_of_in_the_log_and_its_group_ends_all_the_same(
    equipped: Any, aftermath: Any, autojump_clock: MockClock, capsys: Any, react: Callable[[GroupView, str], Any]
) -> None:
    simulation = equipped("executors", BadExecutor(react=react))
    async with simulation.agent() as agent:
        await agent.launch_group(OTHER)
        after = aftermath(simulation, agent)
        await agent.launch_group(BAD)

        assert (await agent.wait_container("web"))["group"]["exit"] == 0
        assert await after.of("web", ("web",)) is State.DEAD
        assert "react() of the plug-in bad" in capsys.readouterr().err


async def test_a_kill_of_anothers_container_stands_for_the_group_that_was_asked_about(
    equipped: Any, aftermath: Any, autojump_clock: MockClock
) -> None:
    simulation = equipped("executors", BadExecutor(react=lambda *_: [Kill("other", "group"), Kill("nobody", "group")]))
    async with simulation.agent() as agent:
        await agent.launch_group(OTHER)
        after = aftermath(simulation, agent)
        await agent.launch_group(TWO)
        await agent.wait_container("web")

        assert await after.of("web", ("web",)) is State.DEAD  # and the other one goes on


class BadFrontEnd:
    """Translates documents that are marked, as it is told."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    @hookimpl
    def translate(self, document: Any) -> Any:
        return self._answer() if "mine" in document else None


TRANSLATIONS: dict[str, Callable[[], Any]] = {
    "raises": lambda: raises(ValueError("no idea")),
    "leaves": lambda: sys.exit(3),
    "sleeps": lambda: time.sleep(3600),
    "answers text": lambda: "a pod",
    "answers a pod": lambda: GOOD,
    "of None": lambda: Translation(None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("answer", TRANSLATIONS.values(), ids=TRANSLATIONS)
async def test_a_front_end_that_cannot_translate_refuses_its_own_documents_and_is_named(
    equipped: Any, aftermath: Any, autojump_clock: MockClock, answer: Callable[[], Any]
) -> None:
    simulation = equipped("frontends", BadFrontEnd(answer))
    async with simulation.agent() as agent:
        await agent.launch_group(OTHER)
        after = aftermath(simulation, agent)
        with pytest.raises(MesoError) as caught:
            await agent.launch_group({"mine": True})

        assert await after.of("web", ("web",)) is None
        assert caught.value.fields["plugin"] == "bad"
        assert "translate()" in caught.value.message
        assert agent.world.ledger.seq > 0
        await agent.launch_group(GOOD)
        assert (await agent.wait_container("web"))["group"]["exit"] == 0


async def test_a_translation_into_nonsense_is_bad_input(equipped: Any, autojump_clock: MockClock) -> None:
    simulation = equipped("frontends", BadFrontEnd(lambda: Translation({"name": "web", "tasks": [object()]})))
    async with simulation.agent() as agent:
        with pytest.raises(SpecError):
            await agent.launch_group({"mine": True})


class BadHost:
    """Wants of the host what it is told to want."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    @hookimpl
    def plan(self, container: ContainerSpec) -> None:
        """Nothing."""

    @hookimpl
    def host_effects(self, host: HostFacts) -> Any:
        return self.answer()


WANTS: dict[str, Callable[[], Any]] = {
    "raises": lambda: raises(ValueError("no idea")),
    "leaves": lambda: sys.exit(3),
    "sleeps": lambda: time.sleep(3600),
    "answers None": lambda: None,
    "text": lambda: ["mount"],
    "of no kind": lambda: [Effect("no such kind")],
    "that is undone in no way": lambda: [Effect("thing", {"path": "host/x"}, (Undo("explode", "host/x"),))],
    "that cannot be made": lambda: [Effect("thing", {"path": "host/refused"}, (Undo("rmdir", "host/refused"),))],
}


@pytest.mark.parametrize("answer", WANTS.values(), ids=WANTS)
async def test_a_plug_in_that_cannot_have_what_all_share_refuses_launches_and_stops_no_agent(
    equipped: Any, aftermath: Any, autojump_clock: MockClock, answer: Callable[[], Any]
) -> None:
    plugin = BadHost(answer)
    simulation = equipped("isolators", plugin)
    async with simulation.agent() as agent:
        after = aftermath(simulation, agent)
        for _ in range(2):
            with pytest.raises(MesoError) as caught:
                await agent.launch_group(GOOD)
            assert caught.value.fields["plugin"] == "bad", caught.value
            assert await after.of("web", ("web",)) is None

        if answer is not WANTS["that cannot be made"]:  # what it once said it wants is not asked again
            plugin.answer = list
            await agent.launch_group(GOOD)
            assert (await agent.wait_container("web"))["group"]["exit"] == 0
        await agent.retire()
        assert not [path for path in simulation.machine.things if path.startswith("host/")]
