"""The soak's operations on a simulated host, by the thousand: agents die at any step, and the books are right when it is quiet."""

from __future__ import annotations

import importlib
import random
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.sets.loading import from_modules
from mesocosm.kernel.testing.simulated_plugins import SimulatedIsolator
from mesocosm.kernel.testing.simulation import Simulation
from mesocosm.plugins.executors import command, default

SOAK = Path(__file__).resolve().parents[1] / "soak"
LONG = 300.0  # seconds: longer than any deadline
COMMANDS = {
    "gate": ["ignore", "TERM"], "polite": ["sleep", "1e9"], "hungry": ["oom"], "absent": ["missing"], "broken": ["exec-fails"],
}  # fmt: skip


@pytest.fixture(name="model")
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """tests/soak/model.py, which is in no package."""
    monkeypatch.syspath_prepend(str(SOAK))
    yield importlib.import_module("model")
    sys.modules.pop("model", None)


class Killed(BaseException):
    """kill -9: whatever the agent would still do, it does not."""


class Nothing:
    """What an agent that was killed reaches of the machine."""

    def __getattr__(self, _: str) -> Any:
        raise Killed


class KilledLedger(Ledger):
    """Nothing more is written."""

    def __enter__(self) -> Any:
        raise Killed

    def flush(self) -> None:
        """Nor this."""
        raise Killed

    def close(self) -> None:
        """As the kernel does it."""
        self._db.close()


class Machine:
    """A simulated host and its agent, one after the other."""

    def __init__(self, simulation: Simulation, model: Any, nursery: trio.Nursery, told: Any) -> None:
        self.simulation, self.model, self.nursery, self.told = simulation, model, nursery, told
        self.agent: Agent
        self.scope: trio.CancelScope
        self.tasks: trio.Nursery
        self.over = trio.Event()
        self.lines: list[dict[str, Any]] = []
        self.deaths = 0

    async def start(self, batches: int | None = None) -> None:
        """An agent on the same ledger; None: one that serves. Else it is given so many turns of the loop."""
        simulation = self.simulation
        simulation.launcher.connect()
        simulation.machine.open.clear()
        plugins = from_modules({"simulated": SimulatedIsolator(simulation.machine)}, {"default": default, "command": command})
        self.agent = Agent(
            host=simulation.host, plugins=plugins, launcher=simulation.launcher, ledger=simulation.ledger,
            machine=simulation.machine, precheck=None, fault="",
        )  # fmt: skip
        serving, self.over = trio.Event(), trio.Event()
        self.nursery.start_soon(self._live, self.agent, serving, self.over)
        if batches is None:
            await serving.wait()
            return
        for _ in range(batches):
            await trio.lowlevel.checkpoint()
        await self.kill()

    async def _live(self, agent: Agent, serving: trio.Event, over: trio.Event) -> None:
        try:
            with trio.CancelScope() as self.scope:
                async with trio.open_nursery() as nursery:
                    self.tasks = nursery  # of its clients, too: they end with it
                    nursery.start_soon(self.simulation.launcher.run)
                    await nursery.start(agent.run)
                    serving.set()
        except BaseExceptionGroup as group:
            _, rest = group.split(Killed)
            if rest is not None:
                raise rest from None
        except Killed:
            pass
        finally:
            over.set()

    async def kill(self) -> None:
        """With -9: what it has not written is lost, and it touches nothing more."""
        world = self.agent.world
        world.machine = world.launcher = Nothing()  # type: ignore[assignment]
        world.ledger.pending.clear()
        world.ledger.__class__ = KilledLedger
        await self.end()

    async def end(self) -> None:
        """With SIGTERM."""
        self.deaths += 1
        self.scope.cancel()
        await self.over.wait()

    # -- operations ---------------------------------------------------------------------------------------------

    async def do(self, made: Any) -> str:
        """Carries an operation out; the code of its answer. AssertionError at a quiet point where something is wrong."""
        simulation, agent = self.simulation, self.agent
        match made.kind:
            case "launch" | "single":
                return await answer(agent.launch_group(self.document(made)))
            case "nested":
                return await answer(agent.launch_nested_group(made.target, [self.task(task) for task in made.tasks]))
            case "launch_and_die" | "launch_and_leave" | "launch_and_kill":
                self.tasks.start_soon(self._launch, agent, self.document(made))
                for _ in range(made.number):
                    await trio.lowlevel.checkpoint()
                if made.kind == "launch_and_kill":
                    return await answer(agent.kill_container(made.target))
                if made.kind == "launch_and_die":
                    await self.kill()
                    await self.start()
            case "end":
                if made.target in simulation.launcher.living:
                    simulation.launcher.crash(made.target, made.number << 8)
            case "kill":
                return await answer(agent.kill_container(made.target))
            case "signal":
                return await answer(agent.kill_container(made.target, made.signal))
            case "wait":
                return await answer(self._wait(made.target))
            case "remove":
                return await answer(agent.remove_container(made.target))
            case "agent_dies":
                await (self.end() if made.signal == "TERM" else self.kill())
                if made.number:
                    await self.start(batches=made.number // 8)
                await self.start()
            case "agent_stops":
                await trio.sleep(made.number / 1000)
            case "quiet":
                await self.look()
            case _:
                raise AssertionError(made)
        return "ok"

    def document(self, made: Any) -> dict[str, Any]:
        """Its pod."""
        executor = "command" if made.kind == "single" else "default"
        return {"name": made.target, "executor": executor, "tasks": [self.task(task) for task in made.tasks]}

    def task(self, task: Any) -> dict[str, Any]:
        """A task of it."""
        argv = ["exit", str(task.code)] if task.program == "brief" else COMMANDS[task.program]
        inner = {"tasks": [self.task(each) for each in task.tasks]} if task.tasks else {}
        signal = "TERM" if task.program == "polite" else "KILL"
        rules = {"essential": task.essential, "sidecar": task.sidecar, "kill": {"signal": signal}}
        return {"name": task.name, "command": argv, **rules, **inner}

    async def _launch(self, agent: Agent, document: dict[str, Any]) -> None:
        try:
            await answer(agent.launch_group(document))
        except (Killed, AssertionError, sqlite3.ProgrammingError):  # the agent is gone, and with it its nursery and its ledger
            return
        except BaseExceptionGroup as group:
            if group.split(Killed)[1] is not None:
                raise

    async def _wait(self, container_id: str) -> None:
        with trio.fail_after(LONG):
            wait = await self.agent.wait_container(container_id)
        assert list(self.model.wrong_wait(container_id, wait) if container_id in self.model.boxes else ()) == []

    # -- looking ------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """A quiet point: everything that has to end has ended; what then has to be."""
        await trio.sleep(LONG)
        agent, model, simulation = self.agent, self.model, self.simulation
        agent.world.ledger.flush()
        lines = {line["id"]: line for line in agent.get_containers(include_dead=True)}
        wrong = list(model.findings(lines))
        assert not wrong, "; ".join(wrong)
        for name in sorted(model.unsure & lines.keys()):
            if lines[name]["state"] == "RUNNING":
                await agent.kill_container(name)
                await self._wait(name)
            await agent.remove_container(name)
        unsure = set(model.unsure)
        model.done(module_operation(model)("quiet"))
        await trio.sleep(1)
        self._hear()
        for found, count in self.told.dead.items():
            if found.partition(".")[0] in unsure:
                model.deaths[found] = count
        assert self.told.wrong == []
        often, rarely = self.told.dead - model.deaths, model.deaths - self.told.dead
        assert (often, rarely) == (Counter(), Counter()), f"told dead too often: {often}, too rarely: {rarely}"
        living = {box.id for box in model.boxes.values() if box.lives}
        kept = {box.id for box in model.boxes.values() if ("rolled_back", None, None) not in box.endings}
        assert set(simulation.launcher._processes) == living, "the launcher has those who live, and no record that was acknowledged"
        things = Counter(tuple(path.split("/")[:2]) for path in simulation.leftovers)
        assert {name for kind, name in things if kind == "cgroup"} == living
        assert {name for kind, name in things if kind == "dir"} == kept
        bases = [agent.world.cells[found].base for found in living]
        ranges = [base for base in bases if base is not None]
        assert len(set(ranges)) == len(ranges)

    def _hear(self) -> None:
        journal, ledger = self.agent.world.journal, self.agent.world.ledger
        since = self.told.seq
        while since < ledger.seq:
            since, more = journal.read(since)
            for line in more:
                self.told.hear(line)
            self.lines += more


def module_operation(model: Any) -> Any:
    """The class of operations of a model's module."""
    return sys.modules[type(model).__module__].Operation


async def answer(call: Any) -> str:
    """The code of an answer."""
    try:
        await call
    except MesoError as error:
        return error.code
    return "ok"


async def play(simulation: Simulation, modules: Any, aftermath: Any, seed: int, operations: int) -> Machine:
    """So many operations of a seed, and a quiet point; what fails is told with the operations that led to it."""
    rng, done = random.Random(seed), []
    model = modules.Model({"limits", "broken"})
    simulation.host = msgspec.structs.replace(simulation.host, uid_ranges=1000)
    async with trio.open_nursery() as nursery:
        machine = Machine(simulation, model, nursery, modules.Told())
        await machine.start()
        try:
            for number in range(operations + 1):
                made = model.choose(rng) if number < operations else modules.Operation("quiet")
                done.append(str(made))
                said = await machine.do(made)
                assert said in made.answers, f"{made} was answered {said}"
                if made.kind == "quiet":
                    after = aftermath(simulation, machine.agent)
                    after._nobody_works_on_anything()
                    after._books_agree()
                else:
                    model.done(made)
        except AssertionError as error:
            error.add_note(f"seed {seed}, after {len(done)} operations: {'; '.join(done[-60:])}")
            raise
        finally:
            await machine.end()
    return machine


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(6))
async def test_whatever_is_done_and_whenever_the_agent_dies_the_books_are_right(
    simulation: Simulation, autojump_clock: MockClock, aftermath: Any, model: Any, seed: int,
    rounds: Callable[[int, int], int], figure: Callable[..., None],
) -> None:  # fmt: skip
    machine = await play(simulation, model, aftermath, seed, rounds(300, 20_000))

    assert machine.deaths > 10
    assert len(machine.lines) > 800
    figure(seed=seed, agents=machine.deaths, events=len(machine.lines), dead=sum(machine.told.dead.values()))


async def test_the_same_seed_makes_the_same_events(
    tmp_path: Path, autojump_clock: MockClock, aftermath: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trio runs the tasks of a turn in an order of its own choice, which is given the seed as well."""
    told = []
    for attempt in ("first", "second"):
        monkeypatch.setattr("trio._core._run._r", random.Random(7))
        (tmp_path / attempt).mkdir()
        machine = await play(Simulation(tmp_path / attempt), model, aftermath, 7, 150)
        told.append([{**line, "time": None, "ended": None} for line in machine.lines])

    assert told[0] == told[1]
    assert len(told[0]) > 100
