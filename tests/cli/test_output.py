"""Nothing that a container says can drive the terminal of the one who reads it."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.cli.output import ColourFilter, escape, escape_line, fit, pad, width_of

HOSTILE = st.lists(
    st.sampled_from(
        [
            "\x1b",
            "[",
            "3",
            "1",
            ";",
            "m",
            "K",
            "2J",
            "]0;t\x07",
            "\x9b",
            "\r",
            "\n",
            "\t",
            "ä",
            "日",
            "\x00",
            "\u202e",
            "P",
            "\x08",
            "x",
        ]
    )
).map("".join)
ALLOWED = re.compile(rb"\x1b\[[0-9;:]*m|\x1b\[[0-2]?K")


@given(st.text() | HOSTILE)
def test_escaped_text_has_no_control_but_newline_and_tab(text: str) -> None:
    shown = escape(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    assert "\n" not in escape_line(text)
    shown.encode()


def test_escapes_are_readable() -> None:
    assert escape("a\x1b]0;owned\x07b\r\n") == "a\\x1b]0;owned\\x07b\\r\n"
    assert escape_line("a\nb") == "a\\nb"


@given(HOSTILE.map(str.encode) | st.binary(max_size=60), st.data())
def test_the_colour_filter_does_not_care_where_a_chunk_ends(data: bytes, draw: st.DataObject) -> None:
    whole = ColourFilter()
    expected = whole.feed(data) + whole.close()
    cut = draw.draw(st.integers(0, len(data)))
    pieces = ColourFilter()
    assert pieces.feed(data[:cut]) + pieces.feed(data[cut:]) + pieces.close() == expected


@given(HOSTILE.map(str.encode) | st.binary(max_size=60))
def test_the_colour_filter_passes_styles_and_no_other_sequence(data: bytes) -> None:
    colours = ColourFilter()
    shown = colours.feed(data) + colours.close()
    assert b"\x1b" not in ALLOWED.sub(b"", shown)
    assert b"\xc2\x9b" not in shown


def test_the_colour_filter_resets_the_style_only_if_one_was_used() -> None:
    plain, coloured = ColourFilter(), ColourFilter()
    assert plain.feed(b"50 %\r100 %\n") + plain.close() == b"50 %\r100 %\n"
    assert coloured.feed(b"\x1b[31mred") + coloured.close() == b"\x1b[31mred\x1b[0m"


@given(st.text(alphabet="ab日本ä…"), st.integers(0, 20))
def test_text_is_cut_to_columns_and_not_to_characters(text: str, columns: int) -> None:
    assert width_of(fit(text, columns)) <= columns
    assert width_of(pad(text, columns)) >= columns


def test_styles_take_no_columns_and_wide_characters_two() -> None:
    assert width_of("\x1b[31mab\x1b[0m") == 2
    assert width_of("日本") == 4
    assert fit("日本語", 5) == "日本…"
