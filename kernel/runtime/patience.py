"""How long a plug-in may hold up the agent, which has one thread; and whose fault it is what comes out of its hooks.

What lives here: an alarm around synchronous calls of plug-ins, and their exceptions in words. Theory: hooks are pure functions
that answer in microseconds, so one that is still busy after seconds never will, and stopping it in the middle of whatever it
does breaks nothing. The alarm gets it out of Python code, sleeps and system calls that can be interrupted. It does not get it
out of a loop in C or a process in D state: nothing inside this process could. One thread, one alarm: calls do not nest.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from mesocosm.kernel.core.errors import InternalError, MesoError

HOOK_SECONDS = 2.0  # for an answer that takes microseconds, on a machine on its knees
_AGAIN = 0.5  # seconds until the next alarm, for whoever catches everything
_WORDS = 500  # characters of what an exception says of itself


class OvertimeError(BaseException):
    """The alarm. Not an Exception, which plug-ins may well catch."""


_deadline: float | None = None  # seconds of the call under way, None while there is none
_inside: FrameType | None = None  # who is patient
_can_ring: bool | None = None  # whether there is an alarm at all: only the main thread can have one


def _ring(_number: int, frame: FrameType | None) -> None:
    while frame is not None and frame is not _inside:
        frame = frame.f_back
    if frame is None or _deadline is None:
        _disarm()  # it rang the moment before: the block was left by that, and its end not reached
    else:
        raise OvertimeError(f"no answer within {_deadline:g} s")


def _disarm() -> None:
    global _deadline, _inside
    _deadline = _inside = None
    if _can_ring:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Patience:
    """``with Patience(seconds):`` leaves the block with OvertimeError when they are over."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        global _deadline, _can_ring, _inside
        if _can_ring is None:
            try:
                signal.signal(signal.SIGALRM, _ring)
                _can_ring = True
            except ValueError:
                _can_ring = False
        if _can_ring:
            _deadline, _inside = self._seconds, sys._getframe(1)
            signal.setitimer(signal.ITIMER_REAL, self._seconds, _AGAIN)

    def __exit__(self, *_: object) -> None:
        _disarm()


def blamed(error: BaseException, plugin: str, hook: str, **where: Any) -> MesoError:
    """What came out of a hook as an error that names the plug-in; the hook, too, where the plug-in did not mean to refuse."""
    if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        raise error  # somebody has pressed ctrl-C at `meso plan`; nobody can at an agent
    if isinstance(error, MesoError):
        return error.with_fields(plugin=plugin, **where)
    said = str(error) if isinstance(error, OvertimeError) else f"{type(error).__name__}: {error}"
    hint = "a bug of this plug-in: report it to its author; a set without it does without it"
    return InternalError(f"{hook}() of the plug-in {plugin}: {said[:_WORDS]}", plugin=plugin, hint=hint, **where)


def ask(plugin: str, hook: str, call: Callable[[], Any], **where: Any) -> Any:
    """The answer of a hook; MesoError if there is none."""
    try:
        with Patience(HOOK_SECONDS):
            return call()
    except BaseException as error:  # whatever it is, it must not end the agent; nothing is awaited, so nobody is cancelled
        raise blamed(error, plugin, hook, **where) from error
