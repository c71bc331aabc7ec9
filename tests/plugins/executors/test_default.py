"""What one member's end means for the others."""

from __future__ import annotations

from typing import Any

import pytest

from mesocosm.kernel.contracts import GroupView, Wait
from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.core.spec import parse_pod
from mesocosm.plugins.executors import command, default

POD = {
    "name": "web",
    "tasks": [
        {
            "name": "a",
            "command": ["a"],
            "tasks": [{"name": "x", "command": ["x"]}, {"name": "y", "command": ["y"], "essential": False}],
        },
        {"name": "b", "command": ["b"]},
        {
            "name": "c",
            "command": ["c"],
            "essential": False,
            "tasks": [{"name": "z", "command": ["z"]}, {"name": "w", "command": ["w"]}],
        },
    ],
}
MEMBERS = tuple(default.executor().arrange(parse_pod(POD)))


def react(*ended: Wait, killed: frozenset[str] = frozenset()):
    view = GroupView("web", MEMBERS, {wait.id: wait for wait in ended}, killed)
    return [(kill.id, kill.blame) for kill in default.executor().react(view, ended[-1].id)]


def test_a_pod_is_a_container_that_waits_and_one_for_each_task_parents_first():
    assert [member.id for member in MEMBERS] == ["web", "web.a", "web.a.x", "web.a.y", "web.b", "web.c", "web.c.z", "web.c.w"]
    assert MEMBERS[0].is_pause
    assert not any(member.is_pause for member in MEMBERS[1:])
    assert MEMBERS[2].path == "$.tasks[0].tasks[0]"


@pytest.mark.parametrize("wait", [Wait("web.b", exit=1), Wait("web.b", signal=9), Wait("web.b", reason="unknown")])
def test_an_essential_member_that_fails_ends_all_others_but_the_pod_comes_last(wait):
    assert react(wait) == [("web.a", "web.b"), ("web.c", "web.b")]


def test_a_member_that_finishes_ends_nothing():
    assert react(Wait("web.b", exit=0)) == []


def test_a_member_that_is_not_essential_may_fail():
    assert react(Wait("web.c", exit=1)) == []
    assert react(Wait("web.a.y", exit=1)) == []


def test_a_nested_member_that_fails_has_failed_its_parent_and_so_the_group():
    assert react(Wait("web.a.x", exit=1)) == [("web.a", "web.a.x"), ("web.b", "web.a.x"), ("web.c", "web.a.x")]


def test_a_failure_stops_where_nobody_needs_the_parent():
    assert react(Wait("web.c.z", exit=1)) == [("web.c", "web.c.z")]


def test_the_pod_goes_when_every_task_has():
    ended = [Wait(member.id, exit=0) for member in MEMBERS[1:]]
    assert react(*ended) == [("web", None)]
    assert react(*ended[:-1]) == []


def test_the_last_members_failure_is_the_pods_too():
    only = tuple(default.executor().arrange(parse_pod({"name": "p", "tasks": [{"name": "t", "command": ["t"]}]})))

    def last(wait: Wait, members=only, **others: Wait):
        view = GroupView("p", members, {**others, wait.id: wait}, frozenset())
        return [(kill.id, kill.blame) for kill in default.executor().react(view, wait.id)]

    assert last(Wait("p.t", exit=7)) == [("p", "p.t")]
    assert last(Wait("p.t", exit=0)) == [("p", None)]
    assert last(Wait("p.t", exit=1, reason="group")) == [("p", None)]
    ended = [Wait(member.id, exit=0) for member in MEMBERS[1:-2]]
    assert react(*ended, Wait("web.c.w", exit=0), Wait("web.c.z", exit=1)) == [("web", None)]  # web.c is not essential


JOB = {"name": "job", "command": ["job"]}
SERVER = {"name": "server", "command": ["server"], "sidecar": True, "tasks": [{"name": "log", "command": ["log"], "sidecar": True}]}


def react_with_sidecars(tasks: list[dict[str, Any]], *ended: Wait, killed: frozenset[str] = frozenset()):
    members = tuple(default.executor().arrange(parse_pod({"name": "p", "tasks": tasks})))
    view = GroupView("p", members, {wait.id: wait for wait in ended}, killed)
    return [(kill.id, kill.blame) for kill in default.executor().react(view, ended[-1].id)]


@pytest.mark.parametrize(("wait", "blame"), [(Wait("p.job", exit=0), None), (Wait("p.job", exit=1), "p.job")])
def test_the_pod_goes_when_only_sidecars_are_left(wait, blame):
    assert react_with_sidecars([JOB, SERVER], wait) == [("p", blame)]


def test_sidecars_stay_as_long_as_anybody_whom_they_serve():
    assert react_with_sidecars([JOB, {**JOB, "name": "other"}, SERVER], Wait("p.job", exit=0)) == []
    nested = [{**SERVER, "tasks": [JOB]}, {**JOB, "name": "other"}]
    assert react_with_sidecars(nested, Wait("p.other", exit=0)) == []


def test_a_sidecar_that_finishes_early_ends_nothing_and_one_that_fails_is_a_member_that_fails():
    assert react_with_sidecars([JOB, SERVER], Wait("p.server", exit=0)) == []
    assert react_with_sidecars([JOB, SERVER], Wait("p.server", exit=1)) == [("p.job", "p.server")]
    assert react_with_sidecars([JOB, {**SERVER, "essential": False}], Wait("p.server", exit=1)) == []


def test_sidecars_that_have_been_asked_to_end_decide_nothing_more():
    killed = frozenset({"p", "p.server", "p.server.log"})
    late = Wait("p.server.log", signal=15, reason="group")
    assert react_with_sidecars([JOB, SERVER], Wait("p.job", exit=0), late, killed=killed) == []


def test_a_sidecar_that_fails_is_blamed_although_those_nested_in_it_die_first():
    nested = [{**SERVER, "tasks": [JOB]}]
    died_with_it = Wait("p.server.job", signal=9, reason="parent")

    assert react_with_sidecars(nested, died_with_it) == []
    assert react_with_sidecars(nested, died_with_it, Wait("p.server", signal=9)) == [("p", "p.server")]
    assert react_with_sidecars(nested, Wait("p.server", signal=9), died_with_it, killed=frozenset({"p"})) == []


def test_a_pod_of_nothing_but_sidecars_goes_when_all_of_them_have():
    ended = [Wait("p.server.log", exit=0), Wait("p.server", exit=0)]
    assert react_with_sidecars([SERVER], ended[0]) == []
    assert react_with_sidecars([SERVER], *ended) == [("p", None)]


def test_members_that_are_ended_decide_nothing_more():
    killed = frozenset({"web.a", "web.a.x", "web.a.y", "web.c", "web.c.z", "web.c.w"})
    assert react(Wait("web.b", exit=1), Wait("web.a", signal=15, reason="group"), killed=killed) == []


def test_with_the_pods_own_container_nothing_is_left_to_say():
    assert react(Wait("web", signal=9)) == []


def test_the_command_executor_runs_one_program_named_like_the_group():
    (only,) = command.executor().arrange(parse_pod({"name": "one", "tasks": [{"name": "main", "command": ["true"]}]}))
    assert (only.id, only.parent, only.is_pause, only.path) == ("one", None, False, "$.tasks[0]")


@pytest.mark.parametrize(
    ("document", "path"),
    [
        (POD, "$.tasks"),
        ({"name": "one", "tasks": POD["tasks"][:1]}, "$.tasks[0].tasks"),
        ({"name": "one", "tasks": POD["tasks"][1:2], "resources": {"pids": 5}}, "$.resources"),
    ],
)
def test_the_command_executor_refuses_what_it_would_have_to_ignore(document, path):
    with pytest.raises(SpecError) as caught:
        command.executor().arrange(parse_pod(document))
    assert caught.value.fields["path"] == path


def test_the_blame_is_not_lost_when_only_what_is_nested_in_the_failed_one_is_left():
    pod = {"name": "nx", "tasks": [{"name": "p", "command": ["p"], "tasks": [{"name": "c", "command": ["c"]}]}]}
    members = tuple(default.executor().arrange(parse_pod(pod)))
    view = GroupView("nx", members, {"nx.p": Wait("nx.p", exit=7, reason="exited")}, frozenset())

    assert [(kill.id, kill.blame) for kill in default.executor().react(view, "nx.p")] == [("nx", "nx.p")]
