"""The chain of causes: in order, each thing once, down to what to do."""

from __future__ import annotations

from typing import Any

import pytest

from mesocosm.kernel.runtime import chain

ERROR = {
    "code": "launch_failed", "message": "mount of /x failed: no such file or directory", "id": "web.b", "plugin": "volumes",
    "step": {"index": 4, "stage": "mount", "kind": "bind"}, "syscall": "mount", "errno": "ENOENT", "target": "/x",
    "have": "9 of 9", "need": "one more", "hint": "create it first",
}  # fmt: skip


def record(container_id: str, wait: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"id": "web", "state": "DEAD", "blame": None, "error": None, **more.pop("group", {})}
    state = "RUNNING" if wait is None else "DEAD"
    return {"id": container_id, "state": state, "wait": wait, "own_error": None, "reason": None, "group": group, **more}


def kinds(links: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(link["kind"], link["id"]) for link in links]


def test_one_that_ended_with_its_group_leads_to_the_member_that_decided() -> None:
    known = {
        "web.a": record("web.a", {"reason": "group", "signal": 15}, group={"blame": "web.b"}),
        "web.b": record("web.b", {"reason": "exited", "exit": 3}, group={"blame": "web.b"}),
    }

    links = chain.make(known["web.a"], known.get)

    assert kinds(links) == [("state", "web.a"), ("end", "web.a"), ("state", "web.b"), ("end", "web.b"), ("advice", "web.b")]
    assert "because web.b had ended" in links[1]["says"]
    assert "exit code 3" in links[3]["says"]


def test_one_that_ended_with_its_parent_leads_up_to_whoever_began() -> None:
    known = {
        "web": record("web", {"reason": "killed", "signal": 9}),
        "web.a": record("web.a", {"reason": "parent", "signal": 9}),
        "web.a.x": record("web.a.x", {"reason": "parent", "signal": 9}),
    }

    links = chain.make(known["web.a.x"], known.get)

    assert [link["id"] for link in links if link["kind"] == "state"] == ["web.a.x", "web.a", "web"]
    assert "somebody asked" in links[-1]["says"]


def test_an_error_is_one_link_for_each_thing_that_is_known_and_nothing_is_said_twice() -> None:
    rolled_back = record(
        "web.a", {"reason": "rolled_back", "message": ERROR["message"]}, group={"state": "ROLLED_BACK", "error": ERROR}
    )

    links = chain.make(rolled_back, lambda _: None)

    assert [link["kind"] for link in links] == ["state", "end", "error", "place", "kernel", "limit", "advice"]
    assert len({link["says"] for link in links}) == len(links)
    assert sum(ERROR["message"] in link["says"] for link in links) == 1
    assert links[2]["error"] == ERROR
    assert links[-1]["says"] == "create it first"


def test_records_that_point_at_each_other_come_to_an_end() -> None:
    known = {
        name: record(name, {"reason": "group", "signal": 9}, group={"blame": other}) for name, other in (("a", "b"), ("b", "a"))
    }

    assert [link["id"] for link in chain.make(known["a"], known.get) if link["kind"] == "state"] == ["a", "b"]


def test_who_died_of_memory_is_told_whose_limit_it_was_and_what_to_do() -> None:
    wait = {
        "reason": "memory",
        "signal": 9,
        "oom": True,
        "limit": "memory",
        "message": "killed at the memory limit of web.a, 24 MiB",
    }

    links = chain.make(record("web.a.x", wait), lambda _: None)

    assert [link["kind"] for link in links] == ["state", "end", "limit", "advice"]
    assert links[2]["says"] == wait["message"]


def test_the_living_have_no_cause_but_an_order_to_end() -> None:
    assert [link["kind"] for link in chain.make(record("web.a"), lambda _: None)] == ["state"]
    ordered = chain.make(record("web.a", reason="killed"), lambda _: None)
    assert [link["kind"] for link in ordered] == ["state", "end"]


WAITS: list[dict[str, Any]] = [
    {"reason": reason, "exit": code, "signal": number}
    for reason in ("exited", "signaled", "killed", "group", "parent", "memory", "rolled_back", "unknown", "rebooted", "odd", None)
    for code, number in ((0, None), (3, None), (127, None), (None, 9), (None, 11), (None, 40), (None, None))
]


@pytest.mark.parametrize("wait", WAITS, ids=str)
@pytest.mark.parametrize("error", [None, ERROR, {"code": "internal", "message": "m"}])
def test_every_end_has_words_and_none_is_said_twice(wait: dict[str, Any], error: dict[str, Any] | None) -> None:
    links = chain.make(record("web.a", wait, own_error=error, group={"error": error}), lambda _: None)

    assert [link["kind"] for link in links][:2] == ["state", "end"]
    assert all(link["says"].strip() and "None" not in link["says"] and "{" not in link["says"] for link in links)
    assert len({link["says"] for link in links}) == len(links)
    assert sum(link["kind"] == "advice" for link in links) <= 1
