"""The table of system calls that a newborn container walks through: its format, and a way to write it down.

Pure: no system call is made here. `compile` writes tables, `link` (in the launcher) puts addresses and
descriptors into them, a *walker* runs them in the cloned child.

One buffer holds everything:

    slots   SLOTS words of 8 bytes: results that later rows need (a descriptor that was just opened)
    rows    ROW_WORDS words each, see below
    blob    strings, structures, argument vectors

    row:    number, a0 … a5, out, expect, flags       (signed 64-bit words)

The walker's whole language is in `flags`:

    bits 0-1   OK_NONNEGATIVE  the result must not be negative
               OK_EQUAL        the result must equal `expect` (a barrier read that returns 0 is a failure)
               OK_ANY          whatever happens is fine
    bit 2      JUMP_IF_OK      after success go on `skip` rows further; a failure is no error, the next row follows
    bit 3      JUMP_IF_FAIL    after a failure go on `skip` rows further, and it is no error
    bit 4      RETURN_IF_ANY   (the first clone) give a result other than 0 back to the caller
    bit 5      LEAVE_IF_PARENT (an intermediate) a positive result ends this process: its child goes on
    bit 6      JUMP_IF_ZERO    after a result of 0 (in the child of an intermediate's clone) go on `skip` rows further
    bits 8-13  argument i is the address of a word: take the word
    bits 32-   skip

`out`, if not 0, is the address of a slot that gets the result. When a row fails, the walker writes a RECORD
with the row's number and the errno to the status descriptor and leaves with code 126.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from mesocosm.kernel.linux.constants import SYS

SLOTS = 16
ROW_WORDS = 10
ROW_BYTES = ROW_WORDS * 8
HEAD_BYTES = SLOTS * 8

OK_NONNEGATIVE = 0
OK_EQUAL = 1
OK_ANY = 2
JUMP_IF_OK = 1 << 2
JUMP_IF_FAIL = 1 << 3
RETURN_IF_ANY = 1 << 4
LEAVE_IF_PARENT = 1 << 5
JUMP_IF_ZERO = 1 << 6

# What a child says over its status socket: (row, errno, 0). Rows are numbered from 0; negative ones are news.
RECORD = struct.Struct("=iiq")
SAYS_USER = -2  # "my user namespace exists: write its maps, then send me one byte"
SAYS_STAGED = -1  # "I stand at the barrier"

# Descriptors and addresses that only the launcher knows.
SPECIALS = ("status", "barrier", "null", "pause", "parent", "host_mount", "pidfd_slot")


class Text(NamedTuple):
    """A NUL-terminated string in the blob."""

    value: bytes


class Data(NamedTuple):
    """Bytes in the blob, aligned to 8."""

    value: bytes


class Vector(NamedTuple):
    """A NULL-terminated array of pointers to strings in the blob: argv, envp."""

    values: tuple[bytes, ...]


class Slot(NamedTuple):
    """A result of an earlier row. Slot 0 is the container's root directory; the others serve within one step."""

    number: int


class Passed(NamedTuple):
    """The n-th descriptor passed along with this step."""

    number: int


class Special(NamedTuple):
    """One of SPECIALS."""

    name: str


class Pointers(NamedTuple):
    """A structure in the blob in which some 8-byte words are pointers: ((offset, what), …)."""

    value: bytes
    words: tuple[tuple[int, Data | Text | Special | Passed], ...]


Argument = int | Text | Data | Vector | Slot | Passed | Special | Pointers
ROOT = Slot(0)


class Fragment:
    """The rows of one step, position-independent: word and blob offsets count from its own start."""

    __slots__ = ("_seen", "blob", "blob_words", "in_blob", "passed", "slots", "specials", "words")

    def __init__(self) -> None:
        self.words: list[int] = []
        self.blob = bytearray()
        self.blob_words: list[tuple[int, int]] = []  # (word of the rows, offset in this blob)
        self.slots: list[tuple[int, int]] = []  # (word of the rows, slot)
        self.passed: list[tuple[int, bool, int]] = []  # (word, whether of the blob, number)
        self.specials: list[tuple[int, bool, int]] = []  # (word, whether of the blob, index in SPECIALS)
        self.in_blob: list[tuple[int, int]] = []  # (word of the blob, offset in this blob)
        self._seen: dict[bytes, int] = {}

    @property
    def rows(self) -> int:
        """How many rows there are so far."""
        return len(self.words) // ROW_WORDS

    def row(
        self, name: str, *arguments: Argument, out: Slot | None = None, expect: int | None = None, flags: int = 0, skip: int = 0
    ) -> None:
        """Appends one system call. `out` names the slot that gets the result; `expect` makes it OK_EQUAL."""
        start = len(self.words)
        if expect is not None:
            flags |= OK_EQUAL
        words = [SYS[name], 0, 0, 0, 0, 0, 0, 0, expect or 0, 0]
        for index, argument in enumerate(arguments, 1):
            if type(argument) is int:
                words[index] = argument
            elif isinstance(argument, Slot):
                self.slots.append((start + index, argument.number))
                flags |= 1 << (7 + index)
            else:
                self._refer(argument, start + index, words, index)
        if out is not None:
            self.slots.append((start + 7, out.number))
        words[9] = flags | skip << 32
        self.words += words

    def _refer(self, argument: Argument, at: int, words: list[int], index: int) -> None:
        match argument:
            case Text(value):
                self.blob_words.append((at, self._put(value + b"\0")))
            case Data(value):
                self.blob_words.append((at, self._put(value)))
            case Vector(values):
                offsets = [self._put(value + b"\0") for value in values]
                start = self._put(bytes(8 * len(offsets) + 8), share=False)
                self.in_blob += [(start // 8 + number, offset) for number, offset in enumerate(offsets)]
                self.blob_words.append((at, start))
            case Pointers(value, pointers):
                start = self._put(value, share=False)
                for offset, what in pointers:
                    word = (start + offset) // 8
                    if isinstance(what, Special):
                        self.specials.append((word, True, SPECIALS.index(what.name)))
                    elif isinstance(what, Passed):
                        self.passed.append((word, True, what.number))
                    else:
                        self.in_blob.append((word, self._put(what.value + (b"\0" if isinstance(what, Text) else b""))))
                self.blob_words.append((at, start))
            case Passed(number):
                self.passed.append((at, False, number))
            case Special(name):
                self.specials.append((at, False, SPECIALS.index(name)))
            case _:
                words[index] = int(argument)  # type: ignore[arg-type]  # a bool or IntFlag

    def _put(self, value: bytes, *, share: bool = True) -> int:
        if share and value in self._seen:
            return self._seen[value]
        offset = len(self.blob)
        self.blob += value + bytes(-len(value) % 8)
        if share:
            self._seen[value] = offset
        return offset


class Table(NamedTuple):
    """A table ready to be sent: everything but addresses and descriptor numbers is filled in.

    `rows` and `blob` are the bytes of those parts. The relocations are flat lists of pairs; words count from the
    start of the whole buffer *without* the rows that the launcher inserts at `entry` (closing what is not ours).
    """

    rows: bytes
    blob: bytes
    blob_words: list[int]  # word, offset in the blob, …
    slots: list[int]  # word, slot, …
    passed: list[int]  # word, number of the descriptor in the message, …
    specials: list[int]  # word, index in SPECIALS, …
    entry: int  # the row before which the leaf starts: everything after it runs in the container


def assemble(fragments: Iterable[tuple[Fragment, int]], entry: int) -> Table:
    """Puts (fragment, number of its first passed descriptor) together, in order."""
    rows: list[int] = []
    blob = bytearray()
    blob_words: list[int] = []
    slots: list[int] = []
    in_blob: list[int] = []
    passed: list[tuple[int, bool, int]] = []
    specials: list[tuple[int, bool, int]] = []
    for fragment, first in fragments:
        word, start = SLOTS + len(rows), len(blob)
        for at, offset in fragment.blob_words:
            blob_words += (word + at, start + offset)
        for at, slot in fragment.slots:
            slots += (word + at, slot)
        half = start // 8
        for at, offset in fragment.in_blob:
            in_blob += (half + at, start + offset)
        for at, is_blob, number in fragment.passed:
            passed.append((at + (half if is_blob else word), is_blob, first + number))
        for at, is_blob, number in fragment.specials:
            specials.append((at + (half if is_blob else word), is_blob, number))
        rows += fragment.words
        blob += fragment.blob
    base = SLOTS + len(rows)
    blob_words += [value + base * (1 - index % 2) for index, value in enumerate(in_blob)]
    return Table(
        struct.pack(f"={len(rows)}q", *rows),
        bytes(blob),
        blob_words,
        slots,
        [value for at, is_blob, number in passed for value in (at + base * is_blob, number)],
        [value for at, is_blob, number in specials for value in (at + base * is_blob, number)],
        entry,
    )
