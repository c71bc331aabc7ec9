"""From the ledger's event log to the durable history: what happened is folded into one row for each life of a container.

What lives here: the task that carries it on, and its place in the log. What must not: what a line means (`folding`), the file
(`annals`), and anything that a launch waits for. Theory: the history is a reader of the event log like any other. Its place in
the log is written by the same transaction as what it has read, so whoever goes on after a kill -9 reads each line once. Which
log that was is written beside it, since a ledger does not outlive the machine: where it is another one, what the old one left
open is closed, as `rebooted` after another boot, else as `unknown`.

Everything that may wait for a disk happens in a thread. What cannot be written is tried again, counted and told to whoever
asks for the history; the agent goes on all the same. A known limit: it is a thread of the agent, and one that the kernel does
not let go of (a state directory on NFS whose server is gone) keeps an agent that was killed, its locks, and so the next agent
waiting. A process of its own would not, but it would be one more that has to be fed, found and ended.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import trio

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec
from mesocosm.kernel.core.names import is_within
from mesocosm.kernel.runtime.annals import Annals, AnnalsError
from mesocosm.kernel.runtime.folding import Fold
from mesocosm.kernel.runtime.ledger import Excerpt, Ledger

log = logging.getLogger("mesocosm.history")

PAUSE = 1.0  # seconds from something to its being written
_AGAIN = 10.0  # seconds until what could not be written is tried again
_LAST = 5.0  # seconds that an agent's end waits for its disk
_AT_ONCE = 500  # rows of the log in one transaction
_MOST_KEPT = 20_000  # removed containers that wait for the disk with what only the memory knows of them

T = TypeVar("T")
Aside = Callable[[Callable[[], None]], Awaitable[object]]


class _Beginning(NamedTuple):
    """What an agent found when it began: who lived by the ledger (id, key of the plan), and of these who had no process any more;
    the last line of the log by then, and when that was."""

    living: Mapping[str, int]
    gone: frozenset[str]
    seq: int
    when: float


async def in_a_thread(work: Callable[[], None]) -> None:
    """Calls it beside the loop; given up at once when cancelled, though it goes on."""
    await trio.to_thread.run_sync(work, abandon_on_cancel=True)


class Recorder:
    """One history on one ledger. `run` must be running; `aside` is how what may take long is called."""

    def __init__(
        self, path: str, ledger: Ledger, boot_id: str, *, aside: Aside = in_a_thread, clock: Callable[[], float] = time.time
    ):
        self.path = path
        self.annals: Annals | None = None
        self.cursor = 0  # the last line of the log that is on disk here
        self.trouble: str | None = None  # why the history cannot be written at the moment
        self.failures = 0  # attempts to write it that failed
        self.set_aside: list[str] = []
        self._ledger, self._boot_id, self._aside, self._clock = ledger, boot_id, aside, clock
        self._working = threading.Lock()
        self._kept: dict[tuple[str, int], tuple[ContainerSpec, ContainerPlan]] = {}
        self._beginning: _Beginning | None = None  # until it has been compared with what the log told up to then
        self._is_first, self._is_older = True, False  # transaction of this agent; the log was replaced by a copy from before
        self._told: set[str] = set()  # whose ends are here, and told again by such a log
        self._tried = float("-inf")
        self._loop = threading.get_ident()

    # -- in the agent's loop ------------------------------------------------------------------------------------

    def keep(self, container_id: str, plan_key: int, spec: ContainerSpec, plan: ContainerPlan) -> None:
        """The ledger is about to forget this one, perhaps before it was read from there."""
        if len(self._kept) < _MOST_KEPT:
            self._kept[container_id, plan_key] = spec, plan

    def begin(self, living: Mapping[str, int], gone: Collection[str] = ()) -> None:
        """After recovery: these live, and nobody else; of these `gone` are about to be told to have ended."""
        token = self._ledger.meta("history")
        if token is None:
            self._ledger.set_meta("history", os.urandom(8).hex())
        self._ledger.flush()  # what recovery has found out is told before this moment
        self._beginning = _Beginning(dict(living), frozenset(gone), self._ledger.seq, self._clock())

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Writes what happens, some moments later. `changed` returns when something has been added to the log."""
        while True:
            await self._aside(self.catch_up)
            if self.trouble is None and self.cursor >= self._ledger.seq:
                await changed()
            await trio.sleep(PAUSE if self.trouble is None else _AGAIN)

    async def finish(self) -> None:
        """What is left, and the end; a disk that does not answer is not waited for."""
        with trio.CancelScope(shield=True), trio.move_on_after(_LAST):
            await self._aside(self._finish)

    async def beside(self, work: Callable[[], None]) -> None:
        """Calls what may wait for a disk."""
        await self._aside(work)

    # -- beside it ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._tried = float("-inf")
        self.catch_up()
        with self._working:
            self._close()

    def _close(self) -> None:
        if self.annals is not None:
            self.annals.close()
        self.annals = None

    def catch_up(self) -> None:
        """Writes all that the log has; raises nothing. What has been read when this returns is on disk, unless `trouble`."""
        with self._working:
            if self.trouble is not None and time.monotonic() < self._tried + _AGAIN / 2:
                return
            self._tried = time.monotonic()
            kept = list(self._kept)
            try:
                self._open()
                assert self.annals is not None
                while self._carry_over(self.annals):
                    pass
                while self.annals.prune():
                    pass
            except Exception as error:  # whatever it is, the agent goes on without
                words = _say(error)
                if words != self.trouble:
                    log.warning("the history cannot be written: %s", words)
                self.trouble = words
                self.failures += 1
                self._close()
                return
            self.trouble = None
            for key in kept:
                self._kept.pop(key, None)

    def read(self, query: Callable[[Annals], Any]) -> Any:
        """What `query` answers; AnnalsError if it cannot be asked."""
        self.catch_up()
        with self._working:
            try:
                if self.annals is None:
                    raise AnnalsError(f"the history cannot be read: {self.trouble or 'it is closed'}")
                return query(self.annals)
            except (sqlite3.Error, OSError) as error:
                raise AnnalsError(f"the history cannot be read: {error}") from error

    def _open(self) -> None:
        if self.annals is None:
            self.annals = Annals(self.path)
            for words in self.annals.set_aside:
                log.warning("set aside: %s", words)
            self.set_aside += self.annals.set_aside

    def _excerpt(self, token: str | None, cursor: int) -> Excerpt:
        """What comes next in the log. The ledger is the loop's: nobody else may have its file open."""
        return self._in_the_loop(partial(self._ledger.excerpt, token, cursor, _AT_ONCE))

    def _in_the_loop(self, call: Callable[[], T]) -> T:
        return call() if threading.get_ident() == self._loop else trio.from_thread.run_sync(call)

    def _carry_over(self, annals: Annals) -> bool:
        """One transaction; whether there may be more."""
        cursor, known = int(annals.meta("cursor") or 0), annals.meta("ledger")
        if self._is_first and cursor > self._ledger.opened_at:
            cursor, self._is_older = self._ledger.opened_at, True
        excerpt = self._excerpt(known, cursor)
        rows = excerpt.rows
        if excerpt.token is None:
            raise AnnalsError("the ledger, which it is copied from, cannot be written")
        annals.begin()
        try:
            fold = Fold(annals, excerpt, self._kept, self._clock)
            if known != excerpt.token:
                cursor, self._is_older = 0, False
                if known is not None:
                    fold.close_all("unknown" if annals.meta("boot_id") == self._boot_id else "rebooted")
                annals.set_meta(ledger=excerpt.token)
            lost, beginning = 0, self._beginning
            for row in rows:
                if beginning is not None and row[0] > beginning.seq:  # who is launched from here on lives, too
                    self._compare(fold, beginning)
                    beginning = None
                lost += max(0, row[0] - cursor - 1)
                cursor = row[0] + row[1] - 1
                if row[4] == "planned":  # another one of the name
                    self._told = {found for found in self._told if not is_within(found, row[3])}
                if self._is_news(fold, row[3], beginning):
                    fold.take(*row[2:])
            if lost:
                annals.set_meta(lost=int(annals.meta("lost") or 0) + lost)
            is_last = len(rows) < _AT_ONCE
            if is_last and beginning is not None and excerpt.is_all:
                self._compare(fold, beginning)
                beginning = None
            fold.put()
            annals.set_meta(cursor=cursor, boot_id=self._boot_id)
            if rows or fold.has_changed or beginning is not self._beginning or (self._is_first and self._is_older):
                annals.commit()
                annals.count += fold.new
            else:
                annals.roll_back()
        except BaseException:
            annals.roll_back()
            raise
        self.cursor, self._is_first = cursor, False
        self._beginning = beginning
        for words, body in fold.unreadable:
            self.set_aside.append(words)
            self._in_the_loop(partial(self._ledger.note_set_aside, words, body))
        return not is_last

    def _compare(self, fold: Fold, beginning: _Beginning) -> None:
        self._told = {found for found in beginning.gone if fold.has_ended(found)}
        living = {found: plan for found, plan in beginning.living.items() if found not in self._told}
        fold.compare(living, beginning.when)

    def _is_news(self, fold: Fold, container_id: str, beginning: _Beginning | None) -> bool:
        """Not so what a log from before tells once more: recovery, and who it then undoes, of those whose ends are here."""
        if self._is_older and beginning is not None:
            return fold.is_open(container_id)
        return container_id not in self._told


def _say(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'its file'}: {error.strerror}"
    return str(error) if isinstance(error, AnnalsError) else f"{type(error).__name__}: {error}"
