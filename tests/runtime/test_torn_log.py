"""The agent is killed within a write to the ledger's log: what was not finished was never written, and is no damage either."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesocosm.kernel.runtime import book as books
from mesocosm.kernel.runtime.ledger import Ledger

HEAD, PAGE = 24, 4096
FIRST = 32  # bytes of the log's own head
SALT = slice(16, 24)  # of it: another one each time the log is begun anew


def torn(before: bytes, after: bytes) -> Iterator[bytes]:
    """The log as it is after each write(2) of a transaction, and in the middle of each: heads and pages in turn."""
    began = next((at for at, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), len(before))
    at = FIRST + (max(0, began - FIRST)) // (HEAD + PAGE) * (HEAD + PAGE) if began >= FIRST else 0
    ends = [FIRST] if not at else []
    for frame in range(max(at, FIRST), len(after), HEAD + PAGE):
        ends += [frame + HEAD, frame + HEAD + PAGE // 2, frame + HEAD + PAGE]
    for end in ends[:-1]:
        yield after[:end] + before[end:]


def write(ledger: Ledger, name: str, size: int = 14_000) -> None:
    with ledger:
        ledger.intend((name, name, "e"), [(name, name, 1, b"spec", None)], [], [(name, bytes(size))])


def ids(ledger: Ledger) -> list[str]:
    return [row.id for row in ledger.containers()]


@pytest.mark.parametrize("moment", ["at the beginning", "after the log was begun anew", "by the second agent that is killed"])
def test_a_transaction_that_a_kill_cut_short_was_never_written(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "_LOG_BYTES", 300_000)
    directory = tmp_path / "live"
    directory.mkdir()
    path, log = directory / "ledger.db", directory / "ledger.db-wal"
    number, tried = 0, 0
    with contextlib.closing(Ledger(str(path))) as ledger:
        for _ in range(3):
            write(ledger, f"c{number}")
            number += 1
        salt = log.read_bytes()[SALT]
        while moment == "after the log was begun anew" and log.read_bytes()[SALT] == salt:
            write(ledger, f"c{number}")
            number += 1
        for _ in range(2):
            file, before = path.read_bytes(), log.read_bytes()
            known = ids(ledger)
            write(ledger, f"c{number}")
            number += 1
            assert path.read_bytes() == file
            for state in torn(before, log.read_bytes()):
                copy = tmp_path / "copy"
                copy.mkdir()
                (copy / "ledger.db").write_bytes(file)
                (copy / "ledger.db-wal").write_bytes(state)
                with contextlib.closing(Ledger(str(copy / "ledger.db"))) as next_one:
                    assert next_one.set_aside == []
                    assert ids(next_one) == known
                    if moment == "by the second agent that is killed":
                        check_again(next_one, copy, tmp_path / "again")
                shutil.rmtree(copy)
                tried += 1
    assert tried > 10


def check_again(ledger: Ledger, directory: Path, place: Path) -> None:
    """The same with what an agent writes that follows one which was cut short."""
    known, file, before = ids(ledger), (directory / "ledger.db").read_bytes(), (directory / "ledger.db-wal").read_bytes()
    write(ledger, "again", 10)
    for state in torn(before, (directory / "ledger.db-wal").read_bytes()):
        place.mkdir()
        (place / "ledger.db").write_bytes(file)
        (place / "ledger.db-wal").write_bytes(state)
        with contextlib.closing(Ledger(str(place / "ledger.db"))) as third:
            assert third.set_aside == []
            assert ids(third) == known
        shutil.rmtree(place)
