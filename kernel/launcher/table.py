"""The table of system calls that a newborn container walks through: its format, and a way to write it down.

Pure: no system call is made here. `compile` writes tables, `link` (in the launcher) puts addresses and
descriptors into them, a *walker* runs them in the cloned child.

One buffer holds everything:

    slots   SLOTS words of 8 bytes: results that later rows need (a descriptor that was just opened)
    rows    ROW_WORDS words each, see below
    blob    strings, structures, argument vectors; it begins with the clone_args of the first row, which is a clone3

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

# What only the launcher knows: descriptors, an address; and a number that is sent along instead of standing in the rows,
# so that these are the same for every container (the owner of its scratch).
SPECIALS = ("status", "barrier", "null", "pause", "parent", "host_mount", "pidfd_slot", "owner")
NO_DESCRIPTORS = frozenset({SPECIALS.index("pidfd_slot"), SPECIALS.index("owner")})

LAYERS = 8  # how many directories /layers/N the launcher's own tree has


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

    __slots__ = ("_packed", "_relocations", "_seen", "blob", "in_blob", "passed", "pointers", "slots", "specials", "words")

    def __init__(self) -> None:
        self.words: list[int] = []
        self.blob = bytearray()
        self.pointers: list[int] = []  # pairs: a word of the rows that points into this blob, the offset it points to
        self.slots: list[int] = []  # pairs: a word of the rows that is the address of a slot, which slot
        self.passed: list[tuple[int, bool, int]] = []  # (word, whether of the blob, number)
        self.specials: list[tuple[int, bool, int]] = []  # (word, whether of the blob, index in SPECIALS)
        self.in_blob: list[int] = []  # pairs: a word of the blob that points into this blob, the offset it points to
        self._seen: dict[bytes | Vector, int] = {}
        self._packed = b""
        self._relocations = (b"", b"", b"")

    @property
    def packed(self) -> bytes:
        """The rows as bytes. Asked for when they are complete; a fragment that is kept packs them once."""
        if len(self._packed) != len(self.words) * 8:
            self._packed = struct.pack(f"={len(self.words)}q", *self.words)
            self._relocations = (_pack(self.pointers), _pack(self.slots), _pack(self.in_blob))
        return self._packed

    @property
    def relocations(self) -> tuple[bytes, bytes, bytes]:
        """`pointers`, `slots` and `in_blob` as a Part has them. Kept with `packed`, and to be asked for after it."""
        return self._relocations

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
                self.slots += (start + index, argument.number)
                flags |= 1 << (7 + index)
            else:
                self._refer(argument, start + index, words, index)
        if out is not None:
            self.slots += (start + 7, out.number)
        words[9] = flags | skip << 32
        self.words += words

    def _refer(self, argument: Argument, at: int, words: list[int], index: int) -> None:
        match argument:
            case Text(value):
                self._point(at, self._put(value + b"\0"))
            case Data(value):
                self._point(at, self._put(value))
            case Vector(values):
                self._point(at, self._array(argument, values))
            case Pointers(value, pointers):
                start = self._put(value, share=False)
                for offset, what in pointers:
                    word = (start + offset) // 8
                    if isinstance(what, Special):
                        self.specials.append((word, True, SPECIALS.index(what.name)))
                    elif isinstance(what, Passed):
                        self.passed.append((word, True, what.number))
                    else:
                        self.in_blob += (word, self._put(what.value + (b"\0" if isinstance(what, Text) else b"")))
                self._point(at, start)
            case Passed(number):
                self.passed.append((at, False, number))
            case Special(name):
                self.specials.append((at, False, SPECIALS.index(name)))
            case _:
                words[index] = int(argument)  # type: ignore[arg-type]  # a bool or IntFlag

    def _point(self, at: int, offset: int) -> None:
        self.pointers += (at, offset)

    def _array(self, vector: Vector, values: tuple[bytes, ...]) -> int:
        """Where this array of strings is. A program is looked for in several places with the same arguments."""
        start = self._seen.get(vector)
        if start is None:
            offsets = [self._put(value + b"\0") for value in values]
            start = self._seen[vector] = self._put(bytes(8 * len(offsets) + 8), share=False)
            for word, offset in enumerate(offsets, start // 8):
                self.in_blob += (word, offset)
        return start

    def append(self, other: Fragment) -> None:
        """Puts another fragment's rows behind these; both must be free of passed descriptors."""
        word, start = len(self.words), len(self.blob)
        self.pointers += _moved(other.pointers, word, start)
        self.slots += _moved(other.slots, word, 0)
        self.in_blob += _moved(other.in_blob, start // 8, start)
        self.specials += [(at + (start // 8 if is_blob else word), is_blob, number) for at, is_blob, number in other.specials]
        self.words += other.words
        self.blob += other.blob

    def _put(self, value: bytes, *, share: bool = True) -> int:
        if share and value in self._seen:
            return self._seen[value]
        offset = len(self.blob)
        self.blob += value + bytes(-len(value) % 8)
        if share:
            self._seen[value] = offset
        return offset


_PAIR = struct.Struct("=ii")
pairs = _PAIR.iter_unpack


def _pack(numbers: list[int]) -> bytes:
    return struct.pack(f"={len(numbers)}i", *numbers)


def _moved(numbers: list[int], first: int, second: int) -> list[int]:
    """Pairs with something added to their first and to their second halves."""
    moved = [0] * len(numbers)
    moved[::2] = [number + first for number in numbers[::2]]
    moved[1::2] = [number + second for number in numbers[1::2]]
    return moved


class Part(NamedTuple):
    """A fragment's place in a table, and its relocations: `pairs` of them count from that place."""

    word: int  # its first word in `rows`
    start: int  # its first byte in `blob`
    pointers: bytes  # (word of its rows, offset in its blob)
    slots: bytes  # (word of its rows, number of a slot)
    in_blob: bytes  # (word of its blob, offset in its blob)


class Table(NamedTuple):
    """A table ready to be sent: everything but addresses and descriptor numbers is filled in.

    `rows` and `blob` are the bytes of those parts. Most relocations stay with the fragment that has them (`parts`), for
    their numbers are the same in every table. The few others are a word (its number in the buffer, *without* the rows
    that the launcher inserts at `entry` to close what is not ours) and what goes there: two lists of equal length.
    """

    rows: bytes
    blob: bytes
    parts: list[Part]
    passed_at: list[int]
    passed_to: list[int]  # numbers of the descriptors in the message
    special_at: list[int]
    special_to: list[int]  # indices in SPECIALS
    entry: int  # the row (the first of a part) before which the leaf starts: what follows runs in the container


def spoiled(table: Table, row: int) -> Table:
    """The same, but for one row, which asks for a system call that no kernel has (ENOSYS) and may not fail. For tests."""
    rows = bytearray(table.rows)
    _, *words, flags = struct.unpack_from(f"={ROW_WORDS}q", rows, row * ROW_BYTES)
    struct.pack_into(f"={ROW_WORDS}q", rows, row * ROW_BYTES, _NO_CALL, *words, flags & (RETURN_IF_ANY | LEAVE_IF_PARENT))
    return table._replace(rows=bytes(rows))


_NO_CALL = -1


def assemble(fragments: Iterable[tuple[Fragment, int]], entry: int) -> Table:
    """Puts (fragment, number of its first passed descriptor) together, in order; `entry` is where one of them begins."""
    rows: list[bytes] = []
    blobs: list[bytearray] = []
    parts: list[Part] = []
    passed: list[tuple[int, bool, int]] = []
    specials: list[tuple[int, bool, int]] = []
    word, start = 0, 0
    begins = False
    for fragment, first in fragments:
        begins = begins or word == entry * ROW_WORDS
        rows.append(fragment.packed)
        blobs.append(fragment.blob)
        if fragment.pointers or fragment.slots or fragment.in_blob:
            parts.append(Part(word, start, *fragment.relocations))
        half = start // 8
        for at, is_blob, number in fragment.passed:
            passed.append((at + (half if is_blob else SLOTS + word), is_blob, first + number))
        for at, is_blob, number in fragment.specials:
            specials.append((at + (half if is_blob else SLOTS + word), is_blob, number))
        word += len(fragment.words)
        start += len(fragment.blob)
    if not begins and word != entry * ROW_WORDS:
        raise ValueError(f"no fragment begins at row {entry}")
    behind = SLOTS + word  # the blob's first word
    return Table(
        b"".join(rows),
        b"".join(blobs),
        parts,
        [at + behind * is_blob for at, is_blob, _ in passed],
        [number for _, _, number in passed],
        [at + behind * is_blob for at, is_blob, _ in specials],
        [number for _, _, number in specials],
        entry,
    )
