"""The verbs that ask once or listen: tables, trees, codes, and what they say to the agent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from mesocosm.kernel.cli import tables
from mesocosm.kernel.runtime.chain import make


def line(container_id: str, state: str = "RUNNING", **fields: Any) -> dict[str, Any]:
    """A line of ps."""
    parent = container_id.rpartition(".")[0] or None
    return {
        "id": container_id, "parent": parent, "state": state, "pid": 7, "group": "g", "role": "default",
        "started": time.time() - 65, "wait": None, **fields,
    }  # fmt: skip


CONTAINERS = [line("web"), line("web.b"), line("web.a", "DEAD", pid=None, wait={"exit": 1}), line("web.a.x"), line("other")]


def answer_containers(all: bool = False) -> dict[str, Any]:  # noqa: A002, FBT001, FBT002 - the wire's own name
    return {"containers": CONTAINERS if all else [each for each in CONTAINERS if each["state"] != "DEAD"]}


def test_ps_is_a_table_in_the_order_of_the_tree(meso: Any, fake_agent: Any) -> None:
    for each in CONTAINERS:
        each["started"] = time.time() - 65  # this module may have been imported minutes ago
    fake_agent({"GET_CONTAINERS": answer_containers})
    said = meso("ps", "-a")
    rows = [row.split() for row in said.out.splitlines()]
    assert rows[0] == ["ID", "STATE", "PID", "AGE", "ENDED"]
    assert [row[0] for row in rows[1:]] == ["other", "web", "web.a", "web.a.x", "web.b"]
    assert [*rows[3][:2], *rows[3][3:]] == ["web.a", "DEAD", "s", "exit", "1"]
    assert 65 <= int(rows[3][2]) < 120
    assert "web.a " not in meso("ps").out


def test_ps_json_is_what_the_agent_said_line_by_line(meso: Any, fake_agent: Any) -> None:
    fake_agent({"GET_CONTAINERS": answer_containers})
    assert [json.loads(text) for text in meso("ps", "-a", "--json").out.splitlines()] == CONTAINERS


def test_tree_is_drawn_and_as_json_has_children(meso: Any, fake_agent: Any) -> None:
    fake_agent({"GET_CONTAINERS": answer_containers})
    drawn = [text.split("  ")[0].rstrip() for text in meso("tree", "-a").out.splitlines()[1:]]
    assert drawn == ["other", "web", "├─ a", "│", "└─ b"]
    roots = [json.loads(text) for text in meso("tree", "-a", "--json").out.splitlines()]
    assert [root["id"] for root in roots] == ["other", "web"]
    assert [child["id"] for child in roots[1]["children"]] == ["web.a", "web.b"]
    assert roots[1]["children"][0]["children"][0]["id"] == "web.a.x"


def test_the_tree_of_one_container_is_it_and_what_is_below(meso: Any, fake_agent: Any) -> None:
    fake_agent({"GET_CONTAINERS": answer_containers})
    drawn = [text.split("  ")[0].rstrip() for text in meso("tree", "-a", "web.a").out.splitlines()[1:]]
    assert drawn == ["web.a", "└─ x"]
    assert [json.loads(text)["id"] for text in meso("tree", "web.b", "--json").out.splitlines()] == ["web.b"]


def test_the_tree_of_a_container_that_is_not_there_is_not_found(meso: Any, fake_agent: Any) -> None:
    fake_agent({"GET_CONTAINERS": answer_containers})
    said = meso("tree", "we")
    assert (said.code, said.out) == (3, "")
    assert "meso tree -a" in said.err


def test_a_child_whose_parent_is_not_listed_is_drawn_as_a_root() -> None:
    assert [text for text, _ in tables.tree_rows(tables.nest([line("a.b.c"), line("a.b")]))] == ["a.b", "└─ c"]


def test_wait_ends_with_the_programs_code_and_says_how_it_ended(meso: Any, fake_agent: Any) -> None:
    waits = {
        "a": {"exit": 3},
        "b": {"exit": None, "signal": 9, "reason": "memory", "limit": "memory", "message": "all gone"},
        "c": {"reason": "unknown"},
    }
    fake_agent({"WAIT_CONTAINER": lambda container_id: waits[container_id]})
    assert meso("wait", "a") == (3, "exit 3\n", "")
    assert meso("wait", "b") == (137, "SIGKILL, all gone\n", "")
    assert meso("wait", "c") == (1, "nobody saw how\n", "")
    waits["d"] = {"signal": 9, "reason": "group", "group": {"state": "DEAD", "exit": 5}}
    assert meso("wait", "d") == (5, "exit 5\n", "")
    assert json.loads(meso("wait", "a", "--json").out) == {"exit": 3}


def test_wait_gives_up_after_its_timeout(meso: Any, fake_agent: Any) -> None:
    fake_agent({"WAIT_CONTAINER": lambda container_id: time.sleep(5)})
    began = time.monotonic()
    said = meso("wait", "--timeout", "0.2", "a", "--json")
    assert said.code == 124
    assert time.monotonic() - began < 3
    assert json.loads(said.out)["error"]["code"] == "timeout"


def test_kill_takes_signals_by_name_and_refuses_what_is_none(meso: Any, fake_agent: Any) -> None:
    agent = fake_agent({"KILL_CONTAINER": lambda **_: {}})
    assert meso("kill", "a", "b").code == 0
    assert meso("kill", "-s", "sigusr1", "a").code == 0
    assert meso("kill", "-s", "NOPE", "a").code == 2
    assert [params for _, params in agent.asked] == [
        {"container_id": "a"},
        {"container_id": "b"},
        {"container_id": "a", "signal": 10},
    ]


def test_rm_goes_on_past_an_id_that_cannot_be_removed(meso: Any, fake_agent: Any, kit: Any) -> None:
    def remove(container_id: str) -> dict[str, Any]:
        if container_id == "b":
            raise kit.Refusal("conflict", "b is RUNNING")
        return {}

    agent = fake_agent({"REMOVE_CONTAINER": remove})
    said = meso("rm", "a", "b", "c", "--json")
    assert said.code == 4
    assert [params["container_id"] for _, params in agent.asked] == ["a", "b", "c"]
    told = [json.loads(text) for text in said.out.splitlines()]
    assert told == [{"id": "a"}, {"error": {"code": "conflict", "message": "b is RUNNING", "id": "b"}}, {"id": "c"}]


def test_an_error_has_its_code_its_object_and_its_words(meso: Any, fake_agent: Any, kit: Any) -> None:
    def explain(container_id: str) -> Any:
        raise kit.Refusal("not_found", f"no container {container_id}", id=container_id, hint="meso ps -a")

    fake_agent({"EXPLAIN": explain})
    said = meso("explain", "x")
    assert (said.code, said.out) == (3, "")
    assert said.err == "meso: no container x\n  where:   in x\n  hint:    meso ps -a\n"
    assert json.loads(meso("explain", "x", "--json").out)["error"]["id"] == "x"


def test_explain_tells_the_state_the_cause_and_where_it_was(meso: Any, fake_agent: Any) -> None:
    error = {
        "code": "launch_failed",
        "message": "mount failed",
        "step": {"index": 4, "stage": "mount", "kind": "proc"},
        "errno": "EPERM",
    }
    wait = {"reason": "rolled_back"}
    record = {"id": "x", "state": "DEAD", "wait": wait, "own_error": error, "group": {"state": "ROLLED_BACK", "error": error}}
    chain = make(record, lambda _: None)
    fake_agent({"EXPLAIN": lambda container_id: {"id": "x", "state": "DEAD", "wait": wait, "error": error, "chain": chain}})
    said = meso("explain", "x")
    assert said.out.splitlines() == [
        "x is DEAD",
        "  its program never ran: the launch failed, and all of it was undone",
        "  because:    mount failed",
        "  where:      step 4 of setting up x (mount: proc)",
        "  kernel:     the call answered EPERM (operation not permitted)",
    ]


def test_events_are_lines_until_the_agent_ends(meso: Any, fake_agent: Any, kit: Any) -> None:
    def events(since: int, container_id: str | None) -> Iterator[dict[str, Any]]:
        yield {
            "v": 1,
            "seq": since + 1,
            "time": 0.25,
            "id": "x",
            "type": "effect",
            "kind": "directory",
            "args": {"path": "/d"},
            "undo": [],
        }
        yield {"v": 1, "seq": since + 2, "time": 0.25, "id": "x", "type": "exited", "wait": {"exit": 2}}

    fake_agent({"SUBSCRIBE_EVENTS": events})
    lines = meso("events", "--since", "5").out.splitlines()
    assert lines[0].split()[1:] == ["effect", "x", "directory", "/d"]
    assert lines[1].split()[1:] == ["exited", "x", "exit", "2"]
    assert json.loads(meso("events", "--json", "--since", "5").out.splitlines()[1])["seq"] == 7


def test_logs_of_one_container_are_its_bytes_and_of_a_group_lines_with_names(meso: Any, fake_agent: Any, kit: Any) -> None:
    group = kit.Group(output={("web.a", "stdout"): b"one\x1b[2J\n", ("web.b", "stdout"): b"two\n", ("web.b", "stderr"): b"bad\n"})
    fake_agent({"GET_CONTAINERS": answer_containers, "READ_LOGS": group.read_logs})
    assert meso("logs", "web.b") == (0, "two\n", "bad\n")
    assert meso("logs", "web.b", "--stream", "stderr") == (0, "", "bad\n")
    assert sorted(meso("logs", "web").out.splitlines()) == ["a   │ one\x1b[2J", "b   │ two"]


def test_ages_are_short() -> None:
    assert [tables.age(seconds) for seconds in (0, 9.9, 42, 600, 7200, 90_000, 900_000)] == [
        "0.0 s", "9.9 s", "42 s", "10 min", "2 h", "25 h", "10 d",
    ]  # fmt: skip
