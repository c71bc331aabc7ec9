"""The ledger's tables, with a version from the first day.

A file of another version, or one that is not ours, is set aside by `book`. Rows hold ids, states and times in columns
(what is looked up and what `sqlite3` shows to a person) and everything else as msgpack.
"""

from __future__ import annotations

VERSION = 3

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
)
