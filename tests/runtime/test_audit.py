"""An audit on a simulated host: what it makes of every difference between the ledger and the machine, and whom it asks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from mesocosm.kernel.contracts import ContainerSpec, Effect, EffectContext, HostFacts, Plan, Undo
from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.hookspecs import hookimpl
from mesocosm.kernel.linux import devices, procfs, served
from mesocosm.kernel.runtime import repair, sight_processes, sightings
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.audit import Finding
from mesocosm.kernel.runtime.claims import Claims
from mesocosm.kernel.runtime.sightings import Scene, Sighting
from mesocosm.kernel.runtime.undo import Attempt
from mesocosm.kernel.testing.simulation import Simulation


class Hoard:
    """An isolator with a kind of effects of its own: one hoard for each container below /nowhere, and one for all of them."""

    def __init__(self) -> None:
        self.things: dict[str, None] = {}
        self.trouble: Any = None
        self.asked: list[str] = []

    @hookimpl
    def effect_kinds(self) -> list[Any]:
        return [self]

    name = "hoard"

    def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        self.things[args["path"]] = None
        return {}

    def find(self, prefix: str) -> Iterator[str]:
        self.asked.append(prefix)
        if self.trouble is not None:
            yield from self.trouble()
        for path in list(self.things):
            if f"{path}/".startswith(f"{prefix}/"):
                yield path

    @hookimpl
    def host_effects(self, host: HostFacts) -> list[Effect]:
        return [Effect("hoard", {"path": "/hoards"}, (Undo("unlink", "/hoards"),))]

    @hookimpl
    def plan(self, container: ContainerSpec) -> Plan:
        path = f"/nowhere/hoards/{container.id}"
        return Plan([Effect("hoard", {"path": path}, (Undo("unlink", path),))])


@pytest.fixture
def hoard() -> Hoard:
    return Hoard()


@pytest.fixture
def simulation(tmp_path: Path, hoard: Hoard) -> Simulation:
    """A simulated host with hoards on it, whose undoing takes them away."""
    made = Simulation(tmp_path, hoard)
    undo = made.machine.undo

    def undoing(verb: str, target: str) -> Attempt:
        answer = undo(verb, target)
        if answer is Attempt.GONE:
            hoard.things.pop(target, None)
        return answer

    made.machine.undo = undoing  # type: ignore[method-assign]
    return made


def pod(name: str = "web", command: str = "sleep 100") -> dict[str, Any]:
    return {"name": name, "executor": "command", "tasks": [{"name": "one", "command": command.split()}]}


def targets(lines: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str | None]]:
    return [(line["kind"], line["target"], line["ledger"]) for line in lines]


async def audited(agent: Agent, *, repair: bool = False) -> dict[str, list[Any]]:
    answer = await agent.audit(repair)
    return {name: targets(answer[name]) for name in ("leftover", "missing", "strangers")}


CLEAN: dict[str, list[Any]] = {"leftover": [], "missing": [], "strangers": []}


async def test_of_the_living_the_dead_and_what_they_share_nothing_is_a_finding(simulation: Simulation) -> None:
    async with simulation.agent() as agent:
        assert await audited(agent) == CLEAN
        await agent.launch_group(pod("web"))
        await agent.launch_group(pod("dead", "exit 0"))
        await agent.wait_container("dead")

        assert await audited(agent) == CLEAN


async def test_what_a_living_container_was_given_and_is_not_there_is_missing(simulation: Simulation, hoard: Hoard) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        del hoard.things["/nowhere/hoards/web"]
        del simulation.machine.things["cgroup/web"]

        found = await audited(agent)

        assert sorted(found.pop("missing")) == [("hoard", "/nowhere/hoards/web", "web"), ("thing", "cgroup/web", "web")]
        assert found == {"leftover": [], "strangers": []}


async def test_what_is_kept_of_the_dead_and_is_not_there_is_missing_and_what_is_not_kept_is_not(simulation: Simulation) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("dead", "exit 0"))
        await agent.wait_container("dead")
        assert "cgroup/dead" not in simulation.machine.things
        del simulation.machine.things["dir/dead"]

        assert await audited(agent) == {**CLEAN, "missing": [("thing", "dir/dead", "dead")]}


async def test_what_all_containers_share_is_missing_when_it_is_gone(simulation: Simulation, hoard: Hoard) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        del hoard.things["/hoards"]

        assert await audited(agent) == {**CLEAN, "missing": [("hoard", "/hoards", "(shared)")]}


async def test_what_no_entry_of_the_ledger_names_is_a_stranger_and_no_repair_touches_it(
    simulation: Simulation, hoard: Hoard
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        hoard.things["/nowhere/hoards/alien"] = None
        before, history = dict(hoard.things), list(simulation.machine.history)

        expected = {**CLEAN, "strangers": [("hoard", "/nowhere/hoards/alien", None)]}
        assert await audited(agent) == expected
        assert await audited(agent, repair=True) == expected

        assert (hoard.things, simulation.machine.history) == (before, history)


async def test_what_a_dead_container_was_to_give_back_is_left_over_and_repaired(simulation: Simulation, hoard: Hoard) -> None:
    """Somebody has made it again; the plan of the dead one says how it is undone."""
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        await agent.launch_group(pod("dead", "exit 0"))
        await agent.wait_container("dead")
        hoard.things["/nowhere/hoards/dead"] = None
        assert await audited(agent) == {**CLEAN, "leftover": [("hoard", "/nowhere/hoards/dead", "dead")]}

        answer = await agent.audit(repair=True)

        assert targets(answer["repaired"]) == [("hoard", "/nowhere/hoards/dead", "dead")]
        assert targets(answer["leftover"]) == []
        assert sorted(hoard.things) == ["/hoards", "/nowhere/hoards/web"]
        assert await audited(agent) == CLEAN


async def test_what_is_parked_is_left_over_with_its_reason_until_it_can_be_undone(simulation: Simulation) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        simulation.machine.broken.add("/nowhere/hoards/web")
        await agent.kill_container("web")
        await agent.wait_container("web")

        answer = await agent.audit()
        assert targets(answer["leftover"]) == [("hoard", "/nowhere/hoards/web", "web")]
        assert "parked: unlink /nowhere/hoards/web: EBUSY, held by pid 1" in answer["leftover"][0]["note"]
        assert targets((await agent.audit(repair=True))["leftover"]) == [("hoard", "/nowhere/hoards/web", "web")]

        simulation.machine.broken.clear()
        assert await audited(agent, repair=True) == CLEAN
        assert agent.world.ledger.parked() == []


async def test_what_is_parked_of_a_container_that_was_forgotten_is_left_over(simulation: Simulation, hoard: Hoard) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        simulation.machine.broken.add("/nowhere/hoards/web")
        await agent.kill_container("web")
        await agent.wait_container("web")
        await agent.remove_container("web")

        assert await audited(agent) == {**CLEAN, "leftover": [("hoard", "/nowhere/hoards/web", "web")]}


async def test_a_launch_under_way_is_no_finding(tmp_path: Path, hoard: Hoard, autojump_clock: Any) -> None:
    simulation = Simulation(tmp_path, hoard, delay=5.0)
    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        nursery.start_soon(agent.launch_group, pod("web"))
        await trio.sleep(1)
        assert "/nowhere/hoards/web" in hoard.things  # the control: it is on its way

        assert await audited(agent, repair=True) == CLEAN

        await trio.sleep(10)
        assert [line["state"] for line in agent.get_containers()] == ["RUNNING"]


async def test_a_kind_whose_find_raises_is_named_and_the_rest_goes_on(simulation: Simulation, hoard: Hoard) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        del simulation.machine.things["cgroup/web"]

        def burst() -> Iterator[str]:
            raise RuntimeError("the outsider does not answer")
            yield ""

        hoard.trouble = burst
        hoard.things.clear()
        answer = await agent.audit()

        assert targets(answer["missing"]) == [("thing", "cgroup/web", "web")]
        [note] = [note for note in answer["notes"] if "hoard" in note]
        assert "RuntimeError: the outsider does not answer" in note


@pytest.mark.parametrize("answers", [[7], [None], [b"bytes"]])
async def test_a_kind_that_answers_no_targets_is_named(simulation: Simulation, hoard: Hoard, answers: list[Any]) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        hoard.trouble = lambda: iter(answers)

        answer = await agent.audit()

        assert ["TypeError" in note for note in answer["notes"] if "hoard" in note] == [True]
        assert answer["strangers"] == []


async def test_a_kind_whose_find_hangs_is_named_within_its_patience(simulation: Simulation, hoard: Hoard) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))

        def hang() -> Iterator[str]:
            time.sleep(1000)
            yield ""

        hoard.trouble = hang
        answer = await agent.audit()

        assert ["no answer within 2 s" in note for note in answer["notes"] if "hoard" in note] == [True]
        assert targets(answer["missing"]) == []
        hoard.trouble = None
        assert await audited(agent) == CLEAN


async def test_an_answer_without_end_is_given_up(simulation: Simulation, hoard: Hoard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesocosm.kernel.runtime.audit._MOST", 500)
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))

        def forever() -> Iterator[str]:
            number = 0
            while True:
                number += 1
                yield f"/nowhere/hoards/web/{number}"

        hoard.trouble = forever
        answer = await agent.audit()

        assert ["does not end" in note for note in answer["notes"] if "hoard" in note] == [True]


async def test_kinds_are_asked_for_the_agents_own_places_only(simulation: Simulation, hoard: Hoard) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))

        await agent.audit()

        assert set(hoard.asked) == {"/nowhere", agent.world.host.state_dir, "/hoards"}


async def test_who_was_launched_by_that_name_meanwhile_loses_nothing_by_a_repair(
    simulation: Simulation, hoard: Hoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A leftover that is busy is tried again; between two tries a container of that name may come to live."""
    monkeypatch.setattr(repair, "_TRIES", 10_000)
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web", "exit 0"))
        await agent.wait_container("web")
        hoard.things["/nowhere/hoards/web"] = None
        simulation.machine.busy["/nowhere/hoards/web"] = 10_000
        answers: list[dict[str, Any]] = []

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: keep(answers, agent))
            while simulation.machine.busy["/nowhere/hoards/web"] > 9_998:
                await trio.lowlevel.checkpoint()
            await agent.launch_group(pod("web"))
            simulation.machine.busy.clear()

        assert "/nowhere/hoards/web" in hoard.things
        assert any("somebody lives there by now" in note for note in answers[0]["notes"])
        assert await audited(agent) == CLEAN


async def keep(answers: list[dict[str, Any]], agent: Agent) -> None:
    answers.append(await agent.audit(repair=True))


async def test_the_group_of_all_is_left_alone_as_soon_as_anybody_lives(simulation: Simulation, hoard: Hoard) -> None:
    """Removing it would remove the empty groups below it: a newborn's, or those that a container made for itself."""
    top = "/groups/mesocosm-top"
    undo = (Undo("rmdir_cgroup", top),)
    finding = Finding("leftover", Sighting("cgroup", top, "nobody lives in it", proven=True, undo=undo), None, "", undo)
    simulation.machine.things[top] = "cgroup"
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        done, why = await repair.undo_findings(agent.world, [finding])
        assert (done, len(why), top in simulation.machine.things) == ([], 1, True)

        await agent.kill_container("web")
        await agent.wait_container("web")
        assert await repair.undo_findings(agent.world, [finding]) == ([finding], [])  # the control
    assert top not in simulation.machine.things


async def test_a_repair_waits_for_no_file_system_that_does_not_answer(
    simulation: Simulation, hoard: Hoard, autojump_clock: Any
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web", "exit 0"))
        await agent.wait_container("web")
        hoard.things["/nowhere/hoards/web"] = None
        simulation.machine.silent["/nowhere/hoards/web"] = trio.Event()

        answer = await agent.audit(repair=True)

        assert answer["repaired"] == []
        assert any("no answer" in note for note in answer["notes"])
        simulation.machine.silent["/nowhere/hoards/web"].set()
        assert targets((await agent.audit(repair=True))["repaired"]) == [("hoard", "/nowhere/hoards/web", "web")]


@pytest.mark.parametrize("is_served", [False, True])
async def test_a_path_in_somebodys_command_line_is_not_asked_for_where_nobody_may_answer(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, *, is_served: bool
) -> None:
    monkeypatch.setattr(procfs, "arguments_of", lambda _: ["python", "-c", "main('/nowhere/trap', 3)"])
    monkeypatch.setattr(served, "ours", lambda: SimpleNamespace(leads_to=lambda path: is_served and path == "/nowhere/trap"))
    process = procfs.Process(4_000_000, 1, 1, "meso-launcher", "S")
    known: Any = SimpleNamespace(descends=lambda _: False, table={process.pid: process})
    async with simulation.agent() as agent:
        found = sight_processes._called_like_ours(Scene(agent.world, Claims()), known, process)
    assert (found is None) == is_served


async def test_however_many_sockets_somebody_binds_they_are_read_twice_and_not_all_shown(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    async with simulation.agent() as agent:
        scene = Scene(agent.world, Claims())

        def bound() -> Iterator[str]:
            reads.append(1)
            for number in range(3_000):
                yield f"{agent.world.host.run_dir}/x{number}"

        monkeypatch.setattr(devices, "bound_sockets", bound)
        seen = [sighting for sighting in sightings.sockets(scene) if sighting is not None]
        assert [sighting.still() for sighting in seen] == [True] * 1_000
    assert len(reads) == 2
    assert any("not all of them are shown" in note for note in scene.notes)


@pytest.mark.parametrize("name", ["agent.lock.set-aside-1763855045", "launcher.sock", "ledger.db.set-aside-17-wal"])
def test_what_an_agent_has_put_aside_itself_is_no_stranger(name: str) -> None:
    assert sightings.OWN.fullmatch(name)
    assert not sightings.OWN.fullmatch(f"x{name}")


async def test_what_stays_busy_is_left_over_and_said(simulation: Simulation, hoard: Hoard, autojump_clock: Any) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web", "exit 0"))
        await agent.wait_container("web")
        hoard.things["/nowhere/hoards/web"] = None
        simulation.machine.busy["/nowhere/hoards/web"] = 10 * repair._TRIES

        answer = await agent.audit(repair=True)

        assert targets(answer["leftover"]) == [("hoard", "/nowhere/hoards/web", "web")]
        assert answer["repaired"] == []
        assert any("still in use by pid 1 (simulated)" in note for note in answer["notes"])


async def test_the_next_agent_finds_the_same(simulation: Simulation, hoard: Hoard) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        await agent.launch_group(pod("dead", "exit 0"))
        await agent.wait_container("dead")
    hoard.things["/nowhere/hoards/dead"] = None
    del simulation.machine.things["cgroup/web"]
    async with simulation.agent() as agent:
        expected = {**CLEAN, "leftover": [("hoard", "/nowhere/hoards/dead", "dead")], "missing": [("thing", "cgroup/web", "web")]}
        assert await audited(agent) == expected


async def test_the_next_agent_misses_nothing_of_a_launch_that_was_rolled_back(simulation: Simulation) -> None:
    async with simulation.agent("member:1") as agent:
        with pytest.raises(LaunchError):
            await agent.launch_group(pod("web"))
        assert await audited(agent) == CLEAN
    async with simulation.agent() as agent:
        assert [line["state"] for line in agent.get_containers(include_dead=True)] == ["DEAD"]
        assert await audited(agent) == CLEAN


async def test_an_audit_lets_others_have_their_turn(simulation: Simulation, hoard: Hoard) -> None:
    """However much there is to look at: somebody who only wants a turn gets many while it lasts."""
    async with simulation.agent() as agent:
        await agent.launch_group(pod("web"))
        for number in range(20_000):
            hoard.things[f"/nowhere/hoards/web/{number}"] = None
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            assert await audited(agent) == CLEAN
            nursery.cancel_scope.cancel()

        assert turns > 5
