"""Whatever fails of a launch, wherever: no program ran, nothing is left, others go on, and the error says what it was.

The faults are counted from the plan and from what happens (every_fault.py), so a new isolator's effects and steps are among
them by themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.linux.constants import SYS

pytestmark = [pytest.mark.system, pytest.mark.slow]
Figure = Callable[..., None]
EveryFault = Callable[..., list[dict[str, Any]]]
ASKED = ("effect", "member")  # before anything is called: there is no errno


def task(name: str, marks: Path) -> dict[str, Any]:
    """A program that leaves its name."""
    volumes = [{"source": f"host:{marks}", "target": "/marks"}, {"source": "shared:data", "target": "/data"}]
    return {"name": name, "command": ["/usr/bin/touch", f"/marks/{name}"], "volumes": volumes}


def pod(names: str, marks: Path) -> dict[str, Any]:
    """A pod of such programs."""
    return {"name": "pod", "tasks": [task(name, marks) for name in names]}


def kind_of(line: dict[str, Any]) -> str:
    """Which kind of fault it was."""
    return str(line["fault"].partition(":")[0])


def check_verb(line: dict[str, Any]) -> None:
    """The end is told as it was, the output is whole, and what fails is told with its call and not as something else."""
    number, _, path = line["call"]
    assert line["left"] == [], line
    assert line["canary"], line
    verb = kind_of(line).removeprefix("call-")
    if line["error"] is not None:
        assert verb == "logs", line
        assert (line["error"]["errno"], line["error"]["target"], line["error"]["code"]) == (number, path, "conflict"), line
        assert line["error"]["hint"], line
    if verb == "remove":
        assert line["told"] is None, line
        return
    assert line["said"] == "hello\n", line
    assert (line["end"]["exit"], line["end"]["reason"]) == (7, "exited" if verb == "end" else "killed"), line
    assert line["told"] == ((None if line["error"] else "hello\n") if verb == "logs" else line["end"]), line


def check(results: list[dict[str, Any]], names: str) -> None:
    """The same for every fault; only what fails behind the barrier has let the others begin."""
    for line in results:
        assert line["left"] == [], line
        assert line["canary"], line
        error = line["error"]
        if kind_of(line) == "kill":
            check_killed(line, names)
        elif kind_of(line) == "call" and line["launched"]:  # after the launch: nobody's business but the agent's
            assert error is None, line
            assert line["ran"] == list(names), line
        elif line["maybe"] and error is None:
            assert line["ran"] == list(names), line
        else:
            check_failed(line)


def check_killed(line: dict[str, Any], names: str) -> None:
    """Before the barrier nothing ran; behind it everything that had begun was ended."""
    if not line["launched"]:
        assert line["ran"] == [], line
        assert line["error"]["message"] == "killed during the launch", line
    assert set(line["ran"]) <= set(names), line


def check_failed(line: dict[str, Any]) -> None:
    """The error says all there is to say, and nothing ran."""
    error = line["error"]
    assert error is not None, line
    assert error["hint"], line
    assert error["id"], line
    if kind_of(line) == "member":
        assert error["code"] == "launch_failed", line
    else:
        assert error["plugin"], line
        assert error["step"]["kind"], line
    if kind_of(line) not in ASKED:
        assert error["errno"] == (line["call"][0] if kind_of(line) == "call" else "ENOSYS"), line
        assert error["syscall"] in SYS or error["syscall"] in ("open", "mkdir", "chmod", "chown"), line
    if kind_of(line) == "call":
        assert error["target"], line
    if error["code"] == "exec_failed":
        assert line["launched"], line
    else:
        assert error["code"] == "launch_failed", line
        assert not line["launched"], line
        assert line["ran"] == [], line


@pytest.fixture
def errors(rounds: Callable[[int, int], int]) -> str:
    """Which errors calls of the agent's own fail with: one of five in its turn, or, in the long run, every one."""
    return "errors" if rounds(0, 1) else "turns"


@pytest.mark.parametrize("names", ["a", "abc"])
def test_whatever_fails_of_a_pod_nothing_of_it_has_run_and_nothing_is_left(
    every_fault: EveryFault, marks: Path, names: str, figure: Figure, errors: str
) -> None:
    results = every_fault(f"effect,member,step,call,{errors}", pod(names, marks))

    check(results, names)
    counted = Counter(map(kind_of, results))
    figure(members=len(names), left=0, **counted)
    assert counted["step"] > 15 * len(names)
    assert counted["member"] == 1 + len(names)
    assert counted["call"] > len(names)
    assert len({line["call"][0] for line in results if kind_of(line) == "call"}) == 5


def test_whatever_call_of_the_agents_own_fails_an_end_is_told_and_nothing_is_left_for_good(
    every_fault: EveryFault, marks: Path, figure: Figure, errors: str
) -> None:
    results = every_fault(f"call-kill,call-end,call-remove,call-logs,{errors}", pod("a", marks))

    for line in results:
        check_verb(line)
    counted = Counter(map(kind_of, results))
    figure(left=0, ends_lost=0, **counted)
    assert counted["call-remove"] > 5
    assert counted["call-kill"] == counted["call-end"], "an ordinary user's container may have nothing that goes with its end"
    assert any(line["error"] for line in results), "the control: what cannot be hidden is told"
    assert len({line["call"][0] for line in results}) == 5


def test_whatever_fails_of_a_nested_group_its_parent_goes_on(
    every_fault: EveryFault, marks: Path, figure: Figure, errors: str
) -> None:
    home = {"name": "home", "command": ["sleep", "1000"], "volumes": task("x", marks)["volumes"]}

    results = every_fault(
        f"effect,member,step,call,kill,{errors}", {"name": "outer", "tasks": [home]}, [task("a", marks), task("b", marks)]
    )

    check(results, "ab")
    counted = Counter(map(kind_of, results))
    figure(members="nested 2", left=0, **counted)
    assert counted["step"] > 30
    assert counted["kill"] > 5


def test_whichever_system_call_of_a_table_fails_it_is_named(every_fault: EveryFault, marks: Path, figure: Figure) -> None:
    results = every_fault("row", pod("a", marks))

    check(results, "a")
    figure(rows=len(results), left=0)
    assert len(results) > 50


def test_a_pod_that_is_killed_at_any_of_its_moments_is_gone(every_fault: EveryFault, marks: Path, figure: Figure) -> None:
    results = every_fault("kill", pod("ab", marks))

    check(results, "ab")
    figure(kills=len(results), left=0)
    assert any(line["launched"] for line in results)
    assert sum(not line["launched"] for line in results) > 5


def test_whatever_fails_of_a_pod_of_ten_nothing_of_it_has_run(
    every_fault: EveryFault, marks: Path, rounds: Callable[[int, int], int], figure: Figure
) -> None:
    kinds = "effect,member" if rounds(0, 1) == 0 else "effect,member,step,call,kill,errors"

    results = every_fault(kinds, pod("abcdefghij", marks))

    check(results, "abcdefghij")
    counted = Counter(map(kind_of, results))
    figure(members=10, left=0, **counted)
    assert counted["member"] == 11
