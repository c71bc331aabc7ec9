"""Each statement of the history fails with each error of a disk, once: nobody is refused, nothing is lost or told twice."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import ConflictError
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.annals import Annals
from mesocosm.kernel.testing.simulation import Simulation

ERRORS = {
    "ENOSPC": sqlite3.SQLITE_FULL,
    "EIO": sqlite3.SQLITE_IOERR_WRITE,
    "EDQUOT": sqlite3.SQLITE_IOERR,
    "EROFS": sqlite3.SQLITE_READONLY,
    "EMFILE": sqlite3.SQLITE_CANTOPEN,
}
POD = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "2"]}, {"name": "b", "command": ["exit", "3"]}]}


class Failing:
    """In front of each connection to the history: the `at`-th statement that is not a question fails, once."""

    def __init__(self, code: int, at: int) -> None:
        self.code, self.at, self.count = code, at, 0

    def strike(self, statement: str) -> None:
        """A statement."""
        if statement.startswith(("SELECT", "ROLLBACK")):
            return
        self.count += 1
        if self.count == self.at:
            error = sqlite3.OperationalError("it was to fail")
            error.sqlite_errorcode = self.code
            raise error


class Connection(sqlite3.Connection):
    """One that fails as `failing` has it."""

    failing: Failing

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """One statement."""
        self.failing.strike(statement)
        return super().execute(statement, *values)

    def executemany(self, statement: str, values: Any) -> sqlite3.Cursor:
        """The same with many values."""
        self.failing.strike(statement)
        return super().executemany(statement, values)


async def told(agent: Agent) -> list[dict[str, Any]]:
    """The history, once it can be read; oldest first."""
    assert agent.world.history is not None
    for _ in range(3):
        try:
            answer = await agent.history(limit=500)
        except ConflictError:
            assert agent.world.history.trouble is not None
            agent.world.history._tried = float("-inf")  # that much later
            continue
        assert answer["notes"] == []
        return list(answer["history"])[::-1]
    raise AssertionError("it did not recover")


@pytest.mark.parametrize("name", ERRORS)
async def test_whichever_statement_of_the_history_fails_nobody_is_refused_and_nothing_is_lost_or_twice(
    name: str,
    tmp_path: Path,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[..., None],
    rounds: Callable[[int, int], int],
) -> None:
    step = rounds(4 if name == "EIO" else 9, 1)
    connect, at, count, failures = sqlite3.connect, 1 - step, 0, 0
    while True:
        at += step
        (place := tmp_path / str(at)).mkdir()
        failing = Failing(ERRORS[name], at)
        factory = type("One", (Connection,), {"failing": failing})
        with monkeypatch.context() as patch:
            patch.setattr(
                "mesocosm.kernel.runtime.annals.sqlite3.connect",
                lambda path, factory=factory, **more: connect(path, **more, **({"factory": factory} if "history" in path else {})),
            )
            simulation = Simulation(place, history=True)
            for _ in range(2):
                async with simulation.agent() as agent:
                    await agent.launch_group(POD)
                    with trio.fail_after(1000):
                        await agent.wait_container("web")
                    await agent.remove_container("web")
                    lines = await told(agent)
                assert agent.world.history is not None
                failures += agent.world.history.failures  # with those of its end
        expected = [(each, life, "DEAD") for life in (1, 2) for each in ("web", "web.a", "web.b")]
        assert [(line["id"], line["life"], line["state"]) for line in lines] == expected, at
        assert [line["wait"]["exit"] for line in lines if line["id"] == "web.b"] == [3, 3], at
        again = Annals(str(place / "history.db"))
        assert (len(again.page(None, None, None, 500)), again.set_aside) == (6, [])
        again.close()
        if failing.count < at:
            break
        count += 1
    figure(statements=count, error=name, failures=failures, lost=0)
    assert failures == count, "each is told"
