"""Tables before anything runs: fragments, assembling, linking and the rows that close. Pure, so Hypothesis may look everywhere."""

from __future__ import annotations

import ctypes
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.launcher import table as t
from mesocosm.kernel.launcher.link import closing_rows, link
from mesocosm.kernel.linux.constants import SYS

FIRST_FD, FIRST_SPECIAL = 1000, 2000
ROW = struct.Struct("=10q")

texts = st.builds(t.Text, st.binary(max_size=40).filter(lambda value: b"\0" not in value))
data = st.builds(t.Data, st.binary(max_size=40))
vectors = st.builds(t.Vector, st.lists(st.binary(max_size=9).filter(lambda value: b"\0" not in value), max_size=4).map(tuple))
places = st.builds(t.Passed, st.integers(0, 3))
specials = st.builds(t.Special, st.sampled_from(t.SPECIALS))
slots = st.builds(t.Slot, st.integers(0, t.SLOTS - 1))
numbers = st.integers(-(2**63), 2**63 - 1)
pointers = st.lists(st.one_of(texts, data, specials, places), min_size=1, max_size=4).map(
    lambda words: t.Pointers(bytes(8 * len(words)), tuple((8 * index, word) for index, word in enumerate(words)))
)
arguments = st.one_of(numbers, texts, data, vectors, places, specials, slots, pointers)
Row = tuple[list[t.Argument], t.Slot | None]
programs = st.lists(st.lists(st.tuples(st.lists(arguments, max_size=6), st.none() | slots), max_size=4), min_size=1, max_size=4)


def at(address: int, length: int) -> bytes:
    """Memory, as a system call would see it."""
    return ctypes.string_at(address, length)


def holds(word: int, argument: t.Argument, first: int, flags: int, index: int, slot_base: int) -> bool:
    """Whether a linked word is, or points to, what the argument says."""
    match argument:
        case t.Text(value):
            return at(word, len(value) + 1) == value + b"\0"
        case t.Data(value):
            return at(word, len(value)) == value
        case t.Vector(values):
            addresses = struct.unpack(f"={len(values) + 1}q", at(word, 8 * len(values) + 8))
            strings = zip(addresses, values, strict=False)
            return addresses[-1] == 0 and all(at(address, len(value) + 1) == value + b"\0" for address, value in strings)
        case t.Passed(number):
            return word == FIRST_FD + first + number
        case t.Special(name):
            return word == FIRST_SPECIAL + t.SPECIALS.index(name)
        case t.Slot(number):
            return word == slot_base + 8 * number and bool(flags >> (8 + index) & 1)
        case t.Pointers(value, words):
            inner = struct.unpack(f"={len(value) // 8}q", at(word, len(value)))
            return all(holds(inner[offset // 8], what, first, 0, 0, slot_base) for offset, what in words)
        case _:
            return word == argument


@given(programs, st.integers(0, 5))
def test_every_linked_word_is_or_points_to_what_the_row_said(program: list[list[Row]], entry: int) -> None:
    fragments = []
    said = []
    for number, rows in enumerate(program):
        fragment = t.Fragment()
        for row, out in rows:
            fragment.row("write", *row, out=out)
            said.append((row, out, 4 * number))
        fragments.append((fragment, 4 * number))
    entry = sum(fragment.rows for fragment, _ in fragments[: min(entry, len(fragments))])
    table = t.assemble(fragments, entry)
    linked = link(table, [FIRST_FD + n for n in range(4 * len(program))], [FIRST_SPECIAL + n for n in range(len(t.SPECIALS))])
    assert linked.rows == len(said) + linked.inserted
    for row in range(linked.rows):
        if not linked.entry <= row < linked.entry + linked.inserted:
            words = ROW.unpack_from(linked.buffer, t.HEAD_BYTES + row * t.ROW_BYTES)
            wanted, out, first = said[linked.original_row(row)]
            for index, argument in enumerate(wanted):
                assert holds(words[1 + index], argument, first, words[9], index, linked.address), (argument, words)
            assert words[7] == (0 if out is None else linked.address + 8 * out.number)


@given(st.sets(st.integers(-1, 300), max_size=20))
def test_the_inserted_rows_close_exactly_what_is_not_kept(keep: set[int]) -> None:
    closed: set[int] = set()
    for row in ROW.iter_unpack(closing_rows(keep)):
        assert row[0] == SYS["close_range"]
        assert row[9] == t.OK_ANY
        closed |= set(range(row[1], min(row[2], 400) + 1))
    assert closed == set(range(3, 401)) - keep


def test_the_last_inserted_row_closes_to_the_very_end() -> None:
    assert ROW.unpack(closing_rows({5})[-t.ROW_BYTES :])[1:3] == (6, 2**32 - 1)


@given(st.integers(0, 6), st.integers(0, 6), st.sets(st.integers(3, 60), max_size=5))
def test_original_row_finds_the_row_that_was_sent(before: int, after: int, keep: set[int]) -> None:
    mid, leaf = t.Fragment(), t.Fragment()
    for number in range(before + after):
        (mid if number < before else leaf).row("write", number)
    table = t.assemble([(mid, 0), (leaf, 0)], before)
    linked = link(table, sorted(keep), [0] * len(t.SPECIALS))
    sent = []
    for row in range(linked.rows):
        words = ROW.unpack_from(linked.buffer, t.HEAD_BYTES + row * t.ROW_BYTES)
        if words[0] == SYS["write"]:
            assert linked.original_row(row) == words[1]
            sent.append(words[1])
        else:
            assert linked.original_row(row) == before  # ours are blamed on the row they stand before
    assert sent == list(range(before + after))


def test_a_leaf_that_would_start_in_the_middle_of_a_fragment_is_refused() -> None:
    fragment = t.Fragment()
    fragment.row("write", 1)
    fragment.row("write", 2)
    with pytest.raises(ValueError, match="no fragment begins at row 1"):
        t.assemble([(fragment, 0)], 1)


def test_equal_arrays_of_strings_are_stored_once() -> None:
    fragment = t.Fragment()
    fragment.row("execve", t.Text(b"a"), t.Vector((b"x", b"y")))
    once = len(fragment.blob)
    fragment.row("execve", t.Text(b"a"), t.Vector((b"x", b"y")))
    assert len(fragment.blob) == once


def test_equal_strings_are_stored_once_and_structures_with_pointers_never() -> None:
    fragment = t.Fragment()
    fragment.row("write", t.Text(b"same"), t.Text(b"same"))
    once = len(fragment.blob)
    fragment.row("write", t.Pointers(bytes(8), ((0, t.Text(b"same")),)), t.Pointers(bytes(8), ((0, t.Text(b"same")),)))
    assert (once, len(fragment.blob)) == (8, 8 + 2 * 8)


def test_only_mentioned_specials_are_kept_open() -> None:
    fragment = t.Fragment()
    fragment.row("write", t.Special("barrier"), t.Special("pidfd_slot"), t.Special("owner"))
    linked = link(t.assemble([(fragment, 0)], 0), [], [11, 12, 13, 14, 15, 16, 17, 18])
    rows = [ROW.unpack_from(linked.buffer, t.HEAD_BYTES + row * t.ROW_BYTES) for row in range(linked.inserted)]
    assert [row[1:3] for row in rows] == [(3, 11), (13, 2**32 - 1)]
