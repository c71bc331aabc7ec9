"""From a path to an open ledger of this version: made, migrated, or put together from what is left of a damaged one.

What lives here: what SQLite is told when a file is opened, and what its errors mean. What must not: transactions (`book`),
what is read from a damaged file and how (`salvage`).

Theory: three things can be wrong with a file, and each has another answer. It cannot be written *now* (no room, no
descriptor, somebody else's lock): nothing is touched, and whoever asked is told. It is damaged, or not ours, or of a newer
version: it is set aside whole, and a new one begins with every row that could be read. Its names lead to something that is
no file of ours (`premises`): that goes out of the way.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Callable

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.runtime import schema
from mesocosm.kernel.runtime.premises import cannot, finish_replacing, make_private, replace
from mesocosm.kernel.runtime.salvage import fill, lost_frames, salvage

log = logging.getLogger("mesocosm.ledger")
_UNWRITABLE = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
    | {sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM}
)
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_PRIMARY = 0xFF  # the low byte of an extended result code, sqlite3.h
_NEW = ".new"  # what is about to take the place of a damaged file
_AGAIN = ".again"  # what is open here and is being written once more; half of it is worth nothing


def is_unwritable(error: sqlite3.Error) -> bool:
    """Whether this is about the machine, now, and not about the file."""
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _UNWRITABLE


def is_damage(error: sqlite3.Error) -> bool:
    """Whether this is about what is in the file."""
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _DAMAGED


def is_trouble(error: sqlite3.Error) -> bool:
    """Whether this is about either; anything else is a mistake of ours."""
    return is_unwritable(error) or is_damage(error)


def connect(path: str) -> sqlite3.Connection:
    """A file that is ours alone. It needs no memory shared with others (which would take room, and a file that may be cut
    short below us), no file for what is temporary, and no descriptor later on."""
    db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("PRAGMA temp_store = MEMORY")
    db.execute("PRAGMA mmap_size = 0")
    db.execute("PRAGMA synchronous = OFF")
    db.text_factory = _as_text
    return db


def _as_text(data: bytes) -> str:
    """A damaged name is another name, and not an error that hides all others."""
    return data.decode("utf-8", "replace")


def open_file(path: str, note: Callable[[str], None]) -> sqlite3.Connection:
    """The ledger at `path`, of this version and whole; what was not is out of the way, and `note` told of it.

    LaunchError if it cannot be opened, or no other be written in its place.
    """
    finish_replacing(path, path + _NEW)
    with contextlib.suppress(OSError):
        os.unlink(path + _AGAIN)
    for said in make_private(path):
        note(said)
    try:
        if lost := lost_frames(path):
            raise sqlite3.DatabaseError(f"its log is damaged, and SQLite would pass over {lost} pages of it")
        if not os.path.getsize(path) and os.path.exists(path + "-wal") and os.path.getsize(path + "-wal"):
            raise sqlite3.DatabaseError("it is empty, and its log is not")  # which SQLite would remove
        return _open_once(path)
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter of SQLite's own words about what it read
        if isinstance(error, sqlite3.Error) and is_unwritable(error):
            raise cannot_write(path, error) from error
        _replace(path, error, note)
    return _open_once(path)


def _open_once(path: str) -> sqlite3.Connection:
    db = connect(path)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        is_new = version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not is_new and not schema.OLDEST <= version <= schema.VERSION:  # not ours to change
            raise sqlite3.DatabaseError(f"schema version {version}, this build reads {schema.OLDEST} to {schema.VERSION}")
        if (mode := db.execute("PRAGMA journal_mode = WAL").fetchone()[0]) != "wal":  # SQLite's word for a write that failed
            error = sqlite3.OperationalError(f"no write-ahead log could be begun, its mode is {mode!r}")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        db.execute("PRAGMA wal_autocheckpoint = 0")  # see `empty_log`
        if is_new:
            db.execute("BEGIN IMMEDIATE")
            schema.make(db)
            db.execute("COMMIT")
            return db
        if (answer := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(answer)
        if version != schema.VERSION:
            schema.migrate(db, version)
            log.info("the ledger was of schema version %s and is of %s now", version, schema.VERSION)
        if not schema.is_whole(db):
            raise sqlite3.DatabaseError(f"its tables are not those of schema version {schema.VERSION}")
    except BaseException:
        db.close()
        raise
    empty_log(db, path)
    return db


def empty_log(db: sqlite3.Connection, path: str) -> None:
    """Carries what is in the log over into the file, and cuts the log to nothing; leaves it as it is if that cannot be done now.

    SQLite would begin anew at its front, over old frames. Whoever is killed between the head and the page of a frame that ends
    a transaction then leaves one that cannot be told from a damaged one; behind the end of a file it is merely too short.
    """
    with contextlib.suppress(sqlite3.Error, OSError):
        room = os.statvfs(path)
        if room.f_bavail * room.f_frsize > 2 * os.path.getsize(f"{path}-wal"):  # else it takes what others need, and fails
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _replace(path: str, error: Exception, note: Callable[[str], None]) -> None:
    """A new file with all that can be read of this one, which goes out of the way."""
    try:
        found = salvage(path)
        new = connect(path + _NEW)
        with contextlib.closing(new):
            new.execute("PRAGMA journal_mode = OFF")  # it counts only once it is whole
            new.execute("BEGIN IMMEDIATE")
            schema.make(new)
            lost = fill(new, found)
            new.execute("COMMIT")
            if found.version == schema.OLDEST:
                schema.migrate(new, schema.OLDEST)
        aside = replace(path, path + _NEW)
    except sqlite3.Error as problem:
        raise cannot_write(path, problem) from problem
    except OSError as problem:
        raise cannot("replacing the damaged ledger", problem, path) from problem
    counts = ", ".join(f"{len(rows)} {table}" for table, rows in found.rows.items() if rows) or "nothing"
    troubles = "; ".join([str(error), *found.troubles, *([f"{lost} rows did not fit"] if lost else [])])
    note(f"{path} ({troubles}) is now {aside}; read from it: {counts}")


def write_again(path: str, image: bytes) -> None:
    """What is open here and not to be found at `path` any more is written there; what is there goes out of the way.

    It gets the name of what may take the place only once it is whole: nothing else says so, where there is no old file.

    OSError, sqlite3.Error; then all is as it was.
    """
    finish_replacing(path, path + _NEW)
    again = path + _AGAIN
    with contextlib.suppress(FileNotFoundError):
        os.unlink(again)
    try:
        new = connect(again)
        with contextlib.closing(new), contextlib.closing(sqlite3.connect(":memory:")) as whole:
            whole.deserialize(image[:18] + b"\1\1" + image[20:])  # not one with a log beside it
            new.execute("PRAGMA journal_mode = OFF")
            whole.backup(new)
        os.rename(again, path + _NEW)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(again)
        raise
    replace(path, path + _NEW)


def cannot_write(path: str, error: sqlite3.Error | OSError) -> LaunchError:
    """The error of a decision that could not be written down."""
    place = os.path.dirname(path)
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY
    is_full = code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC
    hint = f"make room in {place}; what runs goes on, and can be waited for, killed and removed meanwhile"
    if code == sqlite3.SQLITE_BUSY:
        hint = f"somebody has it open: fuser {path}"
    elif code in _DAMAGED:
        hint = "what runs goes on; what can be read of it is read at the next try"
    return LaunchError(
        f"the ledger cannot be written ({error}), so nothing new is started",
        target=path,
        errno="ENOSPC" if is_full else None,
        have=_space(place),
        hint=hint,
    )


def _space(directory: str) -> str | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return f"{status.f_bavail * status.f_frsize} bytes and {status.f_favail} files free"
