"""The table of methods, and what a request must look like."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesocosm.kernel.core.errors import FrameError, MesoError, SpecError, UnsupportedError
from mesocosm.kernel.wire import messages
from mesocosm.kernel.wire.messages import METHODS, STREAMED, find, parse, rooted, select
from mesocosm.kernel.wire.service import CALLS, RUNS

# A loaded machine is no reason to fail.
calm = settings(suppress_health_check=[HealthCheck.too_slow])
CONTRACT = {
    "GET_VERSION", "PING", "PLAN_GROUP", "LAUNCH_GROUP", "LAUNCH_NESTED_GROUP", "LAUNCH_CONTAINER", "WAIT_CONTAINER",
    "KILL_CONTAINER", "REMOVE_CONTAINER", "GET_CONTAINERS", "SUBSCRIBE_EVENTS", "READ_LOGS",
    "LAUNCH_NESTED_CONTAINER", "WAIT_NESTED_CONTAINER", "KILL_NESTED_CONTAINER", "REMOVE_NESTED_CONTAINER",
}  # fmt: skip


def test_every_promised_method_is_there_and_every_method_has_a_call() -> None:
    assert set(METHODS) >= CONTRACT
    assert set(METHODS) == set(CALLS) | {"PING", "GET_VERSION"}


def test_what_changes_the_world_goes_on_without_its_caller_and_only_that() -> None:
    for method in METHODS.values():
        assert (method.kind == "call") == (method.right == "write"), method.name


def test_an_unknown_method_is_unsupported() -> None:
    with pytest.raises(UnsupportedError):
        find("FORMAT_DISK")


@pytest.mark.parametrize(
    "message",
    [
        None, 7, "PING", [], {}, [0], [0, 1], [0, 1, "PING"], [0, 1, "PING", {}], [0, 1, "PING", [{}, {}]],
        [0, 1, "PING", [1]], [0, 1, "PING", [None]], [0, -1, "PING", [{}]], [0, 2**63, "PING", [{}]], [0, True, "PING", [{}]],
        [0, 1.0, "PING", [{}]], [0, "1", "PING", [{}]], [0, None, "PING", [{}]], [0, 1, b"PING", [{}]], [1, 1, None, {}],
        [3, 1, "PING", [{}]], [0.0, 1, "PING", [{}]], [False, 1, "PING", [{}]], [2.0, "PING", [{}]], [2, "PING"],
        [2, 1, "PING", [{}]], [0, 1, "PING", [{}], 5],
    ],
)  # fmt: skip
def test_what_is_not_a_request_is_not_taken_for_one(message: Any) -> None:
    with pytest.raises(FrameError):
        parse(message)


def test_no_parameters_are_no_map_or_an_empty_one() -> None:
    assert parse([0, 1, "PING", []]) == parse([0, 1, "PING", [{}]])


@pytest.mark.parametrize(
    ("method", "params", "path"),
    [
        ("PING", {"loud": True}, "$.loud"),
        ("PLAN_GROUP", {}, "$.group"),
        ("PLAN_GROUP", {"group": []}, "$.group"),
        ("LAUNCH_GROUP", {"group": {}, "stream": 1}, "$.stream"),
        ("LAUNCH_NESTED_GROUP", {"container_id": "web", "tasks": {}}, "$.tasks"),
        ("WAIT_CONTAINER", {}, "$.container_id"),
        ("WAIT_CONTAINER", {"container_id": 7}, "$.container_id"),
        ("KILL_CONTAINER", {"container_id": "web", "signal": True}, "$.signal"),
        ("KILL_CONTAINER", {"container_id": "web", "signal": 9.5}, "$.signal"),
        ("GET_CONTAINERS", {"all": 1}, "$.all"),
        ("SUBSCRIBE_EVENTS", {"since": -1}, "$.since"),
        ("SUBSCRIBE_EVENTS", {"since": 2**63}, "$.since"),
        ("READ_LOGS", {"container_id": "web", "stream": "stdlog"}, "$.stream"),
        ("READ_LOGS", {"container_id": "web", "offset": -1}, "$.offset"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_with_their_path(method: str, params: dict[str, Any], path: str) -> None:
    with pytest.raises(SpecError) as caught:
        select(METHODS[method], params)
    assert caught.value.fields["path"] == path


BAD_IDS = [
    "",
    "..",
    "/",
    "a/../b",
    "a/b",
    "x" * 256,
    "a\0b",
    "a\nb",
    "%s%n",
    "wеb",
    "a..b",
    ".a",
    "a.",
    "-a",
    "con:null",
    "a b",
    "١",
]


@pytest.mark.parametrize("container_id", BAD_IDS)
@pytest.mark.parametrize("method", sorted(name for name, m in METHODS.items() if issubclass(m.request, messages.Container)))
def test_ids_outside_the_one_grammar_are_refused_by_every_method(method: str, container_id: str) -> None:
    with pytest.raises(SpecError) as caught:
        select(METHODS[method], {"container_id": container_id, **({"command": "true"} if "LAUNCH" in method else {})})
    assert caught.value.fields["path"] == "$.container_id"


def test_a_streamed_launch_is_a_launch_that_is_answered_by_a_stream() -> None:
    method, _ = select(METHODS["LAUNCH_GROUP"], {"group": {}, "stream": True})
    assert (method.name, method.kind, method.right) == ("LAUNCH_GROUP", "stream", "write")
    assert select(METHODS["LAUNCH_GROUP"], {"group": {}})[0] is METHODS["LAUNCH_GROUP"]
    nested = {"container_id": "web", "tasks": []}
    assert select(METHODS["LAUNCH_NESTED_GROUP"], {**nested, "stream": True})[0].kind == "stream"
    assert select(METHODS["LAUNCH_NESTED_GROUP"], nested)[0] is METHODS["LAUNCH_NESTED_GROUP"]
    assert set(RUNS) == set(STREAMED)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("$[3][0].group.tasks[0].resources.memory", "$.tasks[0].resources.memory"),
        ("$[3][0].tasks[2].name", "$.tasks[2].name"),
        ("$[3][0].group", "$.group"),
        ("$[3][0].groups.x", "$.groups.x"),
        ("$.name", "$.name"),
        ("$[1]", "$[1]"),
    ],
)
def test_paths_start_at_the_pod_or_at_the_parameters(before: str, after: str) -> None:
    assert rooted(SpecError("no", path=before)).fields["path"] == after


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3), max_leaves=6
)


@calm
@given(st.sampled_from(sorted(METHODS)), st.dictionaries(st.sampled_from(["container_id", "group", "all", "since", "x"]), plain))
def test_any_parameters_are_taken_or_refused_with_an_error_of_ours(method: str, params: dict[str, Any]) -> None:
    refused: MesoError | None = None
    try:
        select(METHODS[method], params)
    except MesoError as error:
        refused = error
    assert refused is None or (refused.code == "bad_input" and refused.fields["path"].startswith("$"))
