"""The soak's model: the same operations for the same seed, the rules of the executor, and findings where something is wrong."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(name="model")
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """tests/soak/model.py, which is in no package."""
    monkeypatch.syspath_prepend(str(HERE))
    yield importlib.import_module("model")
    sys.modules.pop("model", None)


def chosen(model: Any, seed: int, count: int) -> list[str]:
    """The first operations of a seed."""
    rng, made, said = random.Random(seed), model.Model({"limits"}), []
    for _ in range(count):
        operation = made.choose(rng)
        made.done(operation)
        said.append(str(operation))
    return said


def test_a_seed_is_a_list_of_operations(model: Any) -> None:
    assert chosen(model, 1, 500) == chosen(model, 1, 500)
    assert chosen(model, 1, 500) != chosen(model, 2, 500)


def test_every_kind_of_operation_is_chosen_and_nobody_waits_for_one(model: Any) -> None:
    kinds = {words.split()[0] for seed in range(3) for words in chosen(model, seed, 2000)}

    assert kinds >= {
        "launch", "single", "nested", "end", "kill", "signal", "wait", "remove", "agent_dies", "agent_stops", "launch_and_die",
        "launch_and_leave", "launch_and_kill", "quiet",
    }  # fmt: skip


def launched(model: Any, *tasks: Any) -> Any:
    """A model with one pod in it."""
    made = model.Model()
    made.done(model.Operation("launch", "s0", tasks))
    return made


def living(made: Any) -> set[str]:
    """Who has to live."""
    return {box.id for box in made.boxes.values() if box.lives}


def test_a_failure_ends_the_group_and_one_that_is_not_essential_does_not(model: Any) -> None:
    task = model.Task
    made = launched(model, task("a", essential=False), task("b"), task("c"))
    made.done(model.Operation("end", "s0.a", number=4))
    assert living(made) == {"s0", "s0.b", "s0.c"}
    made.done(model.Operation("end", "s0.b", number=4))
    assert living(made) == set()


def test_when_only_sidecars_are_left_they_end(model: Any) -> None:
    made = launched(model, model.Task("a"), model.Task("b", sidecar=True))
    made.done(model.Operation("end", "s0.a"))
    assert living(made) == set()


def line(container_id: str, state: str = "RUNNING", *, pid: int = 7, wait: Any = None) -> dict[str, Any]:
    """One of `ps`."""
    return {"id": container_id, "state": state, "pid": pid, "wait": wait}


def ended(container_id: str, exit_code: int | None, signal: int | None, reason: str) -> dict[str, Any]:
    """A WAIT."""
    return {"id": container_id, "status": 0, "exit": exit_code, "signal": signal, "reason": reason, "oom": False}


def test_whatever_is_wrong_is_a_finding(model: Any) -> None:
    made = launched(model, model.Task("a"), model.Task("b", essential=False))
    good = {found: line(found) for found in ("s0", "s0.a", "s0.b")}
    assert list(made.findings(good)) == []

    assert "is not there" in next(made.findings({found: good[found] for found in ("s0", "s0.a")}))
    assert "should not be there" in next(made.findings({**good, "s1": line("s1")}))
    assert "was process 7 and is 8" in next(made.findings({**good, "s0.a": line("s0.a", pid=8)}))
    dead = line("s0.b", "DEAD", wait=ended("s0.b", 0, None, "exited"))
    assert "nothing has ended it" in next(made.findings({**good, "s0.b": dead}))

    made.done(model.Operation("kill", "s0.b"))
    made.boxes["s0.a"].pid = 7
    assert "ended as" in next(made.findings({**good, "s0.b": dead}))
    assert "should be dead" in next(made.findings(good))


def test_events_with_a_gap_or_an_end_that_comes_twice_are_findings(model: Any) -> None:
    told = model.Told()
    for seq, kind in ((1, "exited"), (2, "dead"), (4, "exited"), (5, "exited")):
        told.hear({"seq": seq, "id": "x", "type": kind})

    assert len(told.wrong) == 2
    assert told.dead == {"x": 1}


def test_the_program_shows_the_operations_of_a_seed() -> None:
    command = [sys.executable, "-B", str(HERE / "soak.py"), "--list", "--seed", "5", "--operations", "50"]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]

    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 50
