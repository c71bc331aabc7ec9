"""How things end, as arithmetic: exit statuses, kill policies, the exit code of a group.

No clock here: every function is handed the time (seconds of a monotonic clock) and answers with a decision.
Theory: a stop is a promise with a date. It is made once, and later asks may only move the date forward, so
that a second "kill" can never keep something alive longer than the first would have.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

import msgspec

SIGKILL = int(signal.SIGKILL)


class Ending(msgspec.Struct, frozen=True):
    """A stop under way: `signal` has been asked for at `asked`; at `deadline` it becomes SIGKILL."""

    signal: int
    asked: float
    deadline: float

    def due(self, now: float) -> bool:
        """Whether asking is over and SIGKILL follows."""
        return now >= self.deadline


def begin(kill_signal: int, grace_ms: int, now: float) -> Ending:
    """A stop that starts now. SIGKILL as the first signal, or no grace, is due at once."""
    patience = 0.0 if kill_signal == SIGKILL else grace_ms / 1000
    return Ending(kill_signal, now, now + patience)


def hasten(ending: Ending, grace_ms: int | None, now: float) -> Ending:
    """The same stop asked for again, with `grace_ms` from now (None: no wish): the deadline never moves back."""
    if grace_ms is None:
        return ending
    return Ending(ending.signal, ending.asked, min(ending.deadline, now + grace_ms / 1000))


def decode_status(status: int) -> tuple[int | None, int | None]:
    """A raw wait status as (exit code, signal): exactly one of them is a number."""
    deadly = status & 0x7F
    return (None, deadly) if deadly else ((status >> 8) & 0xFF, None)


def group_exit(codes: Mapping[str, int], blame: str | None) -> int:
    """The exit code of a group of `codes` (container id → shell code).

    It is the code of the member that ended it; of its only member, if there is just one; 0 otherwise.
    """
    if blame is not None and blame in codes:
        return codes[blame]
    return next(iter(codes.values())) if len(codes) == 1 else 0


def retry_delay(attempt: int, first: float = 1.0, longest: float = 60.0) -> float:
    """Seconds before the try number `attempt` (from 1) of undoing what was parked: doubling up to a minute."""
    return min(longest, first * 2.0 ** min(attempt - 1, 30))
