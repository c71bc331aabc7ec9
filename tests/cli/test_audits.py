"""`meso audit`: its table, its words, its codes, and what it says to the agent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesocosm.kernel.cli.audits import lines

CLEAN: dict[str, Any] = {"leftover": [], "missing": [], "strangers": [], "notes": []}


def finding(kind: str, target: str, ledger: str | None = None, note: str = "") -> dict[str, Any]:
    return {"kind": kind, "target": target, "ledger": ledger, "note": note}


FOUND = {
    "leftover": [finding("cgroup1", "/sys/fs/cgroup/pids/mesocosm-abc123/web", "web", "web is dead")],
    "missing": [finding("directory", "/run/mesocosm/containers/db", "db", "db is RUNNING")],
    "strangers": [finding("process", "77 (meso-keeper)", None, "called like a process of ours, and none")],
    "notes": ["the mounts of 3 processes are not for this user to see"],
}


def test_nothing_found_is_said_and_is_success(meso: Any, fake_agent: Any) -> None:
    agent = fake_agent({"AUDIT": lambda repair: CLEAN})
    said = meso("audit")
    assert said.out == "Nothing is left over, nothing is missing, nobody is a stranger.\n"
    assert said.code == 0
    assert agent.asked == [("AUDIT", {"repair": False})]


def test_findings_are_a_table_with_their_reasons_and_a_code_of_their_own(meso: Any, fake_agent: Any) -> None:
    fake_agent({"AUDIT": lambda repair: FOUND})
    said = meso("audit")
    assert said.code == 6
    rows = said.out.splitlines()
    assert rows[0].split() == ["WHAT", "KIND", "CONTAINER", "TARGET"]
    assert rows[1].split("  ")[0] == "left over"
    assert rows[2] == "    web is dead"
    assert rows[5].endswith("-          77 (meso-keeper)")
    assert rows[-1] == "1 left over, 1 missing, 1 strange"
    assert said.err == "meso: the mounts of 3 processes are not for this user to see\n"


def test_json_is_what_the_agent_said_in_one_line(meso: Any, fake_agent: Any) -> None:
    fake_agent({"AUDIT": lambda repair: FOUND})
    said = meso("audit", "--json")
    assert json.loads(said.out) == FOUND
    assert (said.code, said.err) == (6, "")


def test_repair_says_what_was_undone(meso: Any, fake_agent: Any) -> None:
    agent = fake_agent({"AUDIT": lambda repair: {**CLEAN, "repaired": FOUND["leftover"]}})
    said = meso("audit", "--repair")
    assert agent.asked == [("AUDIT", {"repair": True})]
    assert said.code == 0
    assert said.out.splitlines()[1].startswith("undone  cgroup1  web")
    assert said.out.splitlines()[-1].startswith("1 undone; Nothing is left over")


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_the_table_keeps_to_its_width_and_a_terminal_is_not_written_to_by_names(columns: int) -> None:
    answer = {**CLEAN, "strangers": [finding("file", "/run/\x1b[31m" + "x" * 300, None, "y" * 300)]}
    shown = lines(answer, columns, lambda text: str(text).replace("\x1b", "\\x1b"), lambda text, _: text)
    assert all(len(line) <= max(columns, 60) for line in shown), shown
    assert not any("\x1b" in line for line in shown)
