"""tests/hostile.md names tests that exist, in order, and no attack twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = [line.strip("|").split(" | ") for line in (TESTS / "hostile.md").read_text().splitlines() if re.match(r"\| [A-K]\d", line)]


def test_every_row_says_what_is_done_what_happens_and_which_test_shows_it() -> None:
    assert [row for row in ROWS if len(row) != 4 or not all(cell.strip() for cell in row)] == []


def test_no_attack_is_listed_twice() -> None:
    ids = [row[0].strip() for row in ROWS]

    assert sorted(set(ids)) == sorted(ids)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_the_tests_that_are_named_exist(row: list[str]) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[3])

    assert named, f"no `path.py::test` in {row[3]!r}"
    for path, test in named:
        assert re.search(rf"def {test}\b", (TESTS / path).read_text()), f"{path} has no {test}"
