"""What can still be read of a ledger that is damaged, newer or somebody else's: row by row, into a new one.

What lives here: reading SQLite's two files without SQLite (a log of pages over a file of pages), and taking every row that
SQLite then finds in the result. What must not: judging rows (`seal`, `recovery`), moving files (`premises`). Source:
sqlite.org/fileformat2.html, chapters 1 and 4.

Theory: SQLite gives up a log at the first frame with a wrong checksum, and everything after it without a word; a file, at
the first page that makes no sense. Both hold what containers live by. So the pages are put together here, wrong ones and
all, in memory (a full file system is no obstacle, and the files stay as they were), and are read table by table from both
ends and then key by key; what a row is worth, its checksum says. A first page that is gone is taken from an empty ledger:
every ledger's tables begin at the same pages.
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

from mesocosm.kernel.runtime import schema

_LOG_HEADER = struct.Struct(">8I")  # magic, version, page size, checkpoint, salt, salt, checksum, checksum
_FRAME_HEADER = struct.Struct(">6I")  # page, pages of the file if it ends a transaction, salt, salt, checksum, checksum
_LITTLE, _BIG = 0x377F0682, 0x377F0683
_MASK = 0xFFFFFFFF
_MOST = 1 << 28  # bytes of a file that is read; a ledger has a few million
_MOST_KEYS = 100_000  # that are tried one by one


class Found(NamedTuple):
    """All rows that could be read, by table and with the columns that they had there; what is wrong, in words."""

    rows: dict[str, list[dict[str, Any]]]
    troubles: list[str]
    version: int


def salvage(path: str) -> Found:
    """Everything that is left of the ledger at `path` and its log. Reads both once and changes nothing. OSError."""
    page_size, image = _image(path)
    pages = _with_first_page(image, page_size)
    troubles: list[str] = []
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.deserialize(pages)
        db.execute("PRAGMA writable_schema = ON")  # a file that has lost its end, or a table of it, is read all the same
        version = _first(db, "PRAGMA user_version")
        has = schema.columns(db)
        rows: dict[str, list[dict[str, Any]]] = {}
        for table, needed in schema.wanted().items():
            common = [column for column in needed if column in has.get(table, ())]
            if not common:
                troubles.append(f"there is no table {table}")
                rows[table] = []
                continue
            rows[table] = _rows_of(db, table, common, troubles)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # not even the list of its tables
        return Found({}, [str(error)], 0)
    finally:
        db.close()
    return Found(rows, troubles, version)


def lost_frames(path: str) -> int:
    """How many frames of the log of the ledger at `path` SQLite would pass over though a transaction ended in or after them.

    0 for a log that is whole, that is missing, or whose last transaction was not finished. OSError.
    """
    data = _read(path + "-wal")
    frames = list(_frames(data))
    last = max((number for number, frame in enumerate(frames, 1) if frame.ends), default=0)
    if not last:
        return 0 if len(data) < _LOG_HEADER.size or _is_header(data) else len(data)
    return max(0, last - _valid(data))


def fill(db: sqlite3.Connection, found: Found) -> int:
    """Writes what was found into an empty ledger, in the caller's transaction; how many rows did not fit into it."""
    lost = 0
    for table, rows in found.rows.items():
        for row in rows:
            names, marks = ", ".join(row), ", ".join("?" * len(row))
            try:
                db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row.values()))
            except sqlite3.IntegrityError:  # twice the same key, or nothing where there must be something
                lost += 1
    return lost


# -- pages ---------------------------------------------------------------------------------------------------------


class _Frame(NamedTuple):
    page: int
    ends: int  # the size of the file in pages, after a transaction that ends here; else 0
    at: int  # where its page begins


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_MOST)
    except FileNotFoundError:
        return b""


def _is_header(data: bytes) -> bool:
    magic, version, page_size, *_ = _LOG_HEADER.unpack_from(data)
    return magic in (_LITTLE, _BIG) and version == 3007000 and page_size == _page_size(page_size)


def _page_size(found: int) -> int:
    return found if 512 <= found <= 65536 and not found & (found - 1) else 4096


def _frames(data: bytes) -> Iterator[_Frame]:
    """The frames that were written since the log was begun anew, whatever their checksums are."""
    if len(data) < _LOG_HEADER.size:
        return
    page_size = _page_size(_LOG_HEADER.unpack_from(data)[2])
    step = _FRAME_HEADER.size + page_size
    salts = [data[at + 8 : at + 16] for at in range(_LOG_HEADER.size, len(data) - step + 1, step)]
    salt = data[16:24]
    if salts and salt not in salts[:2]:  # the header's own is damaged: that of the first frame is as good
        salt = salts[0]
    # Frames of an earlier round come after those of this one; one with a damaged salt is among these.
    last = max((number for number, found in enumerate(salts) if found == salt), default=-1)
    for number in range(last + 1):
        at = _LOG_HEADER.size + number * step
        page, ends, *_ = _FRAME_HEADER.unpack_from(data, at)
        yield _Frame(page, ends, at + _FRAME_HEADER.size)


def _valid(data: bytes) -> int:
    """How many frames SQLite would believe."""
    if not _is_header(data):
        return 0
    magic, _, page_size, _, _, _, *told = _LOG_HEADER.unpack_from(data)
    swap = (magic == _BIG) != (struct.pack("=H", 1) == b"\0\1")
    state = _checksum((0, 0), data[:24], swap=swap)
    if list(state) != told:
        return 0
    step = _FRAME_HEADER.size + page_size
    for number, at in enumerate(range(_LOG_HEADER.size, len(data) - step + 1, step)):
        page, _, _, _, *told = _FRAME_HEADER.unpack_from(data, at)
        if data[at + 8 : at + 16] != data[16:24] or not page:
            return number
        state = _checksum(state, data[at : at + 8], swap=swap)
        state = _checksum(state, data[at + _FRAME_HEADER.size : at + step], swap=swap)
        if list(state) != told:
            return number
    return int((len(data) - _LOG_HEADER.size) // step)


def _checksum(state: tuple[int, int], data: bytes, *, swap: bool) -> tuple[int, int]:
    first, second = state
    words = array("I", data)
    if swap:
        words.byteswap()
    each = iter(words)
    for word in each:
        first = (first + word + second) & _MASK
        second = (second + next(each) + first) & _MASK
    return first, second


def _image(path: str) -> tuple[int, bytearray]:
    """(page size, the file as it would be with all of its log in it)."""
    data, log = bytearray(_read(path)), _read(path + "-wal")
    frames = list(_frames(log))
    page_size = _page_size(int.from_bytes(data[16:18], "big"))
    if frames:
        page_size = _page_size(_LOG_HEADER.unpack_from(log)[2])
    last = max((number for number, frame in enumerate(frames, 1) if frame.ends), default=0)
    most = len(data) // page_size + len(frames)  # a file has no more: a larger number in a frame is damage
    pages = max([len(data) // page_size, 1, *(frame.ends for frame in frames[:last] if frame.ends <= most)])
    data = data[: pages * page_size] + bytes(max(0, pages * page_size - len(data)))
    for page, _, at in frames[:last]:
        if 1 <= page <= pages:
            data[(page - 1) * page_size : page * page_size] = log[at : at + page_size]
    return page_size, data


def _with_first_page(data: bytearray, page_size: int) -> bytes:
    """The pages as a file that has no log, and that begins as a file of ours does."""
    if page_size > 4096 and len(data) % 4096 == 0:
        page_size = 4096
    data[18:20] = b"\1\1"
    if _is_readable(data):
        return bytes(data)
    empty = schema.blank()
    try:
        first = bytearray(empty.serialize()[:page_size])
    finally:
        empty.close()
    first[28:32] = (len(data) // page_size).to_bytes(4, "big")  # pages
    first[32:40] = bytes(8)  # no free ones: what they are is not known
    data[: len(first)] = first
    return bytes(data)


def _is_readable(data: bytearray) -> bool:
    db = sqlite3.connect(":memory:", isolation_level=None)
    try:
        db.deserialize(bytes(data))
        db.execute("PRAGMA writable_schema = ON")
        return bool(set(schema.columns(db)) & set(schema.wanted()))
    except (sqlite3.Error, UnicodeDecodeError, MemoryError):
        return False
    finally:
        db.close()


# -- rows ----------------------------------------------------------------------------------------------------------


def _first(db: sqlite3.Connection, statement: str) -> int:
    try:
        return int(db.execute(statement).fetchone()[0])
    except (sqlite3.Error, TypeError, ValueError):
        return 0


def _rows_of(db: sqlite3.Connection, table: str, columns: list[str], troubles: list[str]) -> list[dict[str, Any]]:
    """Every row of a table that can be reached: from its beginning, from its end, and between them by its number."""
    listed = ", ".join(columns)
    key = "rowid" if table in ("containers", "plans", "parked", "events", "aside") else columns[0]
    forward, problem = _until_it_breaks(db, f"SELECT {key}, {listed} FROM {table} ORDER BY {key}")
    found = dict(forward)
    if problem is not None:
        troubles.append(f"{table}: {problem}")
        backward, _ = _until_it_breaks(db, f"SELECT {key}, {listed} FROM {table} ORDER BY {key} DESC")
        found |= dict(backward)
        numbers = [number for number in found if isinstance(number, int)]
        if key == "rowid" and numbers:
            after = max((number for number, _ in forward), default=0)
            before = min((number for number, _ in backward), default=after + _MOST_KEYS)
            for number in range(after + 1, min(before, after + _MOST_KEYS)):
                with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                    for row in db.execute(f"SELECT {listed} FROM {table} WHERE rowid = ?", (number,)):
                        found[number] = row
    numbered = sorted(found.items(), key=lambda item: (str(type(item[0])), item[0]))
    return [dict(zip(columns, row, strict=True)) for _, row in numbered]


def _until_it_breaks(db: sqlite3.Connection, statement: str) -> tuple[list[tuple[Any, tuple[Any, ...]]], Exception | None]:
    rows: list[tuple[Any, tuple[Any, ...]]] = []
    db.text_factory = _as_text
    try:
        for key, *row in db.execute(statement):
            rows.append((key, tuple(row)))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        return rows, error
    return rows, None


def _as_text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
