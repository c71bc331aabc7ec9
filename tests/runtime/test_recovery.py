"""An agent dies at every point at which something has been, or is about to be, written down; the next one goes on."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import ConflictError, LaunchError, MesoError, NotFoundError
from mesocosm.kernel.launcher.contract import Ended, ExecFailed
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.ledger import HOST, Ledger
from mesocosm.kernel.testing.simulation import Simulation

POD = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "2"]}, {"name": "b", "command": ["sleep", "1"]}]}


class Killed(BaseException):
    """kill -9."""


class DyingLedger(Ledger):
    """Dies before or after its n-th transaction."""

    left = 0
    before = False

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._depth == 1 and kind is None:
            self.left -= 1
            if self.left == 0 and self.before:
                super().__exit__(Killed)
                raise Killed
        super().__exit__(kind, *rest)
        if self._depth == 0 and self.left == 0 and not self.before:
            raise Killed

    def close(self) -> None:
        """Nobody flushes anything any more."""
        self.left = -1
        self.pending.clear()
        super().close()


@contextlib.asynccontextmanager
async def dying(simulation: Simulation, transactions: int, *, before: bool) -> AsyncIterator[Agent]:
    """An agent that is killed at a transaction, or lives through the block if there are not so many."""
    try:
        async with simulation.agent() as agent:
            ledger = agent.world.ledger
            ledger.__class__ = DyingLedger
            assert isinstance(ledger, DyingLedger)
            ledger.left, ledger.before = transactions, before
            yield agent
            ledger.left = -1
    except BaseExceptionGroup as group:
        killed, rest = group.split(Killed)
        assert rest is None, rest
        assert killed is not None
    except Killed:
        pass


async def story(agent: Agent) -> None:
    """A pod, something nested in it, the end of all, and its removal."""
    await agent.launch_group(POD)
    await agent.launch_nested_group("web.a", [{"name": "x", "command": ["exit", "4"]}])
    with trio.fail_after(1000):
        await agent.wait_container("web")
    await agent.remove_container("web")


async def settle(agent: Agent) -> None:
    """Until nothing lives."""
    with trio.fail_after(1000):
        for line in agent.get_containers():
            await agent.wait_container(line["id"])


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("transactions", range(1, 16))
@pytest.mark.parametrize("twice", [0, 1, 2])
async def test_killed_at_any_transaction_all_runs_or_nothing_is_left(
    simulation: Simulation, autojump_clock: MockClock, transactions: int, twice: int, *, before: bool
) -> None:
    async with dying(simulation, transactions, before=before) as agent:
        await story(agent)
    if twice:
        async with dying(simulation, twice, before=before) as agent:  # and again, in the middle of the recovery
            await settle(agent)
    async with simulation.agent() as agent:
        known = {line["id"] for line in agent.get_containers(include_dead=True)}
        ran = set(simulation.launcher.started)
        assert {"web", "web.a", "web.b"} <= ran or not ran & {"web", "web.a", "web.b"}, "whole or not at all"
        await settle(agent)
        assert simulation.launcher.living == []
        for container_id in known & {"web", "web.a", "web.b"}:
            wait = await agent.wait_container(container_id)
            assert (wait["reason"] == "rolled_back") == (container_id not in ran)
        if "web.b" in known & ran:
            assert (await agent.wait_container("web.b"))["exit"] == 0
        seqs = [line["seq"] for line in read_all(agent)]
        assert seqs == list(range(1, len(seqs) + 1))
        assert [line for line in read_all(agent) if line["type"] == "end" and "group" not in line][1:] == []
        if "web" in known:
            await agent.remove_container("web")
        assert simulation.leftovers == []
        assert set(agent.world.ledger.entries()) <= {HOST}
        assert simulation.machine.open == set()
        await agent.launch_group(POD)


def read_all(agent: Agent) -> list[dict[str, Any]]:
    """Every line."""
    since, lines = 0, []
    while since < agent.world.ledger.seq:
        since, more = agent.world.journal.read(since)
        lines += more
    return lines


async def test_a_pod_goes_on_without_its_agent_and_its_exit_is_delivered(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
        before = {line["id"]: line["pid"] for line in agent.get_containers()}
        seq = agent.world.ledger.seq
    simulation.launcher.crash("web.b", 5 << 8)  # while nobody listens
    async with simulation.agent() as agent:
        assert {line["id"]: line["pid"] for line in agent.get_containers() if line["pid"]}.items() <= before.items()
        wait = await agent.wait_container("web.b")
        assert (wait["exit"], wait["reason"]) == (5, "exited")
        assert (await agent.wait_container("web"))["group"]["exit"] == 5
        assert read_all(agent)[-1]["seq"] > seq
        assert simulation.launcher.started.count("web.a") == 1
    async with simulation.agent() as agent:
        assert (await agent.wait_container("web"))["group"]["exit"] == 5


async def test_an_agents_end_ends_nothing(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
        things = dict(simulation.machine.things)
    assert simulation.machine.things == things
    assert simulation.launcher.living == ["web", "web.a", "web.b"]
    async with simulation.agent() as agent:
        await agent.launch_nested_group("web.a", [{"name": "x", "command": ["exit", "0"]}])
        await agent.kill_container("web")
        assert (await agent.wait_container("web"))["reason"] == "killed"


async def test_nobody_who_saw_it_means_unknown(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["sleep", "9"]})
    simulation.launcher._processes.clear()
    async with simulation.agent() as agent:
        wait = await agent.wait_container("x")
        assert (wait["exit"], wait["signal"], wait["reason"]) == (None, None, "unknown")


async def test_after_a_reboot_containers_are_closed_as_rebooted(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
    simulation.launcher._processes.clear()
    simulation.host = msgspec.structs.replace(simulation.host, boot_id="second")
    async with simulation.agent() as agent:
        assert (await agent.wait_container("web.a"))["reason"] == "rebooted"
        assert (await agent.wait_container("web"))["group"]["state"] == "DEAD"
        assert not [path for path in simulation.leftovers if path.startswith("cgroup")]


async def test_a_bad_row_is_set_aside_and_its_container_goes_on(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "good", "command": ["sleep", "5"]})
        await agent.launch_container({"container_id": "bad", "command": ["sleep", "5"]})
    with contextlib.closing(sqlite3.connect(simulation.ledger)) as db:
        db.execute("UPDATE containers SET spec = x'c1' WHERE id = 'bad'")
        db.commit()
    async with simulation.agent() as agent:
        assert {line["id"] for line in agent.get_containers()} == {"good", "bad"}
        assert any("bad" in text for text in agent.world.ledger.set_aside)
        assert (await agent.wait_container("bad"))["exit"] == 0


@pytest.mark.parametrize("damage", ["garbage", "truncated", "newer", "empty"])
async def test_a_ledger_that_cannot_be_read_is_set_aside(simulation: Simulation, autojump_clock: MockClock, damage: str) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
    path = Path(simulation.ledger)
    match damage:
        case "garbage":
            path.write_bytes(b"not a database at all" * 100)
        case "truncated":
            path.write_bytes(path.read_bytes()[:5000])
        case "newer":
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute("PRAGMA user_version = 99")
        case _:
            path.write_bytes(b"")
    async with simulation.agent() as agent:
        assert {line["id"] for line in agent.get_containers()} == {"web", "web.a", "web.b"}
        if damage != "empty":
            assert list(path.parent.glob("ledger.db.set-aside-*"))
        await agent.kill_container("web")
        await agent.wait_container("web")
        with contextlib.suppress(MesoError):
            await agent.remove_container("web")


async def test_what_is_left_of_one_that_has_been_removed_is_no_container_and_not_unknown_either(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        await agent.wait_container("x")
        simulation.machine.broken.update(path for path in simulation.machine.things if path.startswith("dir/"))
        await agent.remove_container("x")
        (line,) = agent.get_containers()
        with pytest.raises(ConflictError, match="cannot be removed yet") as refused:
            await agent.remove_container("x")
        assert refused.value.as_object()["have"] == line["parked"][0]
        simulation.machine.broken.clear()
        await trio.sleep(60)
        assert agent.get_containers(include_dead=True) == []
        with pytest.raises(NotFoundError):
            await agent.remove_container("x")


async def test_time_goes_on_for_a_parked_remainder_after_a_restart(simulation: Simulation, autojump_clock: MockClock) -> None:
    simulation.machine.broken.add("cgroup/x")
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        await agent.wait_container("x")
    simulation.machine.broken.clear()
    async with simulation.agent() as agent:
        await trio.sleep(1)
        assert agent.get_containers() == []
        assert "cgroup/x" not in simulation.leftovers


async def test_a_kill_is_not_forgotten_by_the_next_agent(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["ignore", "TERM"]})
        await agent.kill_container("x")
    async with simulation.agent() as agent:
        assert [line["state"] for line in agent.get_containers()] == ["STOPPING"]
        wait = await agent.wait_container("x")
        assert (wait["signal"], wait["reason"]) == (9, "killed")


async def damaged(path: str, statement: str) -> None:
    """One statement on the ledger of an agent that is gone."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(statement)
        db.commit()


async def test_entries_that_cannot_be_read_are_made_again_from_the_plan(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["sleep", "5"]})
    await damaged(simulation.ledger, "UPDATE entries SET body = x'c1' WHERE container = 'x'")
    async with simulation.agent() as agent:
        assert [text for text in agent.world.ledger.set_aside if "entries of x" in text] != []
        assert len(agent.world.ledger.set_aside) == 1
        await agent.wait_container("x")
        await agent.remove_container("x")
        assert simulation.leftovers == []


async def test_what_all_share_is_found_again_if_its_row_cannot_be_read(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        await agent.wait_container("x")
    await damaged(simulation.ledger, f"UPDATE entries SET body = x'c1' WHERE container = '{HOST}'")
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "y", "command": ["exit", "0"]})
        assert any("of the agent" in text for text in agent.world.ledger.set_aside)
        await agent.wait_container("y")
        await agent.retire()
    assert [path for path in simulation.machine.things if path.startswith("host/")] == []


async def test_what_all_share_is_never_undone_below_somebody_who_lives(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        await agent.wait_container("x")
        shared = [path for path in simulation.machine.things if path.startswith("host/")]
        assert shared
        simulation.machine.broken.update(shared)
        await agent.retire()
        assert [row.container for row in agent.world.ledger.parked()] == [HOST] * len(shared)
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "y", "command": ["sleep", "600"]})
        assert agent.world.ledger.parked() == [], "it is in use again"
        simulation.machine.broken.clear()
        await trio.sleep(60)
        assert [path for path in simulation.machine.things if path.startswith("host/")] == shared


async def test_a_remainder_of_what_all_shared_goes_when_nobody_lives(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        await agent.wait_container("x")
        simulation.machine.broken.update(path for path in simulation.machine.things if path.startswith("host/"))
        await agent.retire()
    simulation.machine.broken.clear()
    async with simulation.agent() as agent:
        await trio.sleep(1)
        assert agent.world.ledger.parked() == []
    assert [path for path in simulation.machine.things if path.startswith("host/")] == []


async def test_a_remainder_that_cannot_be_read_hurts_nobody(simulation: Simulation, autojump_clock: MockClock) -> None:
    simulation.machine.broken.add("cgroup/x")
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        await agent.wait_container("x")
    await damaged(simulation.ledger, "UPDATE parked SET entry = x'c1'")
    async with simulation.agent() as agent:
        assert [line["id"] for line in agent.get_containers() if "parked" in line] == ["x"]
        await agent.launch_container({"container_id": "y", "command": ["exit", "0"]})
        assert (await agent.wait_container("y"))["exit"] == 0


async def test_a_refused_relaunch_takes_nothing_from_what_it_is_refused_for(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    simulation.machine.broken.add("cgroup/x")
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "3"]})
        await agent.wait_container("x")
        with pytest.raises(MesoError, match="earlier x is still there"):
            await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        assert (await agent.wait_container("x"))["exit"] == 3
        simulation.machine.broken.clear()
        await trio.sleep(60)
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        assert (await agent.wait_container("x"))["exit"] == 0


async def test_a_removal_that_has_begun_is_nobody_elses_and_goes_on(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "0"]})
        await agent.wait_container("x")
        kept = [undo.target for entry in agent.world.cells["x"].entries for undo in entry.undo]
        assert kept
        simulation.machine.busy[kept[0]] = 1
        rest = agent.begin_removal("x")
        assert rest is not None
        with pytest.raises(MesoError, match="is being removed already"):
            agent.begin_removal("x")
        await rest
        assert agent.get_containers(include_dead=True) == []
        assert simulation.leftovers == []
        with pytest.raises(MesoError, match="no container"):
            agent.begin_removal("x")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE groups SET error = x'c1'",
        "UPDATE groups SET state = 'FOO'",
        "UPDATE containers SET base = 'abc'",
        "INSERT OR REPLACE INTO meta VALUES ('seq', 'xyz')",
    ],
)
async def test_whatever_cannot_be_read_stops_no_agent_and_is_told(
    simulation: Simulation, autojump_clock: MockClock, statement: str
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["sleep", "5"]})
    await damaged(simulation.ledger, statement)
    async with simulation.agent() as agent:
        assert [line["id"] for line in agent.get_containers()] == ["x"]
        assert agent.world.ledger.set_aside != []
        assert (await agent.wait_container("x"))["exit"] == 0


async def test_what_was_removed_is_not_found_again_because_the_launcher_still_has_a_record(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    """The launcher is told with the next lot that it may forget; an agent that is killed before has told nothing."""
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
        await agent.wait_container("web")
        simulation.launcher.acknowledge = no_news  # type: ignore[method-assign]
        await agent.remove_container("web")
    del simulation.launcher.acknowledge
    assert {line.container_id for line in await simulation.launcher.inventory()} >= {"web"}
    async with simulation.agent() as agent:
        assert agent.get_containers(include_dead=True) == []
        await trio.sleep(1)
        assert await simulation.launcher.inventory() == []


async def no_news(_: object) -> None:
    """An acknowledgement that is not heard."""
    await trio.lowlevel.checkpoint()


async def test_an_exit_that_has_been_told_is_not_told_again_by_the_next_agent(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    """Its end takes a while, since something of it is busy: the agent dies in between."""
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "x", "command": ["exit", "3"]})
        simulation.machine.busy["cgroup/x"] = 5
        while "exited" not in {line["type"] for line in read_all(agent)}:
            await trio.sleep(0.001)
        assert [line["state"] for line in agent.get_containers()] == ["DESTROYING"]
    async with simulation.agent() as agent:
        assert (await agent.wait_container("x"))["exit"] == 3
        told = [line["type"] for line in read_all(agent)]
        assert (told.count("exited"), told.count("dead")) == (1, 1)


async def test_the_end_of_a_group_whose_program_cannot_be_executed_is_carried_out_by_the_next_agent(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    """It has been written down whose fault it is, and nobody has been told to end yet."""
    async with simulation.agent() as agent:
        tasks = [{"name": "a", "command": ["ignore", "TERM"]}, {"name": "b", "command": ["exec-fails"], "essential": False}]
        await agent.launch_group({"name": "web", "tasks": tasks})
        with trio.fail_after(100):
            while agent.world.groups["web"].error is None:
                await trio.lowlevel.checkpoint()
        assert "web.a" in simulation.launcher.living
    async with simulation.agent() as agent:
        with trio.fail_after(100):
            assert (await agent.wait_container("web"))["group"]["error"]["code"] == "exec_failed"
        assert simulation.launcher.living == []


@pytest.mark.parametrize("how", ["killed", "not written"])
async def test_a_launch_that_is_given_up_before_its_intent_is_the_same_for_the_next_agent(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, how: str, autojump_clock: MockClock
) -> None:
    """Between its admission and its first transaction: it is shown as rolled back, and was shown by nobody after a restart."""

    def known(agent: Agent) -> tuple[Any, ...]:
        found = agent.explain("web")
        lines = agent.get_containers(include_dead=True)
        return lines, found["error"], found["plan"], agent.world.groups["web"].state, read_all(agent)

    async with simulation.agent() as agent:
        launch, _ = await agent._admit_group(POD, "web")
        with monkeypatch.context() as patched:
            if how == "killed":
                await agent.kill_container("web")
            else:
                patched.setattr(agent.world.faults, "strike", lambda kind, what: _strikes())
            with pytest.raises(LaunchError, match=how):
                await agent._launch(launch)
        assert {line["state"] for line in agent.get_containers(include_dead=True)} == {"DEAD"}
        assert simulation.leftovers == []
        agent.world.ledger.flush()
        before = known(agent)
        assert [line["type"] for line in before[-1]].count("end") == 1
    async with simulation.agent() as agent:
        assert known(agent) == before
        await agent.remove_container("web")
        assert agent.get_containers(include_dead=True) == []
        assert agent.world.ledger.containers() == []


def _strikes() -> None:
    raise LaunchError("not written")


@pytest.mark.parametrize("lost", [(ExecFailed,), (ExecFailed, Ended)])
async def test_whose_program_could_not_be_executed_is_known_though_the_agent_died_before_it_heard_of_it(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, lost: tuple[type, ...], autojump_clock: MockClock
) -> None:
    tasks = [{"name": "a", "command": ["ignore", "TERM"]}, {"name": "b", "command": ["exec-fails"], "essential": False}]
    tell = simulation.launcher._tell
    with monkeypatch.context() as patched:
        patched.setattr(simulation.launcher, "_tell", lambda notice: None if isinstance(notice, lost) else tell(notice))
        async with simulation.agent() as agent:
            await agent.launch_group({"name": "web", "tasks": tasks})
            assert agent.world.groups["web"].error is None
    async with simulation.agent() as agent:
        with trio.fail_after(1000):
            group = (await agent.wait_container("web"))["group"]
        error = group["error"]
        assert [error[word] for word in ("code", "id", "syscall", "errno")] == ["exec_failed", "web.b", "execve", "ENOEXEC"]
        assert (error["step"]["stage"], error["target"]) == ("exec", "exec-fails")
        assert agent.explain("web.b")["error"]["code"] == "exec_failed"
        assert simulation.launcher.living == []
    assert simulation.launcher.acknowledged.count("web.b") == 1
