"""A barrier that no agent claims does not stand for ever."""

from __future__ import annotations

import select
from collections.abc import Iterator
from typing import Any

import pytest

from mesocosm.kernel.launcher import births as module
from mesocosm.kernel.launcher.births import Births
from mesocosm.kernel.launcher.protocol import UNCLAIMED


class Standing:
    """As much of a birth as a barrier needs."""

    killed = 0

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The one number is the time."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def births() -> Iterator[Any]:
    with select.epoll() as poll:
        made = Births(poll)
        yield made
        for barrier in made.barriers.values():
            barrier.close()


def test_a_barrier_without_an_agent_is_aborted_when_its_time_is_over(births: Any, clock: list[float]) -> None:
    member = Standing()
    births.barrier("b").members.add(member)
    assert births.claim(agent=False) == UNCLAIMED
    clock[0] += UNCLAIMED - 1
    assert births.claim(agent=False) == 1
    assert member.killed == 0
    clock[0] += 1
    assert births.claim(agent=False) == -1
    assert (member.killed, births.barriers["b"].aborted) == (1, True)
    clock[0] += UNCLAIMED
    assert births.claim(agent=False) == -1
    assert member.killed == 1, "once"


def test_an_agent_that_comes_in_time_has_all_the_time_it_needs(births: Any, clock: list[float]) -> None:
    member = Standing()
    births.barrier("b").members.add(member)
    births.claim(agent=False)
    clock[0] += UNCLAIMED - 1
    assert births.claim(agent=True) == -1
    clock[0] += 10 * UNCLAIMED
    assert births.claim(agent=True) == -1
    assert births.claim(agent=False) == UNCLAIMED, "from when it has gone"
    assert member.killed == 0


def test_nothing_is_timed_where_nobody_stands_at_a_barrier(births: Any, clock: list[float]) -> None:
    assert births.claim(agent=False) == -1
