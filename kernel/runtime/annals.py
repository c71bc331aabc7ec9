"""The durable file of what has been: SQLite on disk, opened, locked, written with fsync, kept within a budget.

What lives here: tables, statements, what to do with a file that is damaged. What must not: what an event means (`recording`),
and trio: everything here may wait for a disk, so it is called from a thread. Theory: unlike the ledger this file must survive
the machine (WAL, synchronous=FULL: a commit that returned is on disk), and unlike the ledger nobody needs it to go on: whatever
fails here is told to whoever asks for the history, and to nobody else.

Equal parts of containers are kept once: in specs and plans the container's own id is put out of the way, so those of a
thousand pods made from one file are one text. Oldest first, what is over the budget is forgotten, and how much that was is kept.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
import zlib
from _blake2 import blake2b  # what is under hashlib, without OpenSSL: no attacker chooses among ids here
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from mesocosm.kernel.core.names import root_of

VERSION = 1
MOST_BYTES = 64 * 2**20  # of the file; what lives is never forgotten
MOST_CONTAINERS = 100_000
_AT_ONCE = 2_000  # containers forgotten in one transaction, at most
_RAW = b"\0"  # before a text that is kept as it is: what zlib makes begins otherwise
_ID, _ROOT = b"\0\xc1own id\xc1\0", b"\0\xc1root id\xc1\0"  # 0xc1 is never used by msgpack: these stand in no plan but by chance

TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # Specs and plans, compressed, by what they say.
    "CREATE TABLE texts (key INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, body BLOB NOT NULL)",
    """CREATE TABLE groups (key INTEGER PRIMARY KEY, id TEXT NOT NULL, state TEXT NOT NULL, planned REAL NOT NULL, ended REAL,
       exit INTEGER, blame TEXT, error BLOB, asked INTEGER)""",
    # One row for each life: ids are used again, lives are numbered. born and died are the numbers of its first and last change.
    """CREATE TABLE containers (key INTEGER PRIMARY KEY, id TEXT NOT NULL, life INTEGER NOT NULL, grp INTEGER NOT NULL,
       state TEXT NOT NULL, planned REAL NOT NULL, started REAL, ended REAL, born INTEGER NOT NULL, died INTEGER,
       wait BLOB, error BLOB, spec INTEGER, plan INTEGER)""",
    "CREATE UNIQUE INDEX lives ON containers (id, life)",
    "CREATE INDEX members ON containers (grp)",
    "CREATE INDEX living ON containers (key) WHERE died IS NULL",
    # Every change of a state, in the order in which it was written down: the clock may have been set back in between.
    "CREATE TABLE changes (n INTEGER PRIMARY KEY, time REAL NOT NULL, container INTEGER NOT NULL, state TEXT NOT NULL)",
    "CREATE INDEX moves ON changes (container)",
)


class GroupLine(NamedTuple):
    """A row of `groups`."""

    key: int
    id: str
    state: str
    planned: float
    ended: float | None = None
    exit: int | None = None
    blame: str | None = None
    error: bytes | None = None
    asked: int | None = None  # the uid of who asked for it


class Line(NamedTuple):
    """A row of `containers`."""

    key: int
    id: str
    life: int
    grp: int
    state: str
    planned: float
    started: float | None = None
    ended: float | None = None
    born: int = 0
    died: int | None = None
    wait: bytes | None = None
    error: bytes | None = None
    spec: int | None = None
    plan: int | None = None


class Change(NamedTuple):
    """A row of `changes`."""

    n: int
    time: float
    container: int
    state: str


class AnnalsError(Exception):
    """The history cannot be written or read now; the text says why."""


class Annals:
    """One open file. Every method may wait for a disk, and raise sqlite3.Error or OSError."""

    def __init__(self, path: str, *, most_bytes: int = MOST_BYTES, most: int = MOST_CONTAINERS) -> None:
        """Opens, or makes; a damaged file is set aside and named in `set_aside`. AnnalsError if another agent writes it."""
        self.path = path
        self.set_aside: list[str] = []
        self._most_bytes, self._most = most_bytes, most
        self._texts: dict[bytes, int] = {}
        self._lock = _lock(path)
        try:
            self._db = self._open()
        except BaseException:
            os.close(self._lock)
            raise
        self._run = self._db.execute
        self.count = self._run("SELECT count(*) FROM containers").fetchone()[0]

    def _open(self) -> sqlite3.Connection:
        try:
            return self._open_once()
        except sqlite3.DatabaseError as error:
            # As for the ledger: only a file that is not what it should be is damaged. One that cannot be read now is not.
            if type(error) is sqlite3.OperationalError and _code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise
            aside = f"{self.path}.set-aside-{time.time_ns()}"
            for suffix in ("", "-wal", "-shm"):
                if os.path.exists(self.path + suffix):
                    os.rename(self.path + suffix, aside + suffix)
            self.set_aside.append(f"{self.path} ({error}) is now {aside}")
        return self._open_once()

    def _open_once(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))  # specs hold secrets
        os.chmod(self.path, 0o600)
        db = sqlite3.connect(self.path, isolation_level=None, timeout=1.0, check_same_thread=False)
        try:
            # SQLite answers a write or sync that failed here with the mode of before, in which a commit is not yet on disk.
            if (mode := db.execute("PRAGMA journal_mode = WAL").fetchone()[0]) != "wal":
                words = "there was an I/O error, or its file system cannot have one"
                raise AnnalsError(f"{self.path} is in mode {mode!r} and not with a write-ahead log: {words}")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA wal_autocheckpoint = 500")  # pages
            db.execute("PRAGMA journal_size_limit = 4194304")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.execute("BEGIN IMMEDIATE")
                for statement in TABLES:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {VERSION}")
                db.execute("COMMIT")
            elif version != VERSION:
                raise sqlite3.DatabaseError(f"schema version {version}, this build reads {VERSION}")
            elif (answer := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(answer)
            else:
                # What an fsync that failed left in the page cache only is written once more, elsewhere, and synced.
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            _sync_directory(os.path.dirname(self.path))  # of the log's name: SQLite ignores it if that fails
        except BaseException:
            db.close()
            raise
        return db

    def close(self) -> None:
        """Closes the file, and lets another agent have it."""
        with suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    # -- writing ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A transaction. Nothing of it is there unless `commit` returns."""
        self._run("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """When this returns it is on disk, as far as the disk tells the truth."""
        self._run("COMMIT")

    def roll_back(self) -> None:
        """Gives up what is not committed."""
        self._texts.clear()
        if self._db.in_transaction:
            self._run("ROLLBACK")

    def put(self, groups: Iterable[GroupLine], lines: Iterable[Line], changes: Iterable[Change]) -> None:
        """Rows as they are from now on."""
        many = self._db.executemany
        many("INSERT OR REPLACE INTO groups VALUES (?,?,?,?,?,?,?,?,?)", groups)
        many("INSERT OR REPLACE INTO containers VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)", lines)
        many("INSERT INTO changes VALUES (?,?,?,?)", changes)

    def text(self, blob: bytes, container_id: str) -> int:
        """The key of a spec or plan: an old one if there is one that says the same of another container."""
        own, root = container_id.encode(), root_of(container_id).encode()
        template = blob.replace(own, _ID)
        if root != own:
            template = template.replace(root, _ROOT)
        digest = blake2b(template, digest_size=16).digest()
        key = self._texts.get(digest)
        if key is None:
            found = self._run("SELECT key FROM texts WHERE digest = ?", (digest,)).fetchone()
            if found is None:
                is_same = template.replace(_ROOT, root).replace(_ID, own) == blob
                body = zlib.compress(template, 6) if is_same else _RAW + blob
                key = self._run("INSERT INTO texts (digest, body) VALUES (?, ?)", (digest, body)).lastrowid
            else:
                key = found[0]
            if len(self._texts) > 1024:
                self._texts.clear()
            self._texts[digest] = int(key or 0)
        return int(key or 0)

    def set_meta(self, **values: object) -> None:
        """Lines about the whole file."""
        self._db.executemany(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
            [(key, str(value)) for key, value in values.items()],
        )

    def prune(self) -> int:
        """Forgets the oldest ended containers that are over the budget, some at a time; how many that were."""
        pages, free, size = (self._run(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size"))
        over = max(0, self.count - self._most)
        if (used := (pages - free) * size) > self._most_bytes:
            over = max(over, int(self.count * (used - self._most_bytes * 0.95) / used) + 1)
        if not over:
            return 0
        rows = self._run(
            "SELECT key, grp, ended FROM containers WHERE died IS NOT NULL ORDER BY key LIMIT ?", (min(over, _AT_ONCE),)
        ).fetchall()
        if not rows:
            return 0
        self.begin()
        keys = [(row[0],) for row in rows]
        self._db.executemany("DELETE FROM changes WHERE container = ?", keys)
        self._db.executemany("DELETE FROM containers WHERE key = ?", keys)
        self._db.executemany(
            "DELETE FROM groups WHERE key = ?1 AND NOT EXISTS (SELECT 1 FROM containers WHERE grp = ?1)",
            [(found,) for found in {row[1] for row in rows}],
        )
        self._run("DELETE FROM texts WHERE key NOT IN (SELECT spec FROM containers WHERE spec IS NOT NULL"
                  " UNION SELECT plan FROM containers WHERE plan IS NOT NULL)")  # fmt: skip
        self._texts.clear()
        until = max(float(self.meta("forgotten_until") or 0), *(row[2] or 0 for row in rows))
        self.set_meta(forgotten=int(self.meta("forgotten") or 0) + len(rows), forgotten_until=until)
        self.count -= len(rows)
        self.commit()
        return len(rows)

    # -- reading ------------------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """Such a line."""
        row = self._run("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def last(self, table: str, column: str = "key") -> int:
        """The largest key in a table."""
        return int(self._run(f"SELECT coalesce(max({column}), 0) FROM {table}").fetchone()[0])

    def life(self, container_id: str) -> int:
        """The number of the latest life of that id; 0 if none is known."""
        return int(self._run("SELECT coalesce(max(life), 0) FROM containers WHERE id = ?", (container_id,)).fetchone()[0])

    def open_lines(self) -> list[Line]:
        """Those that have not ended, as far as is written here."""
        return [Line(*row) for row in self._run("SELECT * FROM containers WHERE died IS NULL ORDER BY key")]

    def group(self, key: int) -> GroupLine | None:
        """The group of that key."""
        row = self._run("SELECT * FROM groups WHERE key = ?", (key,)).fetchone()
        return GroupLine(*row) if row else None

    def members(self, group: int) -> list[Line]:
        """Its containers."""
        return [Line(*row) for row in self._run("SELECT * FROM containers WHERE grp = ? ORDER BY key", (group,))]

    def find(self, container_id: str, life: int | None = None) -> Line | None:
        """One life of an id: the latest, or that number."""
        row = self._run(
            "SELECT * FROM containers WHERE id = ?1 AND (?2 IS NULL OR life = ?2) ORDER BY life DESC LIMIT 1", (container_id, life)
        ).fetchone()
        return Line(*row) if row else None

    def changes(self, container: int) -> list[Change]:
        """What became of one, in order."""
        return [Change(*row) for row in self._run("SELECT * FROM changes WHERE container = ? ORDER BY n", (container,))]

    def page(self, within: str | None, before: int | None, since: float | None, limit: int) -> list[Line]:
        """The latest lives first, from before the key `before`: of one id and what is below it, or of all; those that were
        there at `since` or later."""
        rows = self._run(
            "SELECT * FROM containers WHERE (?1 IS NULL OR id = ?1 OR (id > ?1 || '.' AND id < ?1 || '/'))"
            " AND (?2 IS NULL OR key < ?2) AND (?3 IS NULL OR ended IS NULL OR ended >= ?3) ORDER BY key DESC LIMIT ?4",
            (within, before, since, limit),
        )
        return [Line(*row) for row in rows]

    def at(self, moment: float, within: str | None, after: int, limit: int) -> list[tuple[Line, str]]:
        """Who was there at a moment, and in which state; keys above `after`.

        A moment is a place in the order of changes: right after the last one that was stamped no later. So what is shown has
        been true at some time, whatever was done to the clock, and a later moment never shows an earlier state.
        """
        found = self._run("SELECT n FROM changes WHERE time <= ? ORDER BY n DESC LIMIT 1", (moment,)).fetchone()
        if found is None:
            return []
        rows = self._run(
            "SELECT *, (SELECT state FROM changes WHERE container = c.key AND n <= ?1 ORDER BY n DESC LIMIT 1)"
            " FROM containers AS c WHERE born <= ?1 AND (died IS NULL OR died > ?1)"
            " AND (?2 IS NULL OR id = ?2 OR (id > ?2 || '.' AND id < ?2 || '/')) AND key > ?3 ORDER BY key LIMIT ?4",
            (found[0], within, after, limit),
        )
        return [(Line(*row[:-1]), row[-1]) for row in rows]

    def read_text(self, key: int | None, container_id: str) -> bytes | None:
        """A spec or plan as it was of that container."""
        row = self._run("SELECT body FROM texts WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row[0].startswith(_RAW):
            return bytes(row[0][len(_RAW) :])
        template: bytes = zlib.decompress(row[0])
        return template.replace(_ROOT, root_of(container_id).encode()).replace(_ID, container_id.encode())


def _lock(path: str) -> int:
    """The right to write this history: two run directories may have one state directory, and only one agent of them writes."""
    fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise AnnalsError(f"another agent writes {path}: give this one a MESOCOSM_STATE_DIR of its own") from None
        raise
    return fd


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
