"""The file under the ledger: opened, locked, written in transactions, and lived with when nothing can be written.

What lives here: SQLite. What must not: what the rows mean (`ledger`). Theory: a transaction that is a *decision* ("these
are about to be made", "this group is committed") must be written before it counts, so it fails if it cannot be. All
others tell what has happened already ("this container is dead"), and a full disk does not make that untrue: such a
transaction is kept in memory (`backlog`) with its events, counts, and is written before the next one that can be. Until
then decisions are refused; nothing else is: what runs can be seen, waited for, killed and removed with 0 bytes free.

A file that is damaged is set aside and named in `set_aside`. One that merely cannot be opened now is not damaged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.runtime import schema
from mesocosm.kernel.runtime.opening import cannot_write, empty_log, is_damage, is_trouble, open_file, write_again
from mesocosm.kernel.runtime.premises import identity

log = logging.getLogger("mesocosm.ledger")


class EventRow(NamedTuple):
    """An event that is not numbered yet. It stands for `lines` lines; see `events.expand`."""

    lines: int
    time: float
    id: str
    type: str
    plan: int | None
    body: bytes | None


_Statement = tuple[str, Any, bool]  # text, values, whether there is a list of values to repeat it with


class Book:
    """One open file. Use it as a context manager for a transaction, `with book.deciding():` for a decision."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.set_aside: list[str] = []  # what could not be read, in words
        self._aside: list[tuple[float, str, bytes | None]] = []  # of these, what is not in the ledger yet
        self.pending: list[EventRow] = []  # written by the next transaction
        self.on_commit: Callable[[], None] = lambda: None
        self.seq = 0  # of the last event that counts
        self.trouble: sqlite3.Error | None = None  # why the backlog could not be written
        self._backlog: list[_Statement] = []
        self._unwritten: list[tuple[Any, ...]] = []  # events of the backlog: (seq, *EventRow)
        self._said: list[_Statement] = []  # by this transaction
        self._decides = False
        self._kept = 0  # how many events were pending when this transaction began
        self._retry_at = 0.0  # monotonic; before that the backlog is not tried again
        self._depth = 0
        self._db = open_file(self.path, self.note_set_aside)
        self._run = self._db.execute
        self._place = identity(os.path.dirname(self.path))
        self._identity = self._identities()
        self._log_path, self._log_bytes = f"{self.path}-wal", _LOG_BYTES

    def note_set_aside(self, words: str, body: bytes | None = None) -> None:
        """Something that could not be read: in `set_aside`, in the agent's log, and with the next transaction in the ledger,
        where it stays until somebody has seen it. `body` is what was there."""
        self.set_aside.append(words)
        self._aside.append((time.time(), words, body))
        log.warning("set aside: %s", words)

    def set_aside_words(self) -> list[dict[str, Any]]:
        """What could not be read, until somebody has seen it: {"time", "said"}, the oldest first."""
        kept = [(moment, said) for moment, said in self._rows("SELECT time, said FROM aside ORDER BY seq")]
        return [{"time": moment, "said": said} for moment, said, *_ in [*kept, *self._aside]]

    def forget_set_aside(self) -> None:
        """Somebody has seen it."""
        self.set_aside.clear()
        self._aside.clear()
        self.write("DELETE FROM aside")

    def _rows(self, statement: str, values: Any = ()) -> list[Any]:
        """All rows of a question; a file that turns out to be damaged is mended first."""
        try:
            return self._run(statement, values).fetchall()
        except sqlite3.DatabaseError as error:
            if not is_damage(error) or self._depth:
                raise
            log.warning("the ledger was damaged while it was open: %s", error)
        self._mend()
        return self._run(statement, values).fetchall()

    def _mend(self) -> None:
        """Opens the file again, or one with what can be read of it. What cannot be opened now is empty, and `trouble`."""
        self._roll_back()
        self._db.close()
        try:
            self._db = open_file(self.path, self.note_set_aside)
        except LaunchError as error:
            log.warning("%s", error)
            self._db = schema.blank()
            if self.trouble is None or not is_damage(self.trouble):
                self.trouble = sqlite3.DatabaseError(str(error))
                self.trouble.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        self._run = self._db.execute
        self._identity = self._identities()

    def _keep_in_place(self) -> None:
        """Writes a new file where somebody has removed ours, or put another in its place: all of it is still open here, and stays
        open for as long as that cannot be done. sqlite3.Error, OSError."""
        if self._identities() == self._identity or self._depth or self.trouble is not None:
            return
        write_again(self.path, self._db.serialize())
        self.note_set_aside(f"{self.path} was removed or replaced while it was in use; it has been written again")
        self._mend()

    def _identities(self) -> tuple[Any, ...]:
        return identity(self.path), identity(self.path + "-wal")

    def close(self) -> None:
        """Closes the file; what is pending is written."""
        self._retry_at = 0.0
        try:
            self._keep_in_place()
        except (sqlite3.Error, OSError) as error:
            log.error("the ledger is lost: it was removed, and could not be written again: %s", error)
        self.flush()
        self._db.close()

    # -- transactions -------------------------------------------------------------------------------------------

    def deciding(self) -> Self:
        """The next transaction is a decision: LaunchError, and no change, if it cannot be written."""
        self._decides = True
        return self

    def __enter__(self) -> Self:
        if not self._depth:
            self._kept = len(self.pending)
            try:
                self._catch_up()
                if self.trouble is None:
                    self._run("BEGIN IMMEDIATE")
            except sqlite3.Error as error:
                self._stumble(error)
        self._depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        said, self._said = self._said, []
        decides, self._decides = self._decides, False
        if kind is not None:
            self._roll_back()
            del self.pending[self._kept :]  # what it would have told is not so
            return
        events, seq = self._numbered()
        aside = self._aside[:]
        if self.trouble is None:
            try:
                if events:
                    self._db.executemany(_INSERT_EVENT, events)
                if aside:
                    self._db.executemany(_INSERT_ASIDE, aside)
                self._run("COMMIT")
                del self._aside[: len(aside)]
                self._empty_log()
            except sqlite3.Error as error:
                self._roll_back()
                if not is_trouble(error):
                    raise
                if is_damage(error):
                    self.trouble = error
                if decides:
                    del self.pending[self._kept :]
                    raise cannot_write(self.path, error) from error
                self.trouble = error
        if self.trouble is not None:
            self._backlog += said
            self._unwritten += events
        if events:
            self.pending = []
            self.seq = seq
            self.on_commit()

    def _empty_log(self) -> None:
        """From time to time: what is in it is read again by whoever opens it, and takes room."""
        with contextlib.suppress(OSError):  # somebody has removed it
            if os.stat(self._log_path).st_size > self._log_bytes:
                empty_log(self._db, self.path)
                self._log_bytes = max(_LOG_BYTES, 2 * os.stat(self._log_path).st_size)  # if it could not be: not at once again

    def write(self, statement: str, values: Any = ()) -> None:
        """One statement of the transaction that is open, or a transaction of its own."""
        self._say((statement, values, False))

    def write_many(self, statement: str, values: Iterable[Any]) -> None:
        """The same statement with each of `values`."""
        self._say((statement, list(values), True))

    def _say(self, said: _Statement) -> None:
        if not self._depth:
            with self:
                self._say(said)
            return
        self._said.append(said)
        if self.trouble is None:
            try:
                self._carry_out(said)
            except sqlite3.Error as error:
                self._stumble(error)

    def _carry_out(self, said: _Statement) -> None:
        statement, values, is_many = said
        if is_many:
            self._db.executemany(statement, values)
        else:
            self._run(statement, values)

    def _stumble(self, error: sqlite3.Error) -> None:
        self._roll_back()
        decides, self._decides = self._decides, False
        if not is_trouble(error):
            raise error
        if is_damage(error):
            self.trouble = error  # the next transaction mends it
        if decides:
            raise cannot_write(self.path, error) from error
        self.trouble = error

    def _catch_up(self) -> None:
        """Writes the backlog; sqlite3.Error if that is still impossible. Trying takes a tenth of the time at most."""
        began = time.monotonic()
        if self.trouble is None or (began < self._retry_at and not self._decides):
            return
        try:
            if is_damage(self.trouble):
                self._mend()
            self._run("BEGIN IMMEDIATE")
            if self._db.execute("PRAGMA database_list").fetchone()[2] == "":
                raise self.trouble  # nowhere to write it to
            for said in self._backlog:
                with contextlib.suppress(sqlite3.IntegrityError):  # a file that was mended meanwhile may have it already
                    self._carry_out(said)
            self._db.executemany(_INSERT_EVENT_ONCE, self._unwritten)
            self._run("COMMIT")
        except sqlite3.Error:
            now = time.monotonic()
            self._retry_at = now + 10 * (now - began)
            raise
        self._backlog.clear()
        self._unwritten.clear()
        self.trouble = None

    def _roll_back(self) -> None:
        if self._db.in_transaction:  # an error may have ended it already
            with contextlib.suppress(sqlite3.Error):
                self._run("ROLLBACK")

    def _numbered(self) -> tuple[list[tuple[Any, ...]], int]:
        seq, rows = self.seq, []
        for row in self.pending:
            rows.append((seq + 1, *row))
            seq += row.lines
        return rows, seq

    @property
    def is_adrift(self) -> bool:
        """Whether the directory has no name any more, or another one has it. A file that is missed in there is written again."""
        return identity(os.path.dirname(self.path)) != self._place

    def check_writable(self) -> None:
        """LaunchError while the ledger cannot be written: before anything is begun that would have to be.

        Also when its directory has been removed: no agent after this one could read what is written.
        """
        if self.is_adrift:
            hint = "meso agent --stop ends what runs; then the next verb starts anew"
            raise LaunchError("the ledger has been removed, so nothing new is started", target=self.path, hint=hint)
        try:
            self._keep_in_place()
        except (sqlite3.Error, OSError) as error:
            raise cannot_write(self.path, error) from error
        if self.trouble is not None:
            self._retry_at = 0.0
            self.flush()
        if self.trouble is not None:
            raise cannot_write(self.path, self.trouble)

    def flush(self) -> None:
        """Writes pending events, and what could not be written before, if there are any."""
        if self.pending or self._aside or self.trouble is not None:
            with self:
                pass


_LOG_BYTES = 4 << 20
_INSERT_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)"
_INSERT_EVENT_ONCE = _INSERT_EVENT.replace("INSERT", "INSERT OR IGNORE")  # numbers are given once, so whatever has this one is it
_INSERT_ASIDE = "INSERT INTO aside (time, said, body) VALUES (?, ?, ?)"
