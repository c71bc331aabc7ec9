"""The agent is killed with -9 before and after every system call of its own: all runs or nothing is left, and no exit is lost.

The calls are counted by a tracer (every_call.py, wardens.py) while they are made, so what a new isolator or a new verb calls is
among them by itself. In `make test` some of each scenario's, at a distance that is coprime to their number; with
MESOCOSM_SOAK=1 all of them.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow]
Figure = Callable[..., None]
EveryCall = Callable[..., list[dict[str, Any]]]
# What may come of a kill at some call, and what does when nobody is killed.
OUTCOMES = {
    "start": {"serves"},
    "launch": {"nothing", "whole"},
    "three": {"nothing", "whole"},
    "refused": {"nothing"},
    "nested": {"nothing", "whole"},
    "kill": {"whole", "dead"},
    "end": {"dead"},
    "remove": {"dead", "forgotten"},
    "stop": {"whole", "stopped"},
    "recovery": {"recovered"},
}
VERBS = {"run": "3", "wait": "3", "logs": "0", "events": "130"}  # and the exit code of each
OF_THE_LAUNCHER = {scenario: OUTCOMES[scenario] for scenario in ("launch", "three", "refused", "nested", "kill", "end")}


@pytest.fixture
def every_call(world: Any, marks: Path, rounds: Callable[[int, int], int]) -> EveryCall:
    """``every_call(scenario, few)``: what came of each kill, of few in `make test` (and `always`); see every_call.py."""

    def run(scenario: str, few: int, *, always: bool = False) -> list[dict[str, Any]]:
        number = few if always else rounds(few, 0)
        seed = os.environ.get("MESOCOSM_SEED") or str(random.randrange(10**6) if number else 1)
        print(f"MESOCOSM_SEED={seed}")  # shown if it fails
        script = Path(__file__).with_name("every_call.py")
        words = [scenario, str(marks), str(number), seed]
        command = world.as_user(world.python, "-B", str(script), *words)
        done = subprocess.run(
            command, env=dict(world.environment), cwd="/", capture_output=True, text=True, timeout=7200, check=False
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def check(whole: dict[str, Any], results: list[dict[str, Any]], outcomes: set[str]) -> dict[str, Any]:
    """The same for every scenario; the figures."""
    wrong = [json.dumps(line) for line in (whole, *results) if line["problems"]]
    assert not wrong, "\n".join(wrong)
    seen = Counter(line["outcome"] for line in results)
    killed = [line for line in results if line["reached"]]
    assert seen.keys() <= outcomes
    assert 2 * len(killed) >= len(results)  # the last calls are not made every time
    unknown = sum(line.get("unknown", 0) for line in results)
    return {
        "calls": whole["calls"],
        "rounds": len(results),
        "killed": len(killed),
        "left": 0,
        "lost": 0,
        "unknown": unknown,
        **seen,
    }


@pytest.mark.parametrize("scenario", OUTCOMES)
def test_whichever_system_call_an_agent_is_killed_at_the_next_one_makes_it_harmless(
    every_call: EveryCall, scenario: str, figure: Figure, world: Any
) -> None:
    whole, *results = every_call(scenario, 3)

    figure(scenario=scenario, user=world.user, **check(whole, results, OUTCOMES[scenario]))


@pytest.mark.parametrize("scenario", OF_THE_LAUNCHER)
def test_whichever_system_call_the_launcher_is_killed_at_all_runs_or_nothing_is_left(
    every_call: EveryCall, scenario: str, figure: Figure, world: Any
) -> None:
    whole, *results = every_call(f"launcher:{scenario}", 2)

    figure(scenario=scenario, victim="launcher", user=world.user, **check(whole, results, OF_THE_LAUNCHER[scenario]))


@pytest.mark.parametrize("scenario", ["launch", "end"])
def test_whichever_system_call_the_launcher_is_killed_at_with_the_agent_all_runs_or_nothing_is_left(
    every_call: EveryCall, scenario: str, figure: Figure, world: Any
) -> None:
    whole, *results = every_call(f"both:{scenario}", 2)

    figure(scenario=scenario, victim="both", user=world.user, **check(whole, results, OF_THE_LAUNCHER[scenario]))


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_waits_gets_its_answer_whichever_call_the_agent_is_killed_at(
    every_call: EveryCall, verb: str, figure: Figure, world: Any
) -> None:
    whole, *results = every_call(f"client:{verb}", 2)

    figure(verb=verb, user=world.user, **check(whole, results, {VERBS[verb]}))


@pytest.mark.one_world
def test_a_recovery_that_tells_an_exit_of_what_runs_is_found_out(every_call: EveryCall) -> None:
    results = every_call("careless:nested", 3, always=True)

    problems = [problem for line in results for problem in line["problems"]]
    assert [problem for problem in problems if re.fullmatch("pod[.]h: [23] exited, committed 1", problem)], problems
