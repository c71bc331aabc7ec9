"""The ledger's tables, with a version from the first day, and how a file of an older version becomes one of this.

What lives here: statements, and the difference between two sets of tables. What must not: opening files (`book`), what is
done with one that is no ledger (`salvage`). Rows hold ids, states and times in columns (what is looked up and what
`sqlite3` shows to a person) and everything else as msgpack with a checksum before it (`seal`).

Theory: a new version only ever adds, columns that may be NULL and tables. So an older file is brought up where it is, in
one transaction, by adding what it lacks: whoever adds a column adds it to TABLES and nowhere else. A newer file is never
written to: this build takes from it what it knows (`salvage`) and sets it aside whole.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from mesocosm.kernel.runtime.seal import seal, sealed_line

VERSION = 3
OLDEST = 2  # the oldest that is brought up to this one

TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # One row per launch: a pod, or a nested group (id PARENT+N, which is no container's id).
    """CREATE TABLE groups (id TEXT PRIMARY KEY, barrier TEXT NOT NULL, executor TEXT NOT NULL, state TEXT NOT NULL,
       blame TEXT, error BLOB) WITHOUT ROWID""",
    """CREATE TABLE containers (id TEXT PRIMARY KEY, grp TEXT NOT NULL, state TEXT NOT NULL, plan INTEGER NOT NULL,
       spec BLOB NOT NULL, base INTEGER, pid INTEGER, started REAL, ended REAL, wait BLOB, error BLOB, reason TEXT, birth TEXT)""",
    # Plans outlive their containers as long as an event refers to them.
    "CREATE TABLE plans (key INTEGER PRIMARY KEY, body BLOB NOT NULL)",
    # All that a container's launch intended, in the order of making: one row, since all of it is written at once. Of one
    # that is DEAD only what is kept is left. container '': what all containers of the agent share.
    "CREATE TABLE entries (container TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
    # What could not be undone, and why. It outlives its container's record.
    "CREATE TABLE parked (seq INTEGER PRIMARY KEY, container TEXT NOT NULL, entry BLOB NOT NULL, note TEXT NOT NULL)",
    # One row covers `count` numbers: lines that the plan can tell are not stored one by one.
    """CREATE TABLE events (seq INTEGER PRIMARY KEY, count INTEGER NOT NULL, time REAL NOT NULL, id TEXT NOT NULL,
       type TEXT NOT NULL, plan INTEGER, body BLOB)""",
    # What could not be read, in words, and what was there instead. Until somebody has seen it (`meso doctor`).
    "CREATE TABLE aside (seq INTEGER PRIMARY KEY, time REAL NOT NULL, said TEXT NOT NULL, body BLOB)",
)

Columns = dict[str, dict[str, str]]  # table → column → its type, as declared


def make(db: sqlite3.Connection) -> None:
    """All tables, in a file that has none. The caller's transaction."""
    for statement in TABLES:
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {VERSION}")


def columns(db: sqlite3.Connection) -> Columns:
    """What a file has."""
    listed = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    names = [row[0] for row in listed if isinstance(row[0], str)]
    return {name: {str(row[1]): str(row[2]) for row in db.execute(f"PRAGMA table_info({_quoted(name)})")} for name in names}


def shape(db: sqlite3.Connection) -> dict[str, list[tuple[object, ...]]]:
    """The same with all that keeps rows apart: what may be missing, what is a key."""
    return {
        table: sorted((*row[1:4], row[5]) for row in db.execute(f"PRAGMA table_info({_quoted(table)})")) for table in columns(db)
    }


def blank() -> sqlite3.Connection:
    """An empty ledger in memory."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    make(db)
    return db


def wanted() -> Columns:
    """What a file of this version has."""
    db = blank()
    try:
        return columns(db)
    finally:
        db.close()


def is_whole(db: sqlite3.Connection) -> bool:
    """Whether a file has exactly what one of this version has."""
    empty = blank()
    try:
        return shape(db) == shape(empty)
    finally:
        empty.close()


def migrate(db: sqlite3.Connection, version: int) -> None:
    """Makes an older file one of this version, in one transaction: wholly, or not at all. sqlite3.Error if it is no such file."""
    db.execute("BEGIN IMMEDIATE")
    try:
        has, made = columns(db), {statement.split()[2]: statement for statement in TABLES}
        for table, needed in wanted().items():
            if table not in has:
                db.execute(made[table])
                continue
            for column, kind in needed.items():
                if column not in has[table]:
                    db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {kind}")
        if version == OLDEST:
            _seal_all(db)
        db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _seal_all(db: sqlite3.Connection) -> None:
    """Version 2 had no checksums."""

    def all_of(statement: str) -> list[tuple[Any, ...]]:
        return db.execute(statement).fetchall()

    for key, value in all_of("SELECT key, value FROM meta"):
        db.execute("UPDATE meta SET value = ? WHERE key = ?", (sealed_line(value, key), key))
    for id_, group, plan, base, spec, wait in all_of("SELECT id, grp, plan, base, spec, wait FROM containers"):
        row = (seal(spec, id_, group, plan, base), seal(wait, id_) if wait is not None else None, id_)
        db.execute("UPDATE containers SET spec = ?, wait = ? WHERE id = ?", row)
    for key, body in all_of("SELECT key, body FROM plans"):
        db.execute("UPDATE plans SET body = ? WHERE key = ?", (seal(body, key), key))
    for container, body in all_of("SELECT container, body FROM entries"):
        db.execute("UPDATE entries SET body = ? WHERE container = ?", (seal(body, container), container))
    for seq, container, entry in all_of("SELECT seq, container, entry FROM parked"):
        db.execute("UPDATE parked SET entry = ? WHERE seq = ?", (seal(entry, container), seq))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
