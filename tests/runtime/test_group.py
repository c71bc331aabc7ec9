"""Groups on a simulated host: whole or nothing, ends, kills."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import ConflictError, LaunchError, MesoError, SpecError, UnknownOutcomeError
from mesocosm.kernel.core.states import State
from mesocosm.kernel.launcher.contract import LauncherGone, NotReleased
from mesocosm.kernel.testing.simulation import Simulation


def pod(*commands: str, name: str = "web", **more: Any) -> dict[str, Any]:
    """A pod whose tasks a, b, c… run `commands`."""
    tasks = [{"name": letter, "command": command.split()} for letter, command in zip("abcdef", commands, strict=False)]
    return {"name": name, "tasks": tasks, **more}


def types(lines: list[dict[str, Any]], container_id: str | None = None) -> list[str]:
    """The types of lines, of one id."""
    return [line["type"] for line in lines if container_id in (None, line["id"])]


async def test_a_group_runs_ends_and_leaves_only_what_is_kept(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        answer = await agent.launch_group(pod("sleep 1", "sleep 2"))
        assert answer == {"id": "web", "state": "RUNNING", "containers": ["web", "web.a", "web.b"]}
        assert simulation.launcher.started == ["web", "web.a", "web.b"]
        wait = await agent.wait_container("web.b")
        assert (wait["exit"], wait["reason"]) == (0, "exited")
        wait = await agent.wait_container("web")
        assert wait["group"] == {"state": "DEAD", "exit": 0, "error": None}
        assert sorted(simulation.leftovers) == sorted(f"dir/{name}{rest}" for name in answer["containers"] for rest in ("", "/log"))
        await agent.remove_container("web")
        assert simulation.leftovers == []
        assert simulation.machine.open == set()
        assert agent.get_containers(include_dead=True) == []
        assert agent.is_idle


async def test_events_tell_all_of_it_without_gaps(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        lines = [line async for line in agent.run_group(pod("exit 0"))]
        planned = await agent.plan_group(pod("exit 0"))
    assert [line["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert types(lines)[:2] == ["planned", "admitted"]
    assert types(lines)[-1] == "end"
    assert types(lines).index("committed") < types(lines).index("started")
    for container in planned["containers"]:
        keys = [("effect", "effects"), ("step", "setup")]
        for kind, key in keys:
            told = [line for line in lines if line["type"] == kind and line["id"] == container["id"]]
            shown = [
                {name: value for name, value in line.items() if name not in ("v", "seq", "time", "id", "type")} for line in told
            ]
            assert shown == container[key]
    assert lines[-1]["exit"] == 0
    assert lines[-1]["containers"]["web.a"]["exit"] == 0


async def test_a_failing_member_ends_the_group_and_gives_it_its_code(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        lines = [line async for line in agent.run_group(pod("sleep 100", "ignore TERM", "exit 3"))]
        end = lines[-1]
        assert (end["exit"], end["state"]) == (3, "DEAD")
        waits = end["containers"]
        assert (waits["web.c"]["exit"], waits["web.c"]["reason"]) == (3, "exited")
        assert (waits["web.a"]["signal"], waits["web.a"]["reason"]) == (15, "group")
        assert (waits["web.b"]["signal"], waits["web.b"]["reason"]) == (9, "group")
        assert trio.current_time() == pytest.approx(3.0, abs=0.2)
        assert types(lines).count("dead") == 4


@pytest.mark.parametrize("fault", [*(f"effect:{n}" for n in range(1, 13)), *(f"member:{n}" for n in range(1, 5))])
async def test_whatever_fails_nothing_is_left(simulation: Simulation, autojump_clock: MockClock, fault: str) -> None:
    async with simulation.agent(fault) as agent:
        with pytest.raises(LaunchError) as caught:
            await agent.launch_group(pod("sleep 1", "sleep 1", "sleep 1"))
        assert caught.value.fields["id"].startswith("web")
        assert caught.value.fields["hint"]
        if fault.startswith("effect"):
            assert caught.value.fields["step"]["stage"] == "effect"
            assert caught.value.fields["plugin"] == "simulated"
        assert simulation.launcher.started == []
        assert simulation.launcher.living == []
        assert simulation.leftovers == []
        assert simulation.machine.open == set()
        assert {line["wait"]["reason"] for line in agent.get_containers(include_dead=True)} == {"rolled_back"}
        _, lines = agent.world.journal.read(0)
        assert types(lines)[-2:] == ["rolled_back", "end"]
        assert lines[-1]["state"] == "ROLLED_BACK"
        undone = [path for what, path in simulation.machine.history if what == "undo"]
        made = {path for what, path in simulation.machine.history if what == "do"}
        intended = [f"{kind}/{name}" for name in ("web", "web.a", "web.b", "web.c") for kind in ("dir", "cgroup")]
        assert undone == [path for path in reversed(intended) if path in made]
        await agent.launch_group(pod("sleep 1"))  # the fault strikes once, and the name is free again


async def test_a_missing_program_is_told_with_its_step(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        with pytest.raises(LaunchError) as caught:
            await agent.launch_group(pod("sleep 1", "missing"))
        assert caught.value.exit_code == 127
        assert caught.value.fields["id"] == "web.b"
        assert simulation.launcher.started == []
        assert agent.explain("web.b")["error"]["errno"] == "ENOENT"
        assert agent.explain("web")["group"]["state"] == "ROLLED_BACK"


async def test_a_refused_effect_names_the_system_and_the_path(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 50", name="other"))
        with pytest.raises(LaunchError) as caught:
            await agent.launch_group(pod("sleep 1", labels={"effect": "refused"}))
        assert (caught.value.fields["errno"], caught.value.fields["target"]) == ("ENOSPC", "refused/web")
        assert {line["id"] for line in agent.get_containers()} == {"other", "other.a"}


async def test_exec_that_fails_behind_the_barrier_ends_the_group(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        lines = [line async for line in agent.run_group(pod("sleep 100", "exec-fails"))]
        assert lines[-1]["state"] == "DEAD"
        assert lines[-1]["exit"] == 126
        assert lines[-1]["error"]["code"] == "exec_failed"
        assert lines[-1]["error"]["id"] == "web.b"


async def test_a_kill_ends_children_first_each_by_its_policy(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 100", "ignore TERM"))
        await agent.kill_container("web")
        states = {line["id"]: line["state"] for line in agent.get_containers()}
        assert states == dict.fromkeys(("web", "web.a", "web.b"), "STOPPING")
        wait = await agent.wait_container("web")
        assert wait["reason"] == "killed"
        assert trio.current_time() == pytest.approx(3.0, abs=0.2)
        order = [line["id"] for line in agent.world.journal.read(0)[1] if line["type"] == "exited"]
        assert order == ["web.a", "web.b", "web"]


async def test_a_second_kill_may_shorten_the_grace(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("ignore TERM"))
        await agent.kill_container("web")
        await trio.sleep(0.5)
        await agent.kill_container("web", grace_ms=100)
        await agent.wait_container("web")
        assert trio.current_time() == pytest.approx(0.6, abs=0.1)


async def test_a_signal_goes_to_one_process_only(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "web", "tasks": [{"name": "a", "command": ["sleep", "9"], "essential": False},
                                                           {"name": "b", "command": ["sleep", "5"]}]})  # fmt: skip
        await agent.kill_container("web.a", "KILL")
        wait = await agent.wait_container("web.a")
        assert (wait["signal"], wait["reason"]) == (9, "killed")
        assert (await agent.wait_container("web"))["group"]["exit"] == 0
        with pytest.raises(ConflictError):
            await agent.kill_container("web.a", "KILL")


@pytest.mark.parametrize("after", [0.0, 0.01, 0.5, 1.5, 2.5])
async def test_a_kill_during_a_launch_wins_at_once(simulation: Simulation, autojump_clock: MockClock, after: float) -> None:
    simulation.launcher._delay = 1.0
    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        failed: list[MesoError] = []

        async def launch() -> None:
            try:
                await agent.launch_group(pod("sleep 1", "sleep 1", labels={"slow": "1"}))
            except MesoError as error:
                failed.append(error)

        nursery.start_soon(launch)
        await trio.sleep(after + 0.001)
        began = trio.current_time()
        await agent.kill_container("web.a")
        await agent.wait_container("web")
        assert trio.current_time() - began < 0.1
        assert failed[0].message == "killed during the launch"
        assert simulation.leftovers == []
        assert simulation.launcher.started == []
        assert simulation.machine.open == set()


async def test_a_launch_goes_on_without_its_client(simulation: Simulation, autojump_clock: MockClock) -> None:
    simulation.launcher._delay = 1.0
    async with simulation.agent() as agent:
        with trio.move_on_after(0.5):
            await agent.launch_group(pod("sleep 10"))
        assert {line["state"] for line in agent.get_containers()} == {"RUNNING"}


async def test_a_launch_that_hangs_is_given_up_at_its_deadline(simulation: Simulation, autojump_clock: MockClock) -> None:
    simulation.launcher.hanging.add("web.a")
    async with simulation.agent() as agent:
        with pytest.raises(MesoError) as caught:
            await agent.launch_group(pod("sleep 1"))
        assert caught.value.code == "timeout"
        assert simulation.leftovers == []


async def test_slow_effects_run_beside_each_other_and_have_a_deadline(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        command = {"container_id": "one", "command": ["sleep", "1"], "labels": {"slow": "4"}}
        await agent.launch_container(command)
        assert trio.current_time() == pytest.approx(4.0, abs=0.1)
        with pytest.raises(UnknownOutcomeError):
            await agent.launch_container({**command, "container_id": "two", "labels": {"slow": "11"}})
        assert not [path for path in simulation.leftovers if "two" in path]


async def test_nested_groups_live_in_their_parent(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 5"))
        answer = await agent.launch_nested_group(
            "web.a", [{"name": "x", "command": ["sleep", "90"]}, {"name": "y", "command": ["sleep", "1"]}]
        )
        assert answer["containers"] == ["web.a.x", "web.a.y"]
        assert (await agent.wait_container("web.a.y"))["exit"] == 0
        assert (await agent.wait_container("web.a.x"))["reason"] == "parent"
        assert (await agent.wait_container("web"))["group"]["exit"] == 0
        _, lines = agent.world.journal.read(0)
        dead = [line["id"] for line in lines if line["type"] == "dead"]
        assert dead == ["web.a.y", "web.a.x", "web.a", "web"]
        with pytest.raises(ConflictError):
            await agent.launch_nested_group("web.a", [{"name": "z", "command": ["exit", "0"]}])
        await agent.remove_container("web")
        assert simulation.leftovers == []


async def test_what_dies_with_its_parent_says_so_however_long_the_parent_takes(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    nested = {"name": "x", "command": ["sleep", "90"], "tasks": [{"name": "y", "command": ["sleep", "90"]}]}
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "web", "tasks": [{"name": "a", "command": ["sleep", "90"], "tasks": [nested]}]})
        await simulation.launcher.crash_slowly("web.a", 5)
        waits = {name: await agent.wait_container(name) for name in ("web.a", "web.a.x", "web.a.x.y")}
    assert {name: wait["reason"] for name, wait in waits.items()} == {
        "web.a": "signaled", "web.a.x": "parent", "web.a.x.y": "parent"
    }  # fmt: skip


async def test_what_is_killed_while_its_parent_lives_did_not_die_of_it(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        nested = [{"name": "x", "command": ["sleep", "90"]}]
        await agent.launch_group({"name": "web", "tasks": [{"name": "a", "command": ["sleep", "90"], "tasks": nested}]})
        simulation.launcher.crash("web.a.x")
        assert (await agent.wait_container("web.a.x"))["reason"] == "signaled"


async def test_a_member_that_dies_at_the_barrier_ends_the_launch_and_leaves_no_record(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        simulation.launcher.hanging.add("web.b")
        async with trio.open_nursery() as nursery:

            async def launch() -> None:
                with pytest.raises(LaunchError, match="ended while it was waiting"):
                    await agent.launch_group(pod("sleep 100", "sleep 100"))

            nursery.start_soon(launch)
            await trio.sleep(1)
            simulation.launcher.crash("web.a")
        assert simulation.leftovers == []
        await trio.sleep(1)
        assert "web.a" not in agent.world.unacknowledged
        assert await simulation.launcher.inventory() == []


async def test_a_group_in_a_single_container_has_the_rules_of_groups(simulation: Simulation, autojump_clock: MockClock) -> None:
    """What runs alone has an executor that decides nothing: the failure of one member would end no other."""
    tasks = [{"name": "x", "command": ["ignore", "TERM"]}, {"name": "y", "command": ["exit", "4"]}]
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "one", "command": ["ignore", "TERM"]})
        await agent.launch_group({"name": "web", "tasks": [{"name": "a", "command": ["ignore", "TERM"]}]})
        for around in ("one", "web.a"):
            answer = await agent.launch_nested_group(around, tasks)
            with trio.fail_after(100):
                waits = [await agent.wait_container(f"{around}.{name}") for name in ("x", "y")]
            assert [wait["reason"] for wait in waits] == ["group", "exited"]
            assert agent.world.groups[answer["id"]].executor == "default"
            assert agent.world.tree.state(around) is State.RUNNING
        assert agent.world.groups["one"].executor == "command"


async def test_a_parents_death_takes_a_nested_launch_along(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 100"))
        simulation.launcher.hanging.add("web.a.x")
        async with trio.open_nursery() as nursery:

            async def launch() -> None:
                with pytest.raises(LaunchError):
                    await agent.launch_nested_group("web.a", [{"name": "x", "command": ["sleep", "1"]}])

            nursery.start_soon(launch)
            await trio.sleep(1)
            simulation.launcher.crash("web.a")
            await agent.wait_container("web")
        assert agent.is_idle


async def test_what_a_container_asks_for_is_bounded_by_what_it_has(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 100"))
        greedy = [{"name": "x", "command": ["exit", "0"], "capabilities": ["SYS_ADMIN"]}]
        with pytest.raises(MesoError) as caught:
            await agent.launch_nested_group("web.a", greedy, principal="web.a")
        assert (caught.value.code, caught.value.fields["path"]) == ("denied", "$.tasks[0].capabilities")
        await agent.launch_nested_group("web.a", greedy)
        assert (await agent.wait_container("web.a.x"))["exit"] == 0


async def test_a_name_in_use_is_a_conflict_and_a_dead_one_is_replaced(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 1"))
        with pytest.raises(ConflictError):
            await agent.launch_group(pod("sleep 2"))
        with pytest.raises(ConflictError):
            await agent.remove_container("web")
        await agent.wait_container("web")
        await agent.launch_group(pod("sleep 2"))
        assert (await agent.wait_container("web"))["group"]["exit"] == 0


async def test_bad_input_names_the_field_and_changes_nothing(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        for document, path in (
            ({"name": "web", "tasks": [{"name": "a", "command": "x", "nope": 1}]}, "$.tasks[0].nope"),
            ({"name": "web", "executor": "nobody", "tasks": [{"name": "a", "command": "x"}]}, "$.executor"),
        ):
            with pytest.raises(SpecError) as caught:
                await agent.launch_group(document)
            assert caught.value.fields["path"] == path
        with pytest.raises(SpecError) as caught:
            await agent.launch_container({"container_id": "x", "command": ["a"], "limits": {"nope": 1}})
        assert caught.value.fields["path"] == "$.limits.nope"
        assert agent.world.ledger.seq == 0


async def test_ranges_of_ids_are_disjoint_and_run_out_with_numbers(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        for number in range(8):
            await agent.launch_group(pod("sleep 5", name=f"g{number}"))
        bases = {agent.explain(f"g{number}")["grants"]["uid_base"] for number in range(8)}
        assert len(bases) == 8
        assert agent.explain("g1.a")["grants"] == agent.explain("g1")["grants"]
        with pytest.raises(MesoError) as caught:
            await agent.launch_group(pod("sleep 5", name="g8"))
        assert (caught.value.code, caught.value.fields["have"], caught.value.fields["need"]) == ("over_budget", "8", "9")
        await agent.wait_container("g0")
        await agent.launch_group(pod("sleep 5", name="g8"))


async def test_memory_kills_are_told_as_such(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "hog", "command": ["oom"], "resources": {"memory": "64MiB"}})
        wait = await agent.wait_container("hog")
        assert (wait["reason"], wait["oom"], wait["limit"], wait["signal"]) == ("memory", True, "memory", 9)
        assert wait["message"] == "killed at its memory limit of 64 MiB"


async def test_a_kill_at_a_limit_that_is_shared_says_whose_it_is(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group({**pod("oom"), "resources": {"memory": "96MiB"}})
        wait = await agent.wait_container("web.a")
        assert wait["message"] == "killed at the memory limit of web, 96 MiB"


async def test_what_cannot_be_undone_is_parked_named_and_retried(simulation: Simulation, autojump_clock: MockClock) -> None:
    simulation.machine.broken.add("cgroup/web.a")
    simulation.machine.busy["cgroup/web"] = 5
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 1"))
        assert (await agent.wait_container("web"))["group"]["exit"] == 0
        (line,) = [line for line in agent.get_containers() if "parked" in line]
        assert "cgroup/web.a: EBUSY, held by pid 1" in line["parked"][0]
        with pytest.raises(ConflictError, match="still there"):
            await agent.launch_group(pod("sleep 1"))
        simulation.machine.broken.clear()
        await trio.sleep(70)
        assert agent.get_containers() == []
        assert "cgroup/web.a" not in simulation.leftovers
        assert "parked" in types(agent.world.journal.read(0)[1])
        await agent.launch_group(pod("sleep 1"))


async def test_stopping_the_agent_ends_everything(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(pod("ignore TERM"))
        await agent.launch_container({"container_id": "x", "command": ["sleep", "99"]})
        await agent.stop_agent()
        assert agent.stopped.is_set()
        assert "host/shared" not in simulation.machine.things
        with pytest.raises(ConflictError):
            await agent.launch_group(pod("sleep 1", name="late"))


async def test_a_launcher_that_dies_leaves_containers_and_no_invented_status(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["sleep", "5"]})
        simulation.launcher.send.send_nowait(LauncherGone())
        await trio.sleep(0)
        await simulation.launcher.send.aclose()
        simulation.launcher.send = trio.open_memory_channel[object](0)[0]  # type: ignore[assignment]
        assert [line["state"] for line in agent.get_containers()] == ["RUNNING"]


@pytest.mark.parametrize("trouble", ["cannot be told", "does not do it"])
async def test_a_barrier_that_does_not_open_ends_the_group_at_its_deadline(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    async def release(_barrier: str, *, wait: bool) -> None:
        assert not wait
        if trouble == "cannot be told":
            await trio.sleep_forever()

    monkeypatch.setattr(simulation.launcher, "release", release)
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 100"))
        await agent.wait_container("web")
        assert trio.current_time() < 15
        assert simulation.launcher.started == []
        assert not [path for path in simulation.leftovers if path.startswith("cgroup")]


async def test_a_launcher_that_dies_before_it_tells_of_a_start_ends_nobody(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def release(_barrier: str, *, wait: bool) -> None:
        simulation.launcher.send.send_nowait(LauncherGone())

    monkeypatch.setattr(simulation.launcher, "release", release)
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 100"))
        await trio.sleep(30)
        assert {line["state"] for line in agent.get_containers()} == {"RUNNING"}


async def test_a_start_that_is_told_before_the_release_returns_is_heard(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = simulation.launcher.release

    async def release(barrier: str, *, wait: bool) -> None:
        await opens(barrier, wait=wait)
        await trio.sleep(0.1)

    monkeypatch.setattr(simulation.launcher, "release", release)
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 100"))
        await trio.sleep(30)
        assert {line["state"] for line in agent.get_containers()} == {"RUNNING"}


async def test_a_barrier_that_is_refused_ends_the_group_with_the_reason(
    simulation: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def release(barrier: str, *, wait: bool) -> None:
        simulation.launcher.send.send_nowait(NotReleased(barrier, "no such barrier"))

    monkeypatch.setattr(simulation.launcher, "release", release)
    async with simulation.agent() as agent:
        await agent.launch_group(pod("sleep 100"))
        answer = await agent.wait_container("web")
        assert answer["group"]["error"]["message"] == "no such barrier"
        assert simulation.launcher.started == []
        assert not [path for path in simulation.leftovers if path.startswith("cgroup")]


async def test_a_roll_back_that_takes_too_long_parks_the_rest(simulation: Simulation, autojump_clock: MockClock) -> None:
    tasks = [{"name": f"t{number}", "command": ["missing"]} for number in range(40)]
    simulation.machine.busy.update({f"cgroup/web.t{number}": 10**6 for number in range(40)})
    async with simulation.agent() as agent:
        with pytest.raises(LaunchError):
            await agent.launch_group({"name": "web", "tasks": tasks})
        assert trio.current_time() < 40
        assert any("deadline" in note for line in agent.get_containers() for note in line["parked"])
        simulation.machine.busy.clear()
        await trio.sleep(120)
        assert simulation.leftovers == []


async def test_a_large_plan_lets_others_have_their_turn(simulation: Simulation, autojump_clock: MockClock) -> None:
    tasks = [{"name": f"t{number}", "command": ["exit", "0"]} for number in range(200)]
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        planned = await agent.plan_group({"name": "web", "tasks": tasks})
        nursery.cancel_scope.cancel()

    assert len(planned["containers"]) == 201
    assert turns > 10
