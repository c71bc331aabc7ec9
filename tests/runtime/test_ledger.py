"""The ledger by itself: the lock, sentences, event numbers, history."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import pytest

from mesocosm.kernel.contracts import Effect, Fact, Grant, Step, Undo, Watch
from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.errors import ConflictError
from mesocosm.kernel.core.plan import ContainerPlan, plan_as_data
from mesocosm.kernel.runtime import codec, locking
from mesocosm.kernel.runtime.events import Journal
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.runtime.locking import lock

ARGS = {"path": "/d", "uid": Grant("uid_base"), "deep": [{"a": (Fact(0, "fd"), b"\0")}]}
PLAN = ContainerPlan(
    "x",
    {"net": "own"},
    (Effect("directory", ARGS, (Undo("rmdir", "/d"),), plugin="p"),),
    (Step("bind", {"fd": Fact(0, "fd"), "target": "/t"}, "p"), Step("exec", {"argv": ["x"], "env": {}}, "q")),
    (Watch("oom", {"file": "/f"}, "p"),),
)


@pytest.fixture
def ledger(tmp_path: Path) -> contextlib.closing[Ledger]:
    """An empty one."""
    return contextlib.closing(Ledger(str(tmp_path / "ledger.db")))


def test_a_second_agent_is_refused_and_the_lock_dies_with_its_file(tmp_path: Path) -> None:
    held = lock(str(tmp_path))
    with pytest.raises(ConflictError, match="another agent"):
        lock(str(tmp_path))
    held.close()
    lock(str(tmp_path)).close()


def test_a_lock_whose_file_cannot_be_written_holds_and_leaves_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier version's file, or one that is immutable."""
    (tmp_path / "agent.lock").write_bytes(b"old\n")
    monkeypatch.setattr(locking, "_open", lambda path: os.open(path, os.O_RDONLY))  # as for one whom the mode keeps out
    held = lock(str(tmp_path))
    held.note(b"")
    with pytest.raises(ConflictError):
        lock(str(tmp_path))
    held.close()
    assert (tmp_path / "agent.lock").read_bytes() == b"old\n"


def test_plans_come_back_with_their_references() -> None:
    again = codec.unpack_plan(codec.pack_plan(PLAN))
    assert plan_as_data(again) == plan_as_data(PLAN)
    assert isinstance(again.effects[0].undo[0], Undo)
    assert again.setup[0].args["fd"] == Fact(0, "fd")
    assert isinstance(again.setup[0].args["fd"], Fact)
    spec = ContainerSpec(id="a.b", command=("x",), rlimits={"core": (0, 2**64 - 1)})
    assert codec.unpack_spec(codec.pack_struct(spec)) == spec


async def test_a_failing_transaction_changes_nothing_and_keeps_its_events(ledger: contextlib.closing[Ledger]) -> None:
    with ledger as book:
        journal = Journal(book)
        journal.add("x", "planned")
        twice = [("x", "x", 1, b"", None), ("x", "x", 1, b"", None)]
        with pytest.raises(sqlite3.IntegrityError), book:
            book.intend(("x", "b", "e"), twice, [(1, codec.pack_plan(PLAN))], [("x", b"")])
        assert book.containers() == []
        assert journal.read(0) == (0, [])
        book.flush()
        assert [line["type"] for line in journal.read(0)[1]] == ["planned"]


async def test_one_row_is_many_lines_and_numbers_go_on_after_a_restart(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    with contextlib.closing(Ledger(path)) as book:
        journal = Journal(book)
        key = book.next_plan()
        with book:
            book.intend(("x", "b", "e"), [("x", "x", key, b"", None)], [(key, codec.pack_plan(PLAN))], [])
            journal.add("x", "staged", plan=key, span=(0, 1, 0, 1))
            journal.add("x", "started", plan=key, span=(0, 0, 1, 2))
    with contextlib.closing(Ledger(path)) as book:
        journal = Journal(book)
        journal.add("y", "planned")
        book.flush()
        since, lines = journal.read(0)
        assert since == 6
        assert [(line["seq"], line["type"]) for line in lines] == [
            (1, "effect"), (2, "step"), (3, "staged"), (4, "step"), (5, "started"), (6, "planned"),
        ]  # fmt: skip
        assert [line["type"] for line in journal.read(1, "x")[1]] == ["step", "staged", "step", "started"]
        assert [line["seq"] for line in journal.read(4)[1]] == [5, 6]
        assert lines[0]["args"] == plan_as_data(PLAN)["effects"][0]["args"]


async def test_history_is_bounded_and_numbers_are_not_used_twice(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    with contextlib.closing(Ledger(path)) as book:
        journal = Journal(book)
        with book:
            book.intend(("live", "b", "e"), [("live", "live", 1, b"", None)], [(1, b""), (2, b"")], [])
            journal.add("live", "planned", plan=1, span=(0, 0, 0, 1))
            for _ in range(50):
                journal.add("gone", "dead")
        book.prune(10)
        lines = [(row.id, first) for first, row in book.events_after(0, 100)]
        assert lines[0] == ("live", 1)
        assert len(lines) == 11
        assert book.plan(2) is None
        book.prune(0)
    with contextlib.closing(Ledger(path)) as book:
        assert book.seq == 52


def test_a_file_with_other_tables_of_the_same_version_is_set_aside(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    Ledger(path).close()
    db = sqlite3.connect(path)
    db.execute("ALTER TABLE containers DROP COLUMN reason")
    db.commit()
    db.close()

    book = Ledger(path)

    assert "tables" in book.set_aside[0]
    assert book.containers() == []
    book.close()


def test_nobody_else_can_read_the_ledger_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        book = Ledger(str(tmp_path / "ledger.db"))
    finally:
        os.umask(before)

    with book:
        book.intend(("x", "b", "e"), [], [], [])
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    assert set(modes.values()) == {0o600}, modes
    book.close()
