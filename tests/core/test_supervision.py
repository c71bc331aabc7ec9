"""Kill policies and exit codes are arithmetic."""

from __future__ import annotations

import signal

from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.core import supervision


def test_a_stop_asks_first_and_is_due_after_its_grace() -> None:
    ending = supervision.begin(signal.SIGTERM, 3000, now=10.0)
    assert not ending.due(12.9)
    assert ending.due(13.0)


def test_sigkill_and_no_grace_are_due_at_once() -> None:
    assert supervision.begin(signal.SIGKILL, 3000, now=1.0).due(1.0)
    assert supervision.begin(signal.SIGTERM, 0, now=1.0).due(1.0)


@given(st.integers(0, 10_000), st.none() | st.integers(0, 10_000), st.floats(0, 10))
def test_asking_again_never_lets_it_live_longer(first: int, second: int | None, later: float) -> None:
    ending = supervision.begin(signal.SIGTERM, first, now=0.0)
    assert supervision.hasten(ending, second, now=later).deadline <= ending.deadline


def test_statuses_are_an_exit_or_a_signal() -> None:
    assert supervision.decode_status(3 << 8) == (3, None)
    assert supervision.decode_status(9) == (None, 9)
    assert supervision.decode_status(0x80 | 11) == (None, 11)


def test_a_group_exits_as_the_member_that_ended_it() -> None:
    assert supervision.group_exit({"a": 0, "a.b": 3}, "a.b") == 3
    assert supervision.group_exit({"a": 0, "a.b": 3}, None) == 0
    assert supervision.group_exit({"a": 143}, None) == 143


def test_retries_slow_down_to_once_a_minute() -> None:
    assert [supervision.retry_delay(n) for n in (1, 2, 3, 7, 99)] == [1, 2, 4, 60, 60]
