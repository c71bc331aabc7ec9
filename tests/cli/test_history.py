"""`history` and `explain` as people read them: moments, tables, chains."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any

import pytest

from mesocosm.kernel.cli.history import moment, stamp
from mesocosm.kernel.core.errors import SpecError

NOW = datetime(2026, 11, 22, 15, 0, 0).timestamp()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5m ago", NOW - 300), ("5m", NOW - 300), ("90s", NOW - 90), ("2h ago", NOW - 7200), ("1.5h", NOW - 5400),
        ("3d", NOW - 259200),
        ("1w ago", NOW - 604800), ("now", NOW), ("@1764000000.5", 1764000000.5), ("14:30", NOW - 1800), ("14:30:05", NOW - 1795),
        ("2026-11-22 14:30", NOW - 1800), ("2026-11-22T14:30:00", NOW - 1800), ("2026-11-21", NOW - 39 * 3600),
    ],
)  # fmt: skip
def test_a_moment_as_people_write_it(text: str, expected: float) -> None:
    assert moment(text, NOW, "--at") == expected


@pytest.mark.parametrize(
    "text", ["", "ago", "5", "5 parsecs ago", "yesterday", "25:00", "@", "@x", "-5m", "nan", "@nan", "@inf", "1e999h", "2026-13-01"]
)
def test_what_is_no_moment_is_refused_with_examples(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        moment(text, NOW, "--at")
    assert caught.value.fields["path"] == "--at"
    assert "5m ago" in caught.value.fields["hint"]


def test_a_stamp_has_the_day_unless_that_is_today() -> None:
    assert stamp(NOW - 60, NOW) == "14:59:00"
    assert stamp(NOW - 86400, NOW) == "2026-11-21 15:00:00"


def life(container_id: str, number: int = 1, **more: Any) -> dict[str, Any]:
    wait = {"id": container_id, "exit": 0, "signal": None, "reason": "exited"}
    return {
        "id": container_id, "life": number, "group": "g", "state": "DEAD", "planned": time.time() - 70,
        "started": time.time() - 70, "ended": time.time() - 5, "wait": wait, "error": None, **more,
    }  # fmt: skip


def test_the_table_has_the_latest_last_over_all_pages(meso: Any, fake_agent: Any) -> None:
    def history(container_id: str | None, limit: int, cursor: int | None = None) -> dict[str, Any]:
        if cursor is None:
            return {"history": [life("web", 2), life("db")], "next": 7, "notes": [], "durable": 9}
        return {"history": [life("web", 1)], "next": None, "notes": ["3 older ones have been forgotten"], "durable": 9}

    fake_agent({"GET_HISTORY": history})
    said = meso("history", "--limit", "3")

    assert said.code == 0
    assert [row.split()[:2] for row in said.out.splitlines()] == [["ID", "LIFE"], ["web", "#1"], ["db", "#1"], ["web", "#2"]]
    assert "65 s" in said.out
    assert said.err == "meso: 3 older ones have been forgotten\n"
    lines = [json.loads(line) for line in meso("history", "--limit", "3", "--json").out.splitlines()]
    assert [(line["v"], line["id"], line["life"]) for line in lines] == [(1, "web", 1), (1, "db", 1), (1, "web", 2)]


def test_what_was_left_out_is_said(meso: Any, fake_agent: Any) -> None:
    fake_agent({"GET_HISTORY": lambda container_id, limit: {"history": [life("web")], "next": 4, "notes": [], "durable": 9}})

    assert "there is more" in meso("history", "--limit", "1").err


def test_nobody_was_there(meso: Any, fake_agent: Any) -> None:
    asked: list[Any] = []

    def history(container_id: str | None, at: float, limit: int) -> dict[str, Any]:
        asked.append((container_id, at))
        return {"history": [], "next": None, "notes": [], "durable": 0}

    fake_agent({"GET_HISTORY": history})

    assert meso("history", "web", "--at", "@5").out == "Nobody was there.\n"
    assert asked == [("web", 5.0)]


@pytest.mark.parametrize("words", [["--at", "x"], ["--since", "x"], ["--limit", "0"], ["--at", "1h", "--since", "1h"]])
def test_what_makes_no_sense_is_refused_before_anybody_is_asked(meso: Any, fake_agent: Any, words: list[str]) -> None:
    agent = fake_agent({})

    assert meso("history", *words).code == 2
    assert agent.asked == []


def test_explain_asks_for_a_life_and_tells_that_there_are_others(meso: Any, fake_agent: Any) -> None:
    def explain(container_id: str, life: int) -> dict[str, Any]:
        chain = [{"kind": "state", "id": "web", "state": "DEAD", "says": "web is DEAD"}]
        return {
            "id": "web",
            "state": "DEAD",
            "life": life,
            "lives": 3,
            "chain": chain,
            "changes": [{"time": 1.0, "state": "RUNNING"}],
        }

    fake_agent({"EXPLAIN": explain})
    said = meso("explain", "--life", "2", "web")

    assert said.out.startswith("web is DEAD\n")
    assert "life 2 of 3" in said.out
    assert "RUNNING" in said.out
    assert meso("explain", "--life", "0", "web").code == 2
