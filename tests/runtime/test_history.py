"""What has been: each life once, whoever died in between; who was there at a moment; what is forgotten, and what is damaged."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock

from mesocosm.kernel.core.errors import ConflictError, MesoError, NotFoundError, UnsupportedError
from mesocosm.kernel.runtime import annals, codec
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.annals import Annals, AnnalsError, Change, GroupLine, Line
from mesocosm.kernel.runtime.launch import Launch
from mesocosm.kernel.runtime.recording import Recorder
from mesocosm.kernel.runtime.seal import sealed_line
from mesocosm.kernel.testing.simulated_launcher import SimulatedLauncher
from mesocosm.kernel.testing.simulation import Simulation

POD = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "2"]}, {"name": "b", "command": ["sleep", "1"]}]}


@pytest.fixture
def kept(tmp_path: Path) -> Simulation:
    """A simulated host with a durable history."""
    return Simulation(tmp_path, history=True)


def pod(name: str, *command: str) -> dict[str, Any]:
    return {"name": name, "tasks": [{"name": "t", "command": list(command)}]}


async def lives(agent: Agent, container_id: str | None = None, **bounds: Any) -> list[dict[str, Any]]:
    """The lines of history, oldest first."""
    lines = list((await agent.history(container_id, **{"limit": 500, **bounds}))["history"])
    return lines if "at" in bounds else lines[::-1]


async def over(agent: Agent, group_id: str) -> None:
    with trio.fail_after(1000):
        await agent.wait_container(group_id)


@pytest.mark.parametrize("moment", ["_intend", "_stage", "_commit"])
async def test_a_pod_of_which_only_the_beginning_had_been_read_is_remembered_as_well(
    kept: Simulation, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def read_so_far(launch: Launch, *rest: Any) -> Any:
        launch._world.ledger.flush()
        assert launch._world.history is not None
        launch._world.history.catch_up()
        return goes_on(launch, *rest)

    goes_on = getattr(Launch, moment)
    async with kept.agent() as agent:
        monkeypatch.setattr(Launch, moment, read_so_far)
        await agent.launch_group(pod("web", "exit", "3"))
        await over(agent, "web")
        living = agent.explain("web.t")
        await agent.remove_container("web")

        gone = await agent.explain("web.t")  # type: ignore[misc]

        assert isinstance(living, dict)
        assert (gone["plan"], gone["chain"]) == (living["plan"], living["chain"])


async def test_one_that_was_removed_is_remembered_with_its_spec_its_plan_and_its_end(
    kept: Simulation, autojump_clock: MockClock
) -> None:
    async with kept.agent() as agent:
        await agent.launch_group(pod("web", "exit", "3"))
        await over(agent, "web")
        living = agent.explain("web.t")
        await agent.remove_container("web")

        gone = await agent.explain("web.t")  # type: ignore[misc]
        assert ("lives" in living, "lives" in gone) == (False, True)  # by that clients tell one that is there from one that was

        assert isinstance(living, dict)
        assert gone["plan"] == living["plan"]
        assert gone["wait"] == living["wait"]
        assert gone["chain"] == living["chain"]
        assert [change["state"] for change in gone["changes"]] == ["PREPARING", "STAGED", "RUNNING", "DESTROYING", "DEAD"]


async def test_an_id_that_is_used_again_has_several_lives_and_each_keeps_its_own_end(
    kept: Simulation, autojump_clock: MockClock
) -> None:
    async with kept.agent() as agent:
        for code in ("1", "2", "3"):
            await agent.launch_group(pod("web", "exit", code))
            await over(agent, "web")
        await agent.remove_container("web")

        assert [(line["life"], line["wait"]["exit"]) for line in await lives(agent, "web.t")] == [(1, 1), (2, 2), (3, 3)]
        assert (await agent.explain("web.t"))["wait"]["exit"] == 3  # type: ignore[misc]
        assert (await agent.explain("web.t", 2))["wait"]["exit"] == 2  # type: ignore[misc]
        with pytest.raises(NotFoundError, match="has no life 4") as never:
            await agent.explain("web.t", 4)  # type: ignore[misc]
        assert never.value.as_object()["have"] == "3 is the latest"
        with pytest.raises(NotFoundError):
            await agent.explain("nobody")  # type: ignore[misc]


async def test_a_launch_that_was_rolled_back_is_remembered_with_the_error(kept: Simulation, autojump_clock: MockClock) -> None:
    async with kept.agent() as agent:
        with pytest.raises(MesoError):
            await agent.launch_group({"name": "web", "tasks": [POD["tasks"][0], {"name": "x", "command": ["missing"]}]})
        await agent.remove_container("web")

        told = await agent.explain("web.a")  # type: ignore[misc]

    assert told["group"]["state"] == "ROLLED_BACK"
    assert told["error"]["id"] == "web.x"
    assert told["started"] is None
    assert [link["kind"] for link in told["chain"]][:3] == ["state", "end", "error"]


async def test_without_a_place_for_it_there_is_no_history_and_all_else_goes_on(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(POD)
        with pytest.raises(UnsupportedError):
            await agent.history()
        with pytest.raises(NotFoundError):
            agent.explain("nobody") if not isinstance(agent.explain("web"), dict) else await agent.explain("nobody")  # type: ignore[misc]


class Killed(Recorder):
    """Writes nothing by itself, and nothing at its end either."""

    async def run(self, changed: Any) -> None:
        await trio.sleep_forever()

    async def finish(self) -> None:
        self._close()


@pytest.mark.parametrize("written", range(7))
async def test_what_an_agent_could_not_write_any_more_the_next_one_does_once(
    kept: Simulation, autojump_clock: MockClock, written: int
) -> None:
    async with kept.agent() as agent:
        assert agent.world.history is not None
        agent.world.history.__class__ = Killed
        steps = [
            lambda: agent.launch_group(POD),
            lambda: agent.launch_nested_group("web.a", [{"name": "x", "command": ["exit", "4"]}]),
            lambda: over(agent, "web"),
            lambda: agent.launch_group(POD),
            lambda: agent.launch_group(pod("other", "exit", "1")),
            lambda: over(agent, "other"),
        ]
        for number, step in enumerate(steps):
            if number == written:
                await lives(agent)
            await step()
    async with kept.agent() as agent:
        found = await lives(agent)
        assert Counter((line["id"], line["life"]) for line in found) == Counter(
            {(name, 1): 1 for name in ("web", "web.a", "web.b", "web.a.x", "other", "other.t")}
            | {(name, 2): 1 for name in ("web", "web.a", "web.b")}
        )
        assert [line["id"] for line in found if line["state"] != "DEAD"] == ["web", "web.a", "web.b"]
        assert {line["id"]: line["wait"]["exit"] for line in found if line["life"] == 1 and line["id"] == "web.a.x"} == {
            "web.a.x": 4
        }


async def test_after_another_boot_what_ran_is_closed_as_rebooted_once(kept: Simulation, autojump_clock: MockClock) -> None:
    async with kept.agent() as agent:
        await agent.launch_group(pod("dead", "exit", "1"))
        await over(agent, "dead")
        await agent.launch_group(pod("web", "sleep", "1000"))
        before = await lives(agent)
    for suffix in ("", "-wal", "-shm"):
        Path(kept.ledger + suffix).unlink(missing_ok=True)  # the run directory is on a tmpfs
    kept.machine.things.clear()
    kept.launcher = SimulatedLauncher(kept.machine)
    kept.host = msgspec.structs.replace(kept.host, boot_id="another")
    for _ in range(2):
        async with kept.agent() as agent:
            after = await lives(agent)
            assert after[:2] == before[:2]
            assert [(line["id"], line["wait"]["reason"]) for line in after[2:4]] == [("web", "rebooted"), ("web.t", "rebooted")]
            assert len(after) == 4


async def test_after_a_lost_ledger_what_ran_is_closed_as_unknown_and_what_lives_is_a_new_life(
    kept: Simulation, autojump_clock: MockClock
) -> None:
    async with kept.agent() as agent:
        await agent.launch_group(pod("web", "sleep", "1000"))
        await lives(agent)
    Path(kept.ledger).write_bytes(b"this was a ledger once" * 1000)
    async with kept.agent() as agent:
        found = await lives(agent)
        assert [(line["id"], line["life"], line["state"]) for line in found] == [
            ("web", 1, "DEAD"), ("web.t", 1, "DEAD"), ("web", 2, "RUNNING"), ("web.t", 2, "RUNNING"),
        ]  # fmt: skip
        assert found[0]["wait"]["reason"] == "unknown"


async def test_a_ledger_from_before_what_the_history_knows_brings_nobody_back(kept: Simulation, autojump_clock: MockClock) -> None:
    copied = {}
    async with kept.agent() as agent:
        await agent.launch_group(pod("web", "sleep", "1000"))
        await lives(agent)
        agent.world.ledger.flush()
        for path in (Path(kept.ledger), Path(kept.ledger + "-wal")):
            copied[path] = path.read_bytes()
        await agent.kill_container("web")
        await over(agent, "web")
        before = await lives(agent)
    for path, content in copied.items():
        path.write_bytes(content)
    for _ in range(2):
        async with kept.agent() as agent:
            assert await lives(agent) == before
    async with kept.agent() as agent:
        await agent.launch_group(pod("later", "sleep", "1000"))
        found = await lives(agent)
        assert found[: len(before)] == before
        assert [(line["id"], line["state"]) for line in found[len(before) :]] == [("later", "RUNNING"), ("later.t", "RUNNING")]


async def test_a_damaged_history_is_set_aside_and_said_and_nobody_is_stopped(
    kept: Simulation, autojump_clock: MockClock, tmp_path: Path
) -> None:
    (tmp_path / "history.db").write_bytes(b"no history at all" * 1000)
    async with kept.agent() as agent:
        await agent.launch_group(POD)
        answer = await agent.history()
        assert [line["id"] for line in answer["history"]] == ["web.b", "web.a", "web"]
        assert len(answer["notes"]) == 1
        assert "set aside" in answer["notes"][0]
    assert len(list(tmp_path.glob("history.db.set-aside-*"))) == 1


@pytest.mark.parametrize("where", range(0, 40960, 4096))
async def test_a_history_with_a_page_of_zeros_stops_nobody(
    kept: Simulation, autojump_clock: MockClock, tmp_path: Path, where: int
) -> None:
    async with kept.agent() as agent:
        await agent.launch_group(pod("web", "exit", "1"))
        await over(agent, "web")
    with (tmp_path / "history.db").open("r+b") as file:
        assert file.seek(0, os.SEEK_END) > where
        file.seek(where)
        file.write(bytes(4096))
    async with kept.agent() as agent:
        await agent.launch_group(POD)
        await over(agent, "web")
        answer = await agent.history("web.b")
        assert answer["history"][0]["wait"]["exit"] == 0


async def test_while_it_cannot_be_written_everything_else_goes_on_and_then_nothing_is_missing(
    kept: Simulation, autojump_clock: MockClock, tmp_path: Path
) -> None:
    (tmp_path / "history.db").mkdir()
    async with kept.agent() as agent:
        await agent.launch_group(POD)
        with pytest.raises(ConflictError, match="history"):
            await agent.history()
        await over(agent, "web")
        await agent.remove_container("web")
        assert agent.world.history is not None
        assert agent.world.history.failures > 0
        (tmp_path / "history.db").rmdir()
        agent.world.history._tried = float("-inf")  # that much later

        answer = await agent.history()

        assert answer["notes"] == []
        assert [(line["id"], line["state"]) for line in answer["history"]] == [
            ("web.b", "DEAD"),
            ("web.a", "DEAD"),
            ("web", "DEAD"),
        ]
        assert (await agent.explain("web.a"))["plan"]["effects"] != []  # type: ignore[misc]


async def test_who_is_launched_before_the_history_can_be_written_is_not_taken_for_one_that_ended_unseen(
    kept: Simulation, autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with kept.agent() as agent:
        await agent.launch_group(pod("early", "sleep", "1000"))
        await lives(agent)
    (tmp_path / "history.db").rename(tmp_path / "later")
    (tmp_path / "history.db").mkdir()
    async with kept.agent() as agent:
        await agent.launch_group(pod("web", "sleep", "3"))
        (tmp_path / "history.db").rmdir()
        (tmp_path / "later").rename(tmp_path / "history.db")
        assert agent.world.history is not None
        agent.world.history._tried = float("-inf")  # that much later
        told = {line["id"]: line["state"] for line in await lives(agent)}
        assert told == dict.fromkeys(("early", "early.t", "web", "web.t"), "RUNNING")
        await over(agent, "web")
        assert [(line["life"], line["wait"]["exit"]) for line in await lives(agent, "web.t")] == [(1, 0)]
        assert len(await lives(agent)) == 4


def no_bodies() -> list[bytes]:
    """What was the body of a line until something fell over in it."""
    chance = random.Random(12)
    body = codec.pack([None, {"group": "web", "containers": ["web", "web.t"], "wait": {"id": "web"}, "ended": 1.5, "exit": 3}])
    found = [
        codec.pack(value) for value in (5, "text", [1, 2, 3], [None, "text"], [None, {"ended": "x"}], [None, {"exit": 1 << 63}])
    ]
    for _ in range(200):
        at = chance.randrange(8 * len(body))
        found.append(body[: at // 8] + bytes([body[at // 8] ^ 1 << at % 8]) + body[at // 8 + 1 :])
    return [*found, b"\x91" * 5000, body[:-1], body + body]


async def test_lines_of_the_log_that_cannot_be_read_hold_up_nothing_and_are_named(
    kept: Simulation, autojump_clock: MockClock
) -> None:
    async with kept.agent() as agent:
        await agent.launch_group(pod("web", "exit", "3"))
        await over(agent, "web")
    with contextlib.closing(sqlite3.connect(kept.ledger)) as db:
        last = db.execute("SELECT max(seq) FROM events").fetchone()[0]
        kinds = ("planned", "committed", "exited", "dead", "end")
        rows = [(last + at, 1, 1.0, "web.t", kinds[at % 5], None, body) for at, body in enumerate(no_bodies(), 1)]
        db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        db.execute("UPDATE meta SET value = ? WHERE key = 'seq'", (sealed_line(str(last + len(rows)), "seq"),))
        db.commit()
    async with kept.agent() as agent:
        await agent.launch_group(pod("next", "exit", "4"))
        await over(agent, "next")
        answer = await agent.history(limit=500)
        assert agent.world.history is not None
        assert agent.world.history.trouble is None
        assert [line["wait"]["exit"] for line in answer["history"] if line["id"] == "next.t"] == [4]
        assert sum("the event log says of web.t with" in note for note in answer["notes"]) > 20
        assert any("the event log says of web.t" in line["said"] for line in agent.set_aside(forget=False)["set_aside"])
        since, lines = 0, []
        while since < agent.world.ledger.seq:
            since, more = agent.world.journal.read(since)
            lines += more
        assert lines[-1]["type"] == "end"


@pytest.mark.parametrize("dropped", [0, 3])
async def test_numbers_that_are_left_out_after_damage_are_no_lines_that_were_forgotten(
    kept: Simulation, autojump_clock: MockClock, dropped: int
) -> None:
    async with kept.agent() as agent:
        await agent.launch_group(pod("web", "exit", "3"))
        await over(agent, "web")
        await lives(agent)
    with contextlib.closing(sqlite3.connect(kept.ledger)) as db:
        db.execute("DELETE FROM events WHERE seq IN (SELECT seq FROM events ORDER BY seq DESC LIMIT ?)", (dropped,))
        db.execute("INSERT INTO plans VALUES (-1, x'00')")
        db.commit()
    for name in ("next", "last"):
        async with kept.agent() as agent:
            assert agent.world.ledger.seq > 1_000_000
            assert (await agent.history())["notes"] == []
            assert agent.world.history is not None
            assert agent.world.history.cursor == agent.world.ledger.seq, "and nothing is waited for"
            await agent.launch_group(pod(name, "exit", "4"))
            await over(agent, name)
            answer = await agent.history()
            assert answer["notes"] == []
            assert [line["wait"]["exit"] for line in answer["history"] if line["id"] == f"{name}.t"] == [4]
            if name == "next":
                await trio.sleep(1)
                assert agent.world.journal.read(0)[1][0]["seq"] == 1, "nor are they a reason to forget those before them"


async def test_only_one_agent_writes_a_history(kept: Simulation, autojump_clock: MockClock, tmp_path: Path) -> None:
    other = Annals(str(tmp_path / "history.db"))
    async with kept.agent() as agent:
        await agent.launch_group(POD)
        with pytest.raises(ConflictError, match="another agent"):
            await agent.history()
    other.close()
    again = Annals(str(tmp_path / "history.db"))
    with pytest.raises(AnnalsError):
        Annals(str(tmp_path / "history.db"))
    again.close()


def told_by_events(lines: list[dict[str, Any]]) -> list[tuple[float, dict[str, str]]]:
    """The states after each line of the event log, by a second, simpler reading of it."""
    states: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    found = []
    for line in lines:
        group, kind = line.get("group", line["id"]), line["type"]
        if kind == "planned":
            groups[group] = list(line["containers"])
            states |= dict.fromkeys(groups[group], "PREPARING")
        elif kind == "committed":
            states |= dict.fromkeys(groups[group], "RUNNING")
        elif kind == "staged":
            states[line["id"]] = "STAGED"
        elif kind == "exited":
            states[line["id"]] = "DESTROYING"
        elif kind == "dead":
            states.pop(line["id"], None)
        elif kind == "end":
            for member in groups.get(group, ()):
                states.pop(member, None)
        found.append((line["time"], dict(states)))
    return found


@pytest.mark.parametrize("seed", range(12))
async def test_history_at_a_moment_is_what_the_event_log_tells_also_when_the_clock_is_set_back(
    kept: Simulation, autojump_clock: MockClock, seed: int
) -> None:
    chance = random.Random(seed)
    skew = 0.0
    kept.machine.time = lambda: 10_000.0 + trio.current_time() + skew  # type: ignore[method-assign]
    lines: list[dict[str, Any]] = []
    for _ in range(3):
        async with kept.agent() as agent:
            for _ in range(8):
                name = f"p{chance.randrange(4)}"
                try:
                    match chance.randrange(6):
                        case 0:
                            await agent.kill_container(name)
                        case 1:
                            await agent.remove_container(name)
                        case 2:
                            await agent.launch_nested_group(f"{name}.t", [{"name": "n", "command": ["sleep", "3"]}])
                        case 3:
                            skew += chance.choice([-7.0, -0.5, 4.0])
                        case _:
                            what = chance.choice([("sleep", "2"), ("sleep", "50"), ("exit", "1"), ("missing",)])
                            await agent.launch_group(pod(name, *what))
                except MesoError:
                    pass
                await trio.sleep(chance.random() * 3)
            agent.world.ledger.flush()
            since = 0
            lines = []
            while since < agent.world.ledger.seq:
                since, more = agent.world.journal.read(since)
                lines += more
            log = told_by_events(lines)
            moments = sorted({moment + offset for moment, _ in log for offset in (-0.01, 0, 0.01)})
            for moment in chance.sample(moments, min(40, len(moments))):
                expected = [states for when, states in log if when <= moment][-1:] or [{}]
                found = {line["id"]: line["state"] for line in await lives(agent, at=moment)}
                assert found == expected[0], moment
    assert len(lines) > 20


async def test_pages_follow_each_other_without_gap_or_overlap(kept: Simulation, autojump_clock: MockClock) -> None:
    async with kept.agent() as agent:
        for number in range(7):
            await agent.launch_group(pod(f"p{number}", "sleep", "100"))
        found, cursor = [], None
        while True:
            answer = await agent.history(cursor=cursor, limit=4)
            found += [line["id"] for line in answer["history"]]
            if (cursor := answer["next"]) is None:
                break
        assert found == [name for number in reversed(range(7)) for name in (f"p{number}.t", f"p{number}")]
        present, cursor = [], None
        while True:
            answer = await agent.history(at=agent.world.machine.time(), cursor=cursor, limit=4)
            present += [line["id"] for line in answer["history"]]
            if (cursor := answer["next"]) is None:
                break
        assert present == [name for number in range(7) for name in (f"p{number}", f"p{number}.t")]
        assert [line["id"] for line in await lives(agent, "p3")] == ["p3", "p3.t"]


def filled(path: Path, count: int, **bounds: int) -> Annals:
    """A history of `count` dead ones and one that lives."""
    book = Annals(str(path), **bounds)
    book.begin()
    for key in range(1, count + 2):
        died = 2 * key if key <= count else None
        spec = book.text(b"the spec of c%d" % key, f"c{key}")
        line = Line(
            key, f"c{key}", 1, key, "DEAD" if died else "RUNNING", key, key, key + 1 if died else None, 2 * key - 1, died, spec=spec
        )
        changes = [Change(2 * key - 1, key, key, "RUNNING")] + ([Change(2 * key, key + 1, key, "DEAD")] if died else [])
        book.put([GroupLine(key, f"c{key}", "DEAD", key)], [line], changes)
    book.commit()
    book.count = count + 1
    return book


def test_what_is_over_the_budget_is_forgotten_oldest_first_and_how_much_is_kept(tmp_path: Path) -> None:
    book = filled(tmp_path / "h", 100, most=11)

    while book.prune():
        pass

    assert [line.id for line in book.page(None, None, None, 500)] == [f"c{key}" for key in range(101, 90, -1)]
    assert (book.meta("forgotten"), book.meta("forgotten_until")) == ("90", "91.0")
    assert book.at(5.0, None, 0, 500) == []
    assert [line.id for line, _ in book.at(95.5, None, 0, 500)] == ["c95"]
    book.close()


def test_the_bytes_of_the_file_are_a_budget_as_well_and_what_lives_is_never_forgotten(tmp_path: Path) -> None:
    book = filled(tmp_path / "h", 3000, most_bytes=200_000)

    while book.prune():
        pass

    pages, free = (book._run(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    assert 100_000 < (pages - free) * 4096 <= 200_000
    assert "c3001" in {line.id for line in book.open_lines()}
    assert book.prune() == 0
    book.close()


def test_equal_texts_of_containers_with_other_names_are_kept_once(tmp_path: Path) -> None:
    book = filled(tmp_path / "h", 50)

    assert book._run("SELECT count(*) FROM texts").fetchone() == (1,)
    assert book.read_text(book.find("c7").spec, "c7") == b"the spec of c7"  # type: ignore[union-attr]
    book.close()


PIECES = [b"web", b"web.a", b"\0", annals._ID, annals._ROOT, annals._ID[:5], b"own id"]


@given(
    blob=st.binary() | st.lists(st.sampled_from(PIECES)).map(b"".join),
    name=st.sampled_from(["web", "web.a", "a", "own", "id.id", "root.own", "0"]),
)
@example(blob=annals._RAW + b"web", name="web")
def test_any_text_comes_back_as_it_was(blob: bytes, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    book = Annals(str(tmp_path_factory.mktemp("texts") / "h"))

    key = book.text(blob, name)

    assert book.read_text(key, name) == blob
    book.close()


def test_it_is_private_and_another_version_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "h"
    filled(path, 1).close()
    assert path.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()

    book = Annals(str(path))

    assert len(book.set_aside) == 1
    assert "schema version 99" in book.set_aside[0]
    assert book.open_lines() == []
    book.close()
