"""The agent is killed with -9 before and after every system call of its own: all runs or nothing is left, and no exit is lost.

The calls are counted by a tracer (every_call.py, wardens.py) while they are made, so what a new isolator or a new verb calls is
among them by itself. In `make test` some of each scenario's, at a distance that is coprime to their number; with
MESOCOSM_SOAK=1 all of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.slow]
Figure = Callable[..., None]
# What may come of a kill at some call, and what does when nobody is killed.
OUTCOMES = {
    "start": {"serves"},
    "launch": {"nothing", "whole"},
    "three": {"nothing", "whole"},
    "nested": {"nothing", "whole"},
    "kill": {"whole", "dead"},
    "end": {"dead"},
    "remove": {"dead", "forgotten"},
    "stop": {"whole", "stopped"},
    "recovery": {"recovered"},
}


@pytest.fixture
def every_call(world: Any, marks: Path, rounds: Callable[[int, int], int]) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """``every_call(scenario)``: what came of each kill; see every_call.py."""

    def run(scenario: str, few: int) -> list[dict[str, Any]]:
        seed = os.environ.get("MESOCOSM_SEED") or str(random.randrange(10**6))
        print(f"MESOCOSM_SEED={seed}")  # shown if it fails
        script = Path(__file__).with_name("every_call.py")
        words = [scenario, str(marks), str(rounds(few, 0)), seed]
        command = world.as_user(world.python, "-B", str(script), *words)
        done = subprocess.run(
            command, env=dict(world.environment), cwd="/", capture_output=True, text=True, timeout=7200, check=False
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.mark.parametrize("scenario", OUTCOMES)
def test_whichever_system_call_an_agent_is_killed_at_the_next_one_makes_it_harmless(
    every_call: Callable[..., list[dict[str, Any]]], scenario: str, figure: Figure, world: Any
) -> None:
    whole, *results = every_call(scenario, 5)

    assert whole["problems"] == []
    assert [line for line in results if line["problems"]] == []
    seen = Counter(line["outcome"] for line in results)
    killed = [line for line in results if line["reached"]]
    figure(
        scenario=scenario, user=world.user, calls=whole["calls"], rounds=len(results), killed=len(killed), left=0, lost=0, **seen
    )
    assert seen.keys() <= OUTCOMES[scenario]
    assert len(killed) > len(results) / 2
    assert {line["after"] for line in killed} == {False, True}
