"""Linking: a table gets its addresses and descriptors, and the rows that close what is not the container's.

Runs in the launcher, for every container, so it is written to be quick; it makes no system call itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache

from mesocosm.kernel.launcher.table import HEAD_BYTES, NO_DESCRIPTORS, OK_ANY, ROW_BYTES, ROW_WORDS, SLOTS, Table, pairs
from mesocosm.kernel.linux.constants import CLONE_PARENT, SYS
from mesocosm.kernel.linux.libc import address_of

_ROW = struct.Struct("=10q")
_LAST = 2**32 - 1  # close_range(2): "to the end"


class Linked:
    """A table at an address: `rows` rows from `first_row` on, of which row `entry` … `entry + inserted` are ours."""

    __slots__ = ("_buffer", "address", "entry", "inserted", "rows")

    def __init__(self, buffer: bytearray, address: int, rows: int, entry: int, inserted: int) -> None:
        self._buffer = buffer
        self.address = address
        self.rows = rows
        self.entry = entry
        self.inserted = inserted

    @property
    def buffer(self) -> bytearray:
        """The bytes themselves; must not be resized."""
        return self._buffer

    def original_row(self, row: int) -> int:
        """The number that row `row` of this buffer has in the table that was sent."""
        if row < self.entry:
            return row
        return max(self.entry, row - self.inserted)


def closing_rows(keep: Iterable[int]) -> bytes:
    """Rows that close every descriptor from 3 on but those in `keep`."""
    rows = bytearray()
    low = 3
    for fd in (*sorted({fd for fd in keep if fd >= 3}), None):
        high = _LAST if fd is None else fd - 1
        if high >= low:
            rows += _ROW.pack(SYS["close_range"], low, high, 0, 0, 0, 0, 0, 0, OK_ANY)
        if fd is not None:
            low = fd + 1
    return bytes(rows)


def link(table: Table, fds: Sequence[int], specials: Sequence[int], cradle: int | None = None) -> Linked:
    """`table` with the received descriptors `fds` and the values of SPECIALS filled in, in a buffer of its own.

    Kept open in the child: the received descriptors and those specials that the table mentions. `cradle`: the address
    to which the cradle will read the buffer; its first clone is then made on behalf of the cradle's parent.
    """
    used = set(table.special_to) - NO_DESCRIPTORS
    closing = closing_rows((*fds, *(specials[number] for number in used)))
    inserted = len(closing) // ROW_BYTES
    cut = table.entry * ROW_BYTES
    buffer = bytearray().join((bytes(HEAD_BYTES), table.rows[:cut], closing, table.rows[cut:], table.blob))
    address = address_of(buffer) if cradle is None else cradle
    words = memoryview(buffer).cast("q")
    shift = inserted * ROW_WORDS
    cut_words = table.entry * ROW_WORDS
    limit = SLOTS + cut_words
    blob = address + HEAD_BYTES + len(table.rows) + len(closing)
    for first, start, pointers, slots, in_blob in table.parts:
        base = SLOTS + first if first < cut_words else SLOTS + first + shift
        beginning = blob + start
        for at, to in _kept_pairs(pointers):
            words[base + at] = beginning + to
        for at, to in _kept_pairs(slots):
            words[base + at] = address + 8 * to
        if in_blob:
            base = (beginning - address) // 8
            for at, to in pairs(in_blob):
                words[base + at] = beginning + to
    for at, to in zip(table.passed_at, table.passed_to, strict=True):
        words[at if at < limit else at + shift] = fds[to]
    for at, to in zip(table.special_at, table.special_to, strict=True):
        words[at if at < limit else at + shift] = specials[to]
    if cradle is not None:
        arguments = (HEAD_BYTES + len(table.rows) + len(closing)) // 8
        words[arguments] |= CLONE_PARENT
        words[arguments + _EXIT_SIGNAL] = 0  # CLONE_PARENT takes the cradle's own; naming one is EINVAL
    words.release()
    return Linked(buffer, address, (len(table.rows) + len(closing)) // ROW_BYTES, table.entry, inserted)


@lru_cache(maxsize=64)
def _kept_pairs(packed: bytes) -> list[tuple[int, int]]:
    """Most parts come again with every container."""
    return list(pairs(packed))


_EXIT_SIGNAL = 4  # word of struct clone_args
