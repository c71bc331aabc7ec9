"""Each statement of a life fails with each error that SQLite has for a machine that is out of something, once and for good."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.testing.simulation import Simulation

POD = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "2000"]}, {"name": "b", "command": ["exit", "0"]}]}
ERRORS = {
    "ENOSPC": sqlite3.SQLITE_FULL,
    "EIO": sqlite3.SQLITE_IOERR_WRITE,
    "EDQUOT": sqlite3.SQLITE_IOERR,
    "EROFS": sqlite3.SQLITE_READONLY,
    "EMFILE": sqlite3.SQLITE_CANTOPEN,
    "ENOMEM": sqlite3.SQLITE_NOMEM,
    "EAGAIN": sqlite3.SQLITE_BUSY,
    "damage": sqlite3.SQLITE_CORRUPT,
}


class Failing:
    """In front of a connection: what changes something fails from the `at`-th time on, `times` times. 0: it only counts."""

    def __init__(self, db: sqlite3.Connection, code: int, at: int, times: int) -> None:
        self._db, self._code, self._left, self._times, self.count = db, code, at, times, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, values: Any = ()) -> Any:
        """A statement."""
        self._strike(statement)
        return self._db.execute(statement, values)

    def executemany(self, statement: str, values: Any) -> Any:
        """The same with many values."""
        self._strike(statement)
        return self._db.executemany(statement, values)

    def _strike(self, statement: str) -> None:
        if statement.startswith(("SELECT", "PRAGMA", "ROLLBACK")):
            return
        self.count += 1
        if self._left and self._left <= self.count < self._left + self._times:
            error = sqlite3.OperationalError("it was to fail")
            error.sqlite_errorcode = self._code
            raise error


def put_before(ledger: Ledger, code: int, at: int, times: int) -> Failing:
    """From now on the ledger's statements go through it."""
    failing = Failing(ledger._db, code, at, times)
    ledger._db = failing  # type: ignore[assignment]
    ledger._run = failing.execute
    return failing


async def life(agent: Agent) -> bool:
    """All verbs, one after the other; whether the launch was taken."""
    try:
        await agent.launch_group(POD)
    except MesoError as error:
        assert error.code == "launch_failed"  # noqa: PT017 - an error or none
        if "web" in agent.world.cells:  # rolled back, and that is known
            await agent.remove_container("web")
        return False
    await agent.wait_container("web.b")
    try:
        await agent.launch_nested_group("web.a", [{"name": "x", "command": ["exit", "0"]}])
    except MesoError as error:
        assert error.code in ("launch_failed", "dying")  # noqa: PT017 - the same
    await agent.kill_container("web")
    assert (await agent.wait_container("web"))["reason"] == "killed"
    assert {line["state"] for line in agent.get_containers(include_dead=True) if line["id"] != "calm"} == {"DEAD"}
    await agent.remove_container("web")
    return True


@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "for good"])
@pytest.mark.parametrize("name", ERRORS)
async def test_whichever_statement_fails_launches_are_whole_or_refused_and_all_else_goes_on(
    simulation: Simulation,
    autojump_clock: MockClock,
    name: str,
    times: int,
    figure: Callable[..., None],
    rounds: Callable[[int, int], int],
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_container({"container_id": "calm", "command": ["sleep", "1000000"]})
    # Those that differ in the number alone are not enumerated as densely each time: what is done about them is the same code.
    step = rounds(3 if name in ("ENOSPC", "damage") else 12, 1)
    at, refused, count = 1 - step, 0, 0
    while True:
        at, count = at + step, count + 1
        async with simulation.agent() as agent:
            real = agent.world.ledger._db
            left = simulation.leftovers
            failing = put_before(agent.world.ledger, ERRORS[name], at, times)
            with trio.fail_after(3000):
                refused += not await life(agent)
            await trio.sleep(5)
            assert simulation.launcher.living == ["calm"]
            assert simulation.leftovers == left
            if agent.world.ledger._db is failing:  # there is room again
                agent.world.ledger._db, agent.world.ledger._run = real, real.execute
            agent.world.journal.wake()
            await trio.sleep(5)
            agent.world.ledger.check_writable()
            assert [row.id for row in agent.world.ledger.containers()] == ["calm"]
            assert set(agent.world.ledger.entries()) == {"", "calm"}
            await agent.launch_container({"container_id": "after", "command": ["exit", "0"]})
            await agent.wait_container("after")
            await agent.remove_container("after")
        if failing.count < at:
            break
    assert at > 20
    assert refused >= 1, "a launch that cannot be written down is refused"
    figure(statements=count - 1, error=name, refused=refused)
