"""A ledger that cannot be written: nothing new begins, and what has begun goes on to its end."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.runtime import opening
from mesocosm.kernel.runtime.book import Book
from mesocosm.kernel.runtime.events import Journal
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.testing.simulation import Simulation


def fill(book: Book) -> None:
    """From here on the file may not grow: SQLite answers as it does on a full disk."""
    pages = book._db.execute("PRAGMA page_count").fetchone()[0]
    book._db.execute(f"PRAGMA max_page_count = {pages}")
    with contextlib.suppress(sqlite3.OperationalError), book._db:
        while True:  # what is free inside it goes, too
            book._db.execute("INSERT INTO meta VALUES (hex(randomblob(20)), hex(zeroblob(400)))")


def empty(book: Book) -> None:
    """There is room again, and no time needs to pass until it is noticed: the book's own clock is the real one."""
    book._db.execute("PRAGMA max_page_count = 1000000")
    book._retry_at = 0.0


def big(container_id: str) -> dict[str, Any]:
    """A pod whose plan needs pages of its own."""
    return {"name": container_id, "tasks": [{"name": "a", "command": ["sleep", "5"], "env": {"X": "x" * 9000}}]}


async def test_a_decision_that_cannot_be_written_is_an_error_and_nothing_has_changed(tmp_path: Path) -> None:
    with contextlib.closing(Ledger(str(tmp_path / "ledger.db"))) as book:
        fill(book)
        with pytest.raises(LaunchError, match="cannot be written") as refusal, book.deciding():
            book.intend(("x", "b", "e"), [("x", "x", 1, bytes(9000), None)], [(1, bytes(9000))], [])
        assert refusal.value.fields["errno"] == "ENOSPC"
        assert "make room" in refusal.value.fields["hint"]
        assert book.trouble is None
        assert (book.groups(), book.containers()) == ([], [])


async def test_a_decision_that_is_refused_tells_nobody_of_itself(tmp_path: Path) -> None:
    with contextlib.closing(Ledger(str(tmp_path / "ledger.db"))) as book:
        journal = Journal(book)
        journal.add("x", "before")
        fill(book)
        with pytest.raises(LaunchError, match="cannot be written"), book.deciding():
            journal.add("x", "committed", {"text": "t" * 9000})
        empty(book)
        book.flush()
        assert [line["type"] for line in journal.read(0)[1]] == ["before"]


async def test_a_follower_that_knows_more_than_was_written_hears_it_all_again(tmp_path: Path) -> None:
    with contextlib.closing(Ledger(str(tmp_path / "ledger.db"))) as book:
        journal = Journal(book)
        journal.add("x", "end")
        book.flush()
        async with contextlib.aclosing(journal.follow(7)) as lines:
            with trio.fail_after(5):
                assert (await anext(lines))["type"] == "end"


async def test_what_has_happened_counts_and_is_written_when_there_is_room_again(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    with contextlib.closing(Ledger(path)) as book:
        journal = Journal(book)
        with book.deciding():
            book.intend(("x", "b", "e"), [("x", "x", 1, b"", None)], [(1, b"")], [("x", b"")])
        fill(book)
        for number in range(3):
            with book:
                journal.add("x", "exited", {"text": "t" * 9000, "number": number})
                book.dead("x", 1.0, bytes(9000), None)
        assert book.trouble is not None
        assert [row.state for row in book.containers()] == ["PREPARING"]
        assert [line["number"] for line in journal.read(0)[1]] == [0, 1, 2]
        with pytest.raises(LaunchError, match="cannot be written"):
            book.check_writable()
        empty(book)
        book.check_writable()
        assert [row.state for row in book.containers()] == ["DEAD"]
    with contextlib.closing(Ledger(path)) as book:
        assert [(line["seq"], line["number"]) for line in Journal(book).read(0)[1]] == [(1, 0), (2, 1), (3, 2)]


async def test_a_full_disk_refuses_launches_and_nothing_else(simulation: Simulation, autojump_clock: MockClock) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group(big("before"))
        fill(agent.world.ledger)
        with pytest.raises(LaunchError, match="cannot be written"):
            await agent.launch_group(big("refused"))
        assert simulation.leftovers != []
        assert "refused.a" not in simulation.launcher.living
        await agent.kill_container("before.a")
        assert (await agent.wait_container("before.a"))["reason"] == "killed"
        await agent.wait_container("before")
        await agent.remove_container("before")
        assert [line["id"] for line in agent.get_containers()] == []
        assert simulation.leftovers == []
        empty(agent.world.ledger)
        agent.world.journal.wake()
        await trio.sleep(3)
        assert agent.world.ledger.trouble is None
        await agent.launch_group(big("after"))
        await agent.wait_container("after")
        shown = agent.get_containers(include_dead=True)
    async with simulation.agent() as agent:
        assert agent.get_containers(include_dead=True) == shown
        assert {line["id"] for line in shown} == {"after", "after.a", "refused", "refused.a"}


async def test_an_exit_that_could_not_be_written_is_told_to_the_next_agent(
    simulation: Simulation, autojump_clock: MockClock
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "p", "tasks": [{"name": "a", "command": ["exit", "7"]}]})
        fill(agent.world.ledger)
        assert (await agent.wait_container("p.a"))["exit"] == 7
        await agent.wait_container("p")
        await trio.sleep(5)
    async with simulation.agent() as agent:
        empty(agent.world.ledger)
        assert (await agent.wait_container("p.a"))["exit"] == 7


def test_a_file_that_cannot_be_opened_now_is_not_taken_for_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "ledger.db")
    Ledger(path).close()
    monkeypatch.setattr(opening, "_open_once", _full)
    with pytest.raises(LaunchError, match="cannot be written"):
        Ledger(path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["ledger.db"]


def test_wherever_a_new_ledger_stops_growing_it_is_refused_or_whole(tmp_path: Path, figure: Callable[..., None]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    refused, size = 0, 0
    while True:
        path = str(tmp_path / f"{size}.db")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # a write beyond it fails, as on a full disk, but with EFBIG
        try:
            with contextlib.closing(Ledger(path)) as book:
                mode = book._db.execute("PRAGMA journal_mode").fetchone()[0]
                if book.trouble is None:
                    break
        except LaunchError as error:
            assert "cannot be written" in str(error)  # noqa: PT017 - refused or whole
            mode = "wal"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert mode == "wal", size
        Ledger(path).close()  # once there is room
        assert not any(".set-aside" in each.name for each in tmp_path.iterdir()), size
        refused, size = refused + 1, size + 1024
    figure(sizes=refused)
    assert refused > 10


def test_a_ledger_that_could_not_begin_its_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stays(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
            """SQLite answers a write that failed there with the mode that there was before."""
            return super().execute("PRAGMA journal_mode" if statement == "PRAGMA journal_mode = WAL" else statement, *values)

    with monkeypatch.context() as failing:
        failing.setattr(opening, "connect", lambda path: sqlite3.connect(path, isolation_level=None, factory=Stays))
        with pytest.raises(LaunchError, match="no write-ahead log"):
            Ledger(str(tmp_path / "ledger.db"))
    Ledger(str(tmp_path / "ledger.db")).close()
    assert not any(".set-aside" in each.name for each in tmp_path.iterdir())


def _full(path: str) -> sqlite3.Connection:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


async def test_events_of_the_backlog_that_are_in_the_file_already_hold_up_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    with contextlib.closing(Ledger(path)) as book:
        journal = Journal(book)
        fill(book)
        for number in range(3):
            with book:
                journal.add("x", "exited", {"text": "t" * 9000, "number": number})
        assert book.trouble is not None
        empty(book)
        book._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", book._unwritten[:2])
        book.check_writable()
        assert book.trouble is None
    with contextlib.closing(Ledger(path)) as book:
        assert [(line["seq"], line["number"]) for line in Journal(book).read(0)[1]] == [(1, 0), (2, 1), (3, 2)]


async def test_a_ledger_that_was_removed_and_cannot_be_written_again_stays_open_until_it_can(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with contextlib.closing(Ledger(str(path))) as book:
        with book:
            book.set_meta("boot_id", "this one")
            book.intend(("x", "b", "e"), [("x", "x", 1, b"", None)], [(key, bytes(9000)) for key in range(20)], [])
        path.unlink()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        try:
            for _ in range(2):
                with pytest.raises(LaunchError, match="cannot be written"):
                    book.check_writable()
                assert book.trouble is None
                assert (book.meta("boot_id"), len(book.containers())) == ("this one", 1)
                assert not path.exists()
                assert not list(tmp_path.glob("*.new")) + list(tmp_path.glob("*.again"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        book.set_meta("later", "as well")
        book.check_writable()
    with contextlib.closing(Ledger(str(path))) as book:
        assert (book.meta("boot_id"), book.meta("later"), len(book.containers())) == ("this one", "as well", 1)


async def test_half_of_a_ledger_that_was_being_written_again_is_never_taken_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename, seen = tmp_path / "ledger.db", os.rename, []

    def whole(old: str, new: str) -> None:
        if new.endswith(".new"):
            assert not os.path.exists(new)
            with contextlib.closing(sqlite3.connect(old)) as db:
                seen.extend(db.execute("SELECT count(*) FROM plans").fetchone())
            (tmp_path / "kept").write_bytes(Path(old).read_bytes())
        rename(old, new)

    with contextlib.closing(Ledger(str(path))) as book:
        book.write_many("INSERT INTO plans VALUES (?, ?)", [(key, bytes(900)) for key in range(200)])
        path.unlink()
        monkeypatch.setattr(os, "rename", whole)
        book.check_writable()
    assert seen == [200], "only what is whole gets the name of what may take its place"

    path.unlink()
    half = (tmp_path / "kept").read_bytes()
    (tmp_path / "ledger.db.again").write_bytes(half[: len(half) // 2])  # as kill -9 leaves it
    with contextlib.closing(Ledger(str(path))) as book:
        assert book.plan(1) is None
        assert not (tmp_path / "ledger.db.again").exists()
