"""From attempts to an outcome: undoes entries with patience, in order, going on past what cannot be undone.

What lives here: patience (how long a busy cgroup may stay busy) and the words of what was left. What must not: the
verbs themselves (`undo`), and what follows from a failure (the caller parks it).
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import trio

from mesocosm.kernel.core.plan import ContainerPlan, Undo
from mesocosm.kernel.runtime.machine import Machine
from mesocosm.kernel.runtime.undo import Attempt

PATIENCE = 1.0  # seconds for one verb that is BUSY; an exiting process leaves its cgroup within milliseconds
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05
_HELD = (errno.EBUSY, errno.ENOTEMPTY, errno.ETIMEDOUT, errno.ETXTBSY)  # errors for which somebody is to blame


class Entry(NamedTuple):
    """One thing that was made: its position among the effects of its container, and its undo."""

    position: int
    kind: str
    undo: tuple[Undo, ...]
    keep: bool


def entries_of(plan: ContainerPlan) -> list[Entry]:
    """What a launch by this plan will make, in the order of making."""
    return [Entry(at, effect.kind, effect.undo, effect.keep) for at, effect in enumerate(plan.effects) if effect.undo]


class Remainder(NamedTuple):
    """Something that could not be undone, and why."""

    entry: Entry
    note: str


def undo_at_once(machine: Machine, entries: Sequence[Entry]) -> bool:
    """Undoes in reverse order, if that takes no patience: the usual case. False: ask `undo_entries`, which goes on from here."""
    try:
        for entry in reversed(entries):
            for verb, target in entry.undo:
                if machine.may_wait(target):
                    return False
                if verb == "kill_cgroup" and ("rmdir_cgroup", target) in entry.undo:
                    continue  # a cgroup in which somebody lives cannot be removed: whether there is anybody is seen then
                if machine.undo(verb, target) is not Attempt.GONE:
                    return False
    except Exception:
        return False  # whatever it is, it is seen and told by who tries again
    return True


async def undo_entries(machine: Machine, entries: Sequence[Entry], *, deadline: float = math.inf) -> list[Remainder]:
    """Undoes in reverse order of `entries`; what is left. Does not wait at all if nothing is busy.

    After `deadline` (trio's clock) nothing is waited for: one that takes long leaves the others their one attempt.
    """
    left = []
    for entry in reversed(entries):
        note = await undo_by(machine, entry, deadline)
        if note is not None:
            left.append(Remainder(entry, note))
    return left


async def undo_by(machine: Machine, entry: Entry, deadline: float) -> str | None:
    """Undoes one entry; None, or why it is still there. At the deadline (trio's clock) it is given up."""
    with trio.move_on_at(deadline):
        return await undo_one(machine, entry.undo)
    return None if undo_at_once(machine, [entry]) else "not undone within its deadline"


async def undo_one(machine: Machine, undo: Iterable[Undo]) -> str | None:
    """Undoes one entry, all its verbs; None, or why it is still there."""
    notes = []
    for verb, target in undo:
        try:
            await _until_gone(machine, verb, target)
        except Exception as error:  # whatever it is, it is the trouble of this entry and of nothing else
            notes.append(await _describe(machine, verb, target, error))
    return "; ".join(notes) or None


async def _until_gone(machine: Machine, verb: str, target: str) -> None:
    pause, deadline = _FIRST_PAUSE, 0.0
    while (attempt := await _attempt(machine, verb, target)) is not Attempt.GONE:
        if attempt is Attempt.PROGRESS:
            await trio.lowlevel.checkpoint()
            continue
        now = trio.current_time()
        deadline = deadline or now + PATIENCE
        if now >= deadline:
            raise OSError(errno.EBUSY, "still in use", target)
        await trio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


async def _attempt(machine: Machine, verb: str, target: str) -> Attempt:
    return await machine.undo_outside(verb, target) if machine.may_wait(target) else machine.undo(verb, target)


async def _describe(machine: Machine, verb: str, target: str, error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{verb} {target}: not a verb that this build knows"
    if not isinstance(error, OSError):
        return f"{verb} {target}: {type(error).__name__}: {error}"
    held = await machine.holders(verb, target) if error.errno in _HELD else ""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    said = f" ({error.strerror})" if error.errno == errno.ETIMEDOUT else ""
    return f"{verb} {target}: {name}{said}{f', held by {held}' if held else ''}"
