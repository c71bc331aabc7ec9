"""Keeping what containers print within a budget: holes are punched into the old end of their files.

What lives here: how often the files are looked at, how much each may keep, and the cut. What must not: reading them (`logs`).

Theory: a program writes into its file at full speed and nothing stands in between, so a budget can only be kept afterwards, and
how far it is overdrawn is the time between two looks. Looking is one question to the file system (how much room is left) and
one for each file that grew at the last look; if room went away that these do not account for, all are looked at. The pauses
follow the room that there is: never so long that a flood as fast as memory could take half of it. What all keep together is
bounded by that room too, and then the largest give first. A file keeps its length: offsets stay true, and what was cut can be
seen in the file itself by the next agent, nothing is written down. A cut needs no room.
"""

from __future__ import annotations

import errno
import os
import traceback
from dataclasses import dataclass
from typing import Any

import trio

from mesocosm.kernel.core.resources import LOG_BUDGET, SMALLEST_LOG
from mesocosm.kernel.linux import holes
from mesocosm.kernel.runtime import logs
from mesocosm.kernel.runtime.world import Cell, World

_FLOOD = 4 * 2**30  # bytes per second: what one machine writes into memory
_SHORTEST, _LONGEST = 0.01, 0.1  # seconds between two looks
_PIECE = 8 * 2**20  # bytes that a file which grows may grow between two looks, if they can be as close as that
_STIR = 2**20  # bytes that went away unaccounted for, from which on all are looked at
_SWEEP = 1.0  # seconds, after which all are looked at in any case
_CUT = 256 * 2**20  # bytes freed in one turn: 10 ms


@dataclass(slots=True, eq=False)
class _Log:
    """One file. `kept` is what it takes in the file system, `dropped` where it begins by now."""

    path: str
    budget: int
    cell: Cell | None  # None: of a container that was replaced
    size: int = 0
    kept: int = 0
    dropped: int = 0
    is_uncuttable: bool = False

    @property
    def grows(self) -> bool:
        """Whether somebody may still write to it."""
        return self.cell is not None and not self.cell.dead.is_set()


class Budgets:
    """The files of one agent's containers. `keep` is its task."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._logs: dict[str, _Log] = {}
        self._growing: list[_Log] = []  # at the last look
        self._living: set[str] = set()
        self._total = 0  # bytes kept
        self._free = 0
        self._pause = _LONGEST
        self._sweep_at = 0.0
        self._woken = trio.lowlevel.ParkingLot()

    def watch(self, cell: Cell) -> None:
        """From now on the output of this container has its budget."""
        for effect in cell.plan.effects:
            if effect.kind == "log":
                self._add(_Log(str(effect.args["path"]), int(effect.args.get("budget", LOG_BUDGET)), cell))

    def take_over(self, world: World) -> None:
        """What an agent before this one has left: the output of the dead, and that of those who were replaced."""
        for cell in world.cells.values():
            if cell.dead.is_set():
                self.watch(cell)
        for path in logs.sweep_former(world.host, world.cells):
            self.watch_file(path)

    def watch_file(self, path: str) -> None:
        """A file that nobody writes to any more, but which takes room."""
        self._add(_Log(path, LOG_BUDGET, None))

    def _add(self, log: _Log) -> None:
        if (before := self._logs.get(log.path)) is not None:
            self._total -= before.kept
        self._logs[log.path] = log
        self._sweep_at = 0.0
        if log.grows:
            self._living.add(log.path)
            self._woken.unpark_all()

    def dropped(self, cell: Cell) -> dict[str, int]:
        """By stream, how many bytes were cut off; without those of which none was."""
        return {os.path.basename(log.path): log.dropped for log in self._logs_of(cell) if log.dropped}

    def _logs_of(self, cell: Cell) -> list[_Log]:
        paths = (str(effect.args["path"]) for effect in cell.plan.effects if effect.kind == "log")
        return [self._logs[path] for path in paths if path in self._logs]

    def told(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """By stream: how many bytes were written, are kept and were dropped, and how many may be kept."""
        told = {}
        for log in self._logs_of(cell):
            if not self._measure(log):
                continue
            told[os.path.basename(log.path)] = {
                "size": log.size, "kept": log.kept, "dropped": log.dropped, "budget": None if log.is_uncuttable else log.budget,
            }  # fmt: skip
        return told

    async def keep(self) -> None:
        """Looks for as long as somebody lives who may print. Runs as long as the agent."""
        while True:
            if not self._living and not any(log.kept > log.budget and not log.is_uncuttable for log in self._growing):
                await self._woken.park()
            await trio.sleep(self._pause)
            try:
                self.look()
            except OSError as error:  # the file system does not answer: what can be done about it is to ask again
                traceback.print_exception(error)
                self._pause = _SWEEP

    def look(self) -> None:
        """One look, and what follows from it."""
        now, free = trio.current_time(), self._room()
        watched, self._growing = self._growing, []
        grown = sum(self._measure_growth(log) for log in watched)
        if now >= self._sweep_at or self._free - free - grown > _STIR:
            known = set(watched)
            grown += sum(self._measure_growth(log) for log in self._due() if log not in known)
            self._sweep_at = now + _SWEEP
        self._shrink(free)
        self._free = self._room()
        quiet = min(_LONGEST, max(_SHORTEST, self._free / 2 / _FLOOD))
        rate = grown / self._pause
        self._pause = min(quiet, max(_SHORTEST, _PIECE / rate)) if rate > 0 else quiet

    def _room(self) -> int:
        status = os.statvfs(self._directory)
        return status.f_bavail * status.f_frsize

    def _due(self) -> list[_Log]:
        """Those who may grow, and for the last time those who cannot any more."""
        due = [self._logs[path] for path in self._living]
        self._living = {log.path for log in due if log.grows}
        return due

    def _measure_growth(self, log: _Log) -> int:
        before = log.kept
        if not self._measure(log):
            return 0
        if log.kept > before or log.kept > log.budget:  # somebody may have asked about it, and measured it, since the last look
            self._growing.append(log)
        return max(0, log.kept - before)

    def _measure(self, log: _Log) -> bool:
        if self._logs.get(log.path) is not log:
            return False  # replaced or gone, and not in the total any more
        try:
            status = os.stat(log.path, follow_symlinks=False)
        except FileNotFoundError:
            self._total -= log.kept
            self._living.discard(log.path)
            del self._logs[log.path]
            return False
        self._note(log, status)
        return True

    def _note(self, log: _Log, status: os.stat_result) -> None:
        kept = status.st_blocks * 512
        self._total += kept - log.kept
        log.size, log.kept = status.st_size, kept
        if log.size < log.dropped:
            log.dropped = 0  # the program itself has shortened it
        if not log.dropped and kept + status.st_blksize < log.size and log.cell is not None:
            self._find_beginning(log)  # an agent before this one has cut it

    def _find_beginning(self, log: _Log) -> None:
        fd = os.open(log.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            first = holes.data_from(fd, 0)
            log.dropped = log.size if first is None else first
        finally:
            os.close(fd)

    def _shrink(self, free: int) -> None:
        """Cuts what is over its budget; and the largest, if all together take more than half of the room that there would be."""
        level = self._level(free)
        if level is not None:
            for log in list(self._logs.values()):
                if log.kept > min(level, log.budget):
                    self._cut(log, min(level, log.budget))
            return
        for log in self._growing:
            if log.kept > log.budget:
                self._cut(log, log.budget)

    def _level(self, free: int) -> int | None:
        """How much each may keep so that all fit; None if they do."""
        most = (self._total + free) // 2
        if self._total <= most:
            return None
        # Like water: those who have less than their share leave the rest of it to the others.
        left, kept = most, sorted(log.kept for log in self._logs.values())
        for at, own in enumerate(kept):
            share = left // (len(kept) - at)
            if own > share:
                return max(SMALLEST_LOG, share)
            left -= own
        return None

    def _cut(self, log: _Log, budget: int) -> None:
        if log.is_uncuttable:
            return
        try:
            fd = os.open(log.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            self._punch(log, fd, budget)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            log.is_uncuttable = True
        finally:
            os.close(fd)

    def _punch(self, log: _Log, fd: int, budget: int) -> None:
        status = os.fstat(fd)
        block = max(holes.PAGE, status.st_blksize)
        # Some more than has to go: else every line that follows would be a cut.
        end = max(0, status.st_size - budget + budget // 8) // block * block
        first = holes.data_from(fd, 0)
        if first is not None and first < end:
            stop = min(end, first + _CUT)
            holes.punch(fd, 0, stop)
            if stop < end:
                self._growing.append(log)  # the rest at the next look: others want their turn
            log.dropped = stop
        else:  # what takes the room lies behind the end: the program has reserved it, fallocate(2)
            at = -(-status.st_size // block) * block
            holes.punch(fd, at, holes.END - at)
        self._note(log, os.fstat(fd))
