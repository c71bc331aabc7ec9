"""Mutated frames find nothing; and what they would find is shown with bugs that are put (back) in for the purpose."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.core.errors import NotFoundError
from mesocosm.kernel.testing.simulated import SimulatedMachine
from mesocosm.kernel.wire import connection

HERE = Path(__file__).parent


def test_no_frame_is_answered_but_as_the_manual_says(
    figure: Callable[..., None], rounds: Callable[[int, int], int], tmp_path: Path
) -> None:
    """By coverage where atheris is installed, blindly where it is not; the figures say which."""
    command = [sys.executable, str(HERE / "frames.py"), "--frames", str(rounds(2000, 1_000_000)), "--findings", str(tmp_path)]

    run = subprocess.run(command, capture_output=True, text=True, timeout=7200, check=False)

    assert run.stdout, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    figure(**told)
    assert told["finding"] is None, told
    assert run.returncode == 0


@pytest.fixture(name="fuzz")
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``fuzz("mutation")``: a module from beside this file, which is no package."""
    monkeypatch.syspath_prepend(str(HERE))
    yield importlib.import_module
    for name in ("mutation", "simulated_world"):
        sys.modules.pop(name, None)


def first_finding(fuzz: Any, inputs: int) -> str | None:
    """What the first few inputs of the blind engine find."""
    mutation, simulated = fuzz("mutation"), fuzz("simulated_world")
    seeds = mutation.corpus()
    mutator = mutation.Mutator(1, seeds)
    with simulated.SimulatedWorld() as world:
        for sent in [*seeds, *(mutator.fresh() for _ in range(inputs))]:
            try:
                world.converse(sent)
            except Exception as error:
                return "".join(traceback.format_exception(error))
    return None


def test_an_exception_that_escapes_is_found(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(self: Any, parsed: Any) -> None:  # as it once was: an id of a type that has no hash went through
        self._lasting.get(parsed.params.get("id", -1))

    monkeypatch.setattr(connection.Connection, "_notified", cancel)

    assert "unhashable" in str(first_finding(fuzz, 1500))


def test_an_internal_error_is_found(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_known(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(NotFoundError, "__init__", not_known)

    assert "'code': 'internal'" in str(first_finding(fuzz, 200))


def test_something_done_for_a_frame_that_is_refused_is_found(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SimulatedMachine] = []
    original = SimulatedMachine.__init__

    def remembered(self: SimulatedMachine) -> None:
        original(self)
        made.append(self)

    def careless(self: Any, number: int, error: Any) -> Any:
        made[-1].make("thing", "a leak")
        return refuse(self, number, error)

    refuse = connection.Connection._refuse
    monkeypatch.setattr(SimulatedMachine, "__init__", remembered)
    monkeypatch.setattr(connection.Connection, "_refuse", careless)

    assert "nothing was to be done" in str(first_finding(fuzz, 200))


def test_without_a_bug_the_same_inputs_find_nothing(fuzz: Any) -> None:
    assert first_finding(fuzz, 200) is None
