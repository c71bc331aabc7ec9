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
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

from mesocosm.kernel.core.errors import ConflictError, LaunchError
from mesocosm.kernel.runtime import schema

log = logging.getLogger("mesocosm.ledger")
_UNWRITABLE = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
)
_PRIMARY = 0xFF  # the low byte of an extended result code, sqlite3.h


class EventRow(NamedTuple):
    """An event that is not numbered yet. It stands for `lines` lines; see `events.expand`."""

    lines: int
    time: float
    id: str
    type: str
    plan: int | None
    body: bytes | None


def lock(run_dir: str) -> int:
    """Keeps a second agent out as long as the answered descriptor is open; ConflictError if one is there.

    The lock belongs to the open file, not to a number in it: it cannot be stale.
    """
    fd = os.open(os.path.join(run_dir, "agent.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise ConflictError(
            "another agent is using this directory", target=run_dir, hint="use its socket, or MESOCOSM_RUN_DIR for another agent"
        ) from None
    return fd


def _make_private(path: str) -> None:
    """A file that only its owner can read, before SQLite makes one that others can: specs hold secrets, and a stranger's
    lock on it would stop the agent. The files beside it get the same mode."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _has_our_tables(db: sqlite3.Connection) -> bool:
    """Whether the file was made by exactly this version's statements: SQLite keeps their text."""
    made = {row[0] for row in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")}
    return made == set(schema.TABLES)


def _is_unwritable(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _UNWRITABLE


_Statement = tuple[str, Any, bool]  # text, values, whether there is a list of values to repeat it with


class Book:
    """One open file. Use it as a context manager for a transaction, `with book.deciding():` for a decision."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.set_aside: list[str] = []  # what could not be read, in words
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
        self._db = self._open()
        self._identity = _identity(self.path)
        self._run = self._db.execute
        self._depth = 0

    def _open(self) -> sqlite3.Connection:
        try:
            return self._open_once()
        except sqlite3.DatabaseError as error:
            if _is_unwritable(error):
                raise self._cannot_write(error) from error
            self._set_file_aside(error)
        return self._open_once()

    def _open_once(self) -> sqlite3.Connection:
        _make_private(self.path)
        db = sqlite3.connect(self.path, isolation_level=None, timeout=1.0)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = OFF")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.execute("BEGIN IMMEDIATE")
                for statement in schema.TABLES:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {schema.VERSION}")
                db.execute("COMMIT")
            elif version != schema.VERSION:
                raise sqlite3.DatabaseError(f"schema version {version}, this build reads {schema.VERSION}")
            elif not _has_our_tables(db):
                raise sqlite3.DatabaseError(f"its tables are not those of schema version {version}")
            elif (answer := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(answer)
        except BaseException:
            db.close()
            raise
        return db

    def _set_file_aside(self, error: Exception) -> None:
        aside = f"{self.path}.set-aside-{time.time_ns()}"
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(self.path + suffix):
                os.rename(self.path + suffix, aside + suffix)
        self.note_set_aside(f"{self.path} ({error}) is now {aside}")

    def note_set_aside(self, words: str) -> None:
        """Something that could not be read: in `set_aside`, and in the agent's log for whoever wonders where it is."""
        self.set_aside.append(words)
        log.warning("set aside: %s", words)

    def close(self) -> None:
        """Closes the file; what is pending is written."""
        self._retry_at = 0.0
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
        if self.trouble is None:
            try:
                if events:
                    self._db.executemany(_INSERT_EVENT, events)
                self._run("COMMIT")
            except sqlite3.Error as error:
                self._roll_back()
                if not _is_unwritable(error):
                    raise
                if decides:
                    del self.pending[self._kept :]
                    raise self._cannot_write(error) from error
                self.trouble = error
        if self.trouble is not None:
            self._backlog += said
            self._unwritten += events
        if events:
            self.pending = []
            self.seq = seq
            self.on_commit()

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
        if not _is_unwritable(error):
            raise error
        if decides:
            raise self._cannot_write(error) from error
        self.trouble = error

    def _catch_up(self) -> None:
        """Writes the backlog; sqlite3.Error if that is still impossible. Trying takes a tenth of the time at most."""
        began = time.monotonic()
        if self.trouble is None or (began < self._retry_at and not self._decides):
            return
        try:
            self._run("BEGIN IMMEDIATE")
            for said in self._backlog:
                self._carry_out(said)
            self._db.executemany(_INSERT_EVENT, self._unwritten)
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
    def is_removed(self) -> bool:
        """Whether the file has no name any more, or another one has it."""
        return _identity(self.path) != self._identity

    def check_writable(self) -> None:
        """LaunchError while the ledger cannot be written: before anything is begun that would have to be.

        Also when its file has been removed, though what is written still goes somewhere: no agent after this one could read it.
        """
        if self.is_removed:
            hint = "meso agent --stop ends what runs; then the next verb starts anew"
            raise LaunchError("the ledger has been removed, so nothing new is started", target=self.path, hint=hint)
        if self.trouble is not None:
            self._retry_at = 0.0
            self.flush()
        if self.trouble is not None:
            raise self._cannot_write(self.trouble)

    def _cannot_write(self, error: sqlite3.Error) -> LaunchError:
        place = os.path.dirname(self.path)
        return LaunchError(
            f"the ledger cannot be written ({error}), so nothing new is started",
            target=self.path,
            errno="ENOSPC" if getattr(error, "sqlite_errorcode", 0) & _PRIMARY == sqlite3.SQLITE_FULL else None,
            have=_space(place),
            hint=f"make room in {place}; what runs goes on, and can be waited for, killed and removed meanwhile",
        )

    def flush(self) -> None:
        """Writes pending events, and what could not be written before, if there are any."""
        if self.pending or self.trouble is not None:
            with self:
                pass


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _space(directory: str) -> str | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return f"{status.f_bavail * status.f_frsize} bytes and {status.f_favail} files free"


_INSERT_EVENT = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)"
