"""The ledger: what has been made, what is about to be made, and how things ended. SQLite on tmpfs.

What lives here: statements. What must not: decisions. Theory: every transaction is one sentence that must be true
as a whole ("these entries exist from now on", "this group is committed", "this container is dead and nothing of it
is left"), and the events that tell about it are written by the same transaction. On tmpfs there is no disk to wait
for (synchronous=OFF): the file outlives the agent, and nothing outlives the machine.

A file or a row that cannot be read is set aside and named in `set_aside`; it never stops the agent.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self

from mesocosm.kernel.core.errors import ConflictError
from mesocosm.kernel.runtime import codec, schema


class EventRow(NamedTuple):
    """An event that is not numbered yet. It stands for `lines` lines; see `events.expand`."""

    lines: int
    time: float
    id: str
    type: str
    plan: int | None
    body: bytes | None


class ContainerRow(NamedTuple):
    """A container as stored; the blobs are decoded by who reads it."""

    id: str
    group: str
    state: str
    plan: int
    spec: bytes
    base: int | None
    pid: int | None
    started: float | None
    ended: float | None
    wait: bytes | None
    error: bytes | None
    reason: str | None  # why it has been told to end, if a client did


class EntryRow(NamedTuple):
    """One entry: what undoes it, how long it lives, and what is known about it."""

    seq: int
    container: str | None
    position: int
    kind: str
    undo: bytes
    keep: bool
    state: str
    note: str | None


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


class Ledger:
    """One open ledger. Use it as a context manager for a transaction: ``with ledger: ledger.intend(…)``."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.set_aside: list[str] = []  # what could not be read, in words
        self.pending: list[EventRow] = []  # written by the next transaction
        self.on_commit: Callable[[], None] = lambda: None
        self.seq = 0  # of the last event written
        self._db = self._open()
        self._run = self._db.execute
        self._depth = 0
        self.seq = self._run("SELECT coalesce(max(seq + count - 1), 0) FROM events").fetchone()[0]
        kept = self._run("SELECT value FROM meta WHERE key = 'seq'").fetchone()
        self.seq = max(self.seq, int(kept[0]) if kept else 0)
        self._plan = self._run("SELECT coalesce(max(key), 0) FROM plans").fetchone()[0]

    def _open(self) -> sqlite3.Connection:
        for attempt in (1, 2):
            db = None
            try:
                _make_private(self.path)
                db = sqlite3.connect(self.path, isolation_level=None, timeout=1.0)
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
            except sqlite3.DatabaseError as error:
                if db is not None:
                    db.close()
                if attempt == 2:
                    raise
                self._set_file_aside(error)
            else:
                return db
        raise AssertionError  # pragma: no cover - the loop returns or raises

    def _set_file_aside(self, error: Exception) -> None:
        aside = f"{self.path}.set-aside-{time.time_ns()}"
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(self.path + suffix):
                os.rename(self.path + suffix, aside + suffix)
        self.set_aside.append(f"{self.path} ({error}) is now {aside}")

    def close(self) -> None:
        """Closes the file; what is pending is written."""
        if self.pending:
            self.flush()
        self._db.close()

    def __enter__(self) -> Self:
        if not self._depth:
            self._run("BEGIN IMMEDIATE")
        self._depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if kind is not None:
            self._run("ROLLBACK")
            return
        pending = self.pending
        seq = self.seq
        if pending:
            rows = []
            for row in pending:
                rows.append((seq + 1, *row))
                seq += row.lines
            self._db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._run("COMMIT")
        if pending:
            self.pending = []
            self.seq = seq
            self.on_commit()

    def flush(self) -> None:
        """Writes pending events, if there are any."""
        if self.pending:
            with self:
                pass

    # -- what a run is ------------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """A line about the whole ledger (boot_id, run_id)."""
        row = self._run("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def set_meta(self, key: str, value: str) -> None:
        """Writes such a line."""
        self._run("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, value))

    # -- the sentences ------------------------------------------------------------------------------------------

    def next_plan(self) -> int:
        """A key for a plan: never used before in this ledger."""
        self._plan += 1
        return int(self._plan)

    def intend(
        self,
        group: tuple[str, str, str],
        containers: Iterable[tuple[str, str, int, bytes, int | None]],
        plans: Iterable[tuple[int, bytes]],
        entries: Iterable[tuple[str, int, str, bytes, bool]],
    ) -> None:
        """All of a launch before any of it exists.

        group (id, barrier, executor); containers (id, group, plan key, spec, uid base); entries (container,
        position, kind, undo, keep), in the order of making.
        """
        self._run("INSERT INTO groups (id, barrier, executor, state) VALUES (?, ?, ?, 'PREPARING')", group)
        many = self._db.executemany
        many("INSERT INTO containers (id, grp, state, plan, spec, base) VALUES (?, ?, 'PREPARING', ?, ?, ?)", containers)
        many("INSERT INTO plans VALUES (?, ?)", plans)
        many("INSERT INTO entries (container, position, kind, undo, keep, state) VALUES (?, ?, ?, ?, ?, 'intended')", entries)

    def adopt(self, group: tuple[str, str, str], container_id: str, plan: int, spec: bytes) -> None:
        """A container that was found running without a record, in the group (id, barrier, executor)."""
        self._run("INSERT OR IGNORE INTO groups (id, barrier, executor, state) VALUES (?, ?, ?, 'COMMITTED')", group)
        self._run(
            "INSERT INTO containers (id, grp, state, plan, spec) VALUES (?, ?, 'RUNNING', ?, ?)",
            (container_id, group[0], plan, spec),
        )

    def commit(self, group: str, started: Iterable[tuple[int, float, str]]) -> None:
        """The decision: from here the group only goes forward. `started` (pid, time, container)."""
        self._run("UPDATE groups SET state = 'COMMITTED' WHERE id = ?", (group,))
        self._db.executemany("UPDATE containers SET state = 'RUNNING', pid = ?, started = ? WHERE id = ?", started)

    def stopping(self, container_ids: Iterable[str], reason: str) -> None:
        """A client's decision that these end: an agent that comes after this one must know it."""
        self._db.executemany("UPDATE containers SET reason = ? WHERE id = ?", [(reason, found) for found in container_ids])

    def exited(self, container_id: str, ended: float, wait: bytes, error: bytes | None) -> None:
        """How it ended; what it had is still there."""
        self._run(
            "UPDATE containers SET state = 'DESTROYING', ended = ?, wait = ?, error = ? WHERE id = ?",
            (ended, wait, error, container_id),
        )

    def dead(
        self, container_id: str, ended: float, wait: bytes, error: bytes | None, parked: Sequence[tuple[int, str]] = ()
    ) -> None:
        """It is dead and nothing of it is left but what is kept, and what is parked: (position, note)."""
        self._run(
            "UPDATE containers SET state = 'DEAD', ended = ?, wait = ?, error = ? WHERE id = ?", (ended, wait, error, container_id)
        )
        for position, note in parked:
            self.park(container_id, position, note)
        self._run("DELETE FROM entries WHERE container = ? AND keep = 0 AND state != 'parked'", (container_id,))

    def park(self, container_id: str | None, position: int, note: str) -> None:
        """This entry could not be undone: `note` says why."""
        self._run(
            "UPDATE entries SET state = 'parked', note = ? WHERE container IS ? AND position = ?", (note, container_id, position)
        )

    def end_group(self, group: str, state: str, blame: str | None, error: bytes | None) -> None:
        """DEAD or ROLLED_BACK."""
        self._run("UPDATE groups SET state = ?, blame = ?, error = ? WHERE id = ?", (state, blame, error, group))

    def blame(self, group: str, blame: str | None, error: bytes | None) -> None:
        """Who decided the end of a group, while it is still ending."""
        self._run("UPDATE groups SET blame = ?, error = ? WHERE id = ?", (blame, error, group))

    def rolled_back(self, container_ids: Iterable[str], parked: Iterable[tuple[str, int, str]]) -> None:
        """Nothing of these is left (kept entries neither), except what is parked: (container, position, note)."""
        for container_id, position, note in parked:
            self.park(container_id, position, note)
        self._db.executemany("DELETE FROM entries WHERE container = ? AND state != 'parked'", ((found,) for found in container_ids))

    def remove(self, container_ids: Sequence[str], groups: Sequence[str]) -> None:
        """Forgets containers and groups; parked entries stay until they are undone."""
        ids = [(found,) for found in container_ids]
        self._db.executemany("DELETE FROM containers WHERE id = ?", ids)
        self._db.executemany("DELETE FROM entries WHERE container = ? AND state != 'parked'", ids)
        self._db.executemany("DELETE FROM groups WHERE id = ?", [(found,) for found in groups])

    def intend_host(self, position: int, kind: str, undo: bytes) -> None:
        """An effect for all containers of this agent."""
        self._run(
            "INSERT INTO entries (container, position, kind, undo, keep, state) VALUES (NULL, ?, ?, ?, 1, 'intended')",
            (position, kind, undo),
        )

    def drop_entries(self, seqs: Iterable[int]) -> None:
        """These have been undone."""
        self._db.executemany("DELETE FROM entries WHERE seq = ?", [(seq,) for seq in seqs])

    # -- reading ------------------------------------------------------------------------------------------------

    def groups(self) -> list[tuple[str, str, str, str, str | None, bytes | None]]:
        """All groups: (id, barrier, executor, state, blame, error)."""
        return self._run("SELECT id, barrier, executor, state, blame, error FROM groups").fetchall()

    def containers(self) -> list[ContainerRow]:
        """All containers in the order of their making."""
        rows = self._run(
            "SELECT id, grp, state, plan, spec, base, pid, started, ended, wait, error, reason FROM containers ORDER BY rowid"
        )
        return [ContainerRow(*row) for row in rows]

    def entries(self, where: str = "1", *values: Any) -> list[EntryRow]:
        """Entries in the order of making; `where` is SQL of ours, never a user's text."""
        rows = self._run(
            f"SELECT seq, container, position, kind, undo, keep, state, note FROM entries WHERE {where} ORDER BY seq", values
        )
        return [EntryRow(*row) for row in rows]

    def plan(self, key: int) -> bytes | None:
        """The stored plan of that key."""
        row = self._run("SELECT body FROM plans WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def events_after(self, since: int, limit: int) -> list[tuple[int, EventRow]]:
        """Stored rows that hold a line numbered above `since`, oldest first."""
        rows = self._run(
            "SELECT * FROM events WHERE seq >= coalesce((SELECT max(seq) FROM events WHERE seq <= ?), 0) ORDER BY seq LIMIT ?",
            (since, limit + 1),
        ).fetchall()
        return [(row[0], EventRow(*row[1:])) for row in rows if row[0] + row[1] > since + 1][:limit]

    def prune(self, keep: int) -> None:
        """Drops events older than the last `keep` numbers, except those of the living, and plans nobody refers to."""
        with self:
            self.set_meta("seq", str(self.seq))
            self._run(
                "DELETE FROM events WHERE seq <= ? AND id NOT IN (SELECT id FROM containers WHERE state != 'DEAD')",
                (self.seq - keep,),
            )
            self._run(
                "DELETE FROM plans WHERE key NOT IN "
                "(SELECT plan FROM events WHERE plan IS NOT NULL UNION SELECT plan FROM containers)"
            )

    def set_row_aside(self, container_id: str, error: Exception) -> None:
        """A container whose row cannot be decoded: out of the way, named; its entries stay and are undone."""
        self.set_aside.append(f"container {container_id}: {error}")
        self._run("DELETE FROM containers WHERE id = ?", (container_id,))


def encode_error(error: dict[str, Any] | None) -> bytes | None:
    """An error object for a column."""
    return None if error is None else codec.pack(error)
