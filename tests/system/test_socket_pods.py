"""Pods as a weapon: as many, as deep and as long as a frame can hold. What cannot be launched is refused beforehand."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.one_world]

STRING = 128 * 1024  # MAX_ARG_STRLEN, execve(2): the longest string of argv or environment, with its NUL


def tasks(count: int) -> list[dict[str, Any]]:
    return [{"name": f"t{number}", "command": "true"} for number in range(count)]


def deep(levels: int) -> list[dict[str, Any]]:
    found = tasks(1)
    for _ in range(levels - 1):
        found = [{"name": "t", "command": "true", "tasks": found}]
    return found


def test_ten_thousand_containers_in_one_frame_are_too_many_values(siege: Any, dial: Any) -> None:
    compact = {"name": "many", "tasks": [{"name": f"{number}", "command": "x"} for number in range(10_000)]}
    assert len(dial.framed(compact)) < 256 * 1024
    with siege(), dial() as peer:
        peer.send([0, 1, "LAUNCH_GROUP", [{"group": compact}]])
        assert [message[2]["code"] for message in peer.told()] == ["too_large"]


def test_a_thousand_and_one_tasks_are_one_too_many_and_so_are_they_below_a_container(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        for error in (
            peer.refused("LAUNCH_GROUP", group={"name": "many", "tasks": tasks(1001)}),
            peer.refused("LAUNCH_NESTED_GROUP", container_id="canary", tasks=tasks(1001)),
        ):
            assert (error["code"], error["path"], error["have"], error["need"]) == ("bad_input", "$.tasks", "1001", "≤ 1000")


def test_the_last_task_of_the_largest_pod_is_looked_at_before_the_first_is_made(siege: Any, dial: Any) -> None:
    whole = {"name": "many", "tasks": [*tasks(999), {"name": "last", "command": "true", "capabilities": ["SYS_GOD"]}]}
    with siege() as allowed, dial() as peer:
        allowed.memory = 64 * 1024
        error = peer.refused("LAUNCH_GROUP", group=whole)
        assert (error["code"], error["path"]) == ("bad_input", "$.tasks[999].capabilities[0]")


def test_a_pod_is_as_deep_as_a_message_may_be_and_no_deeper(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        assert peer.ask("PLAN_GROUP", group={"name": "deep", "tasks": deep(14)})[2] is None
        peer.send([0, 2, "PLAN_GROUP", [{"group": {"name": "deep", "tasks": deep(15)}}]])
        assert [message[2]["code"] for message in peer.told()] == ["too_large"]


def test_a_tree_grown_level_by_level_ends_at_the_thirty_second(siege: Any, dial: Any) -> None:
    """The kernel counts as well, from its own first PID namespace: an agent that lives in one below that has fewer levels."""
    sleeper = {"name": "t", "command": ["sleep", "1000"]}
    with siege() as allowed, dial() as peer:
        allowed.memory = 24 * 1024
        assert peer.ask("LAUNCH_GROUP", group={"name": "t", "tasks": [sleeper]})[2] is None
        names = ["t", "t"]
        while (error := peer.ask("LAUNCH_NESTED_GROUP", container_id=".".join(names), tasks=[sleeper])[2]) is None:
            names.append("t")
        living = [line["id"] for line in peer.ask("GET_CONTAINERS")[3]["containers"]]
        assert [each for each in living if each.startswith("t")] == [".".join(names[:depth]) for depth in range(1, len(names) + 1)]
        if len(names) == 32:
            assert (error["code"], error["have"], error["need"]) == ("bad_input", "33", "≤ 32 levels")
        else:
            assert (error["code"], error["errno"], len(names) > 24) == ("launch_failed", "ENOSPC", True)
        peer.ask("KILL_CONTAINER", container_id="t", signal="KILL")
        peer.ask("WAIT_CONTAINER", container_id="t")
        assert peer.ask("REMOVE_CONTAINER", container_id="t")[2] is None


def test_a_container_cannot_be_its_own_parent_nor_live_in_one_that_is_not_there(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        for container_id in ("a.a", "canary.nobody.a", "canary.bird.canary.bird"):
            assert peer.refused("LAUNCH_CONTAINER", container_id=container_id, command="true")["code"] == "not_found"
        twice = [{"name": "t", "command": "true", "tasks": [{"name": "u", "command": "true"}]}] * 2
        assert peer.refused("LAUNCH_GROUP", group={"name": "twice", "tasks": twice})["path"] == "$.tasks[1].name"
        assert peer.refused("LAUNCH_GROUP", group={"name": "canary", "tasks": tasks(1)})["code"] == "conflict"


def test_a_string_that_execve_does_not_take_is_refused_and_the_longest_that_it_takes_runs(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        for task, path in (
            ({"command": ["true", "x" * STRING]}, "$.tasks[0].command"),
            ({"env": {"A": "x" * (STRING - 2)}}, "$.tasks[0].env.A"),
        ):
            error = peer.refused("LAUNCH_GROUP", group={"name": "long", "tasks": [{"name": "t", "command": "true"} | task]})
            assert (error["code"], error["path"], error["have"]) == ("bad_input", path, str(STRING + 1))
        whole = {
            "name": "t",
            "command": ["sh", "-c", "echo $(( ${#1} + ${#A} ))", "sh", "x" * (STRING - 1)],
            "env": {"A": "x" * 100_000},
        }
        assert peer.ask("LAUNCH_GROUP", group={"name": "long", "tasks": [whole]})[2] is None
        assert peer.ask("WAIT_CONTAINER", container_id="long.t")[3]["exit"] == 0
        peer.ask("WAIT_CONTAINER", container_id="long")
        assert peer.ask("REMOVE_CONTAINER", container_id="long")[2] is None


def test_two_megabytes_of_arguments_do_not_fit_into_a_frame(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        huge = {"name": "t", "command": ["true", *["x" * 100_000] * 20]}
        peer.sock.sendall(dial.framed([0, 1, "LAUNCH_GROUP", [{"group": {"name": "huge", "tasks": [huge]}}]])[:8])
        assert [message[2]["code"] for message in peer.told()] == ["too_large"]


def test_arguments_that_a_small_stack_has_no_room_for_are_refused_before_anything_is_made(siege: Any, dial: Any) -> None:
    """execve(2) gives argv and environment a quarter of the stack limit, at least 128 KiB."""
    task = {"name": "t", "command": ["true", *["x" * 1000] * 200], "limits": {"stack": "64KiB"}}
    with siege(), dial() as peer:
        error = peer.refused("LAUNCH_GROUP", group={"name": "tight", "tasks": [task]})
        assert (error["code"], error["path"], error["plugin"]) == ("bad_input", "$.tasks[0].command", "program")
        roomy = task | {"limits": {"stack": "1MiB"}}
        assert peer.ask("LAUNCH_GROUP", group={"name": "tight", "tasks": [roomy]})[2] is None
        assert peer.ask("WAIT_CONTAINER", container_id="tight.t")[3]["exit"] == 0
        peer.ask("WAIT_CONTAINER", container_id="tight")
        assert peer.ask("REMOVE_CONTAINER", container_id="tight")[2] is None
