"""What leaves the command: words on stderr, results on stdout, and nothing that could drive a terminal.

What lives here: escaping, display width, colour or none, JSON Lines, the two streams. What must not: what any of the
text says (tables.py, plans.py, live.py).

Theory: text from a container (its output, its names, messages that quote it) is hostile. An escape sequence in it
could retitle the window, fill the clipboard or hide what stands next to it. So on a terminal every control character but
newline and tab is shown as `\\x1b` is here, and so are the characters that reorder or hide text. Into a file or
a pipe the bytes go untouched: there they are data. The one exception is `ColourFilter`, for a program that the user
started in the foreground as if without us: it may colour its own lines, and no more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

from mesocosm.kernel.core.errors import MesoError

# C0 without tab and newline, DEL, C1, and the format characters that change the order of what is read or cannot be seen.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_UNSAFE_IN_LINE = re.compile("[\t\n]|" + _UNSAFE.pattern)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
COLOURS = ("36", "33", "32", "35", "34", "96", "93", "92", "95", "94")


def _as_escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return {9: " ", 10: "\\n", 13: "\\r"}.get(code) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def escape(text: str) -> str:
    """`text` with everything that could drive a terminal made visible; newlines and tabs stay."""
    return _UNSAFE.sub(_as_escape, text)


def escape_line(text: str) -> str:
    """The same for text that must stay on one line."""
    return _UNSAFE_IN_LINE.sub(_as_escape, text)


def width_of(text: str) -> int:
    """Columns that `text` takes on a terminal; style sequences (ours) take none, East Asian wide characters two."""
    text = _STYLE.sub("", text)
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(char) else 2 if east_asian_width(char) in "WF" else 1 for char in text)


def fit(text: str, columns: int) -> str:
    """`text` (without styles) cut to `columns`, with an ellipsis where something was lost."""
    if width_of(text) <= columns:
        return text
    if columns < 1:
        return ""
    kept = text[: columns - 1]
    while width_of(kept) > columns - 1:
        kept = kept[:-1]
    return kept + "…"


def pad(text: str, columns: int) -> str:
    """`text` filled up with spaces to `columns`; longer text is left as it is."""
    return text + " " * max(0, columns - width_of(text))


class ColourFilter:
    """Bytes of a foreground program on their way to the user's own terminal, chunk by chunk.

    Passes: text, newline, tab, carriage return, backspace, bell, colours and styles (SGR), erase to the end of the line.
    Everything else that is a control is shown escaped. A sequence cut by the end of a chunk waits for the next one.
    """

    _TOKEN = re.compile(
        rb"(?P<style>\x1b\[[0-9;:]{0,40}m|\x1b\[[0-2]?K)|(?P<cut>(?:\x1b(?:\[[0-9;:]{0,40})?|\xc2)\Z)"
        rb"|(?P<control>[\x00-\x06\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f])"
    )

    def __init__(self) -> None:
        self._held = b""
        self.used = False  # whether a style was passed on, which must not outlive the program

    def feed(self, chunk: bytes) -> bytes:
        """What may be written now."""
        self._held, chunk = b"", self._held + chunk
        return self._TOKEN.sub(self._replace, chunk)

    def close(self) -> bytes:
        """What was held back, escaped, and the terminal's normal style if it may have been changed."""
        held, self._held = self._held, b""
        shown = b"".join(b"\\x%02x" % byte if byte < 32 or byte > 126 else bytes((byte,)) for byte in held)
        return shown + (b"\x1b[0m" if self.used else b"")

    def _replace(self, match: re.Match[bytes]) -> bytes:
        if match["style"] is not None:
            self.used = True
            return match[0]
        if match["cut"] is not None:
            self._held = match[0]
            return b""
        return b"\\x%02x" % match[0][-1]


class OutputError(MesoError):
    """What we had to say could not be written, though somebody may be reading."""


class Console:
    """The command's stdout and stderr. `as_json`: stdout carries JSON Lines and nothing else."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out: BinaryIO = sys.stdout.buffer
        self._err: BinaryIO = sys.stderr.buffer
        self.out_is_terminal = sys.stdout.isatty()
        self.err_is_terminal = sys.stderr.isatty()
        self.has_colour = self.can_move and not os.environ.get("NO_COLOR")

    @property
    def can_move(self) -> bool:
        """Whether stdout is a terminal whose cursor can be moved."""
        return self.out_is_terminal and os.environ.get("TERM") not in (None, "", "dumb")

    @property
    def columns(self) -> int:
        """Columns of the terminal, asked each time since windows change; wide enough for anything where there is none."""
        try:
            return os.get_terminal_size(self._out.fileno()).columns or 80
        except (OSError, ValueError):
            return 10_000

    @property
    def rows(self) -> int:
        """Lines of the terminal."""
        try:
            return os.get_terminal_size(self._out.fileno()).lines or 24
        except (OSError, ValueError):
            return 10_000

    def paint(self, text: str, style: str) -> str:
        """`text` in an SGR style, or as it is where there is no colour."""
        return f"\x1b[{style}m{text}\x1b[0m" if self.has_colour and text and style else text

    def safe(self, text: object) -> str:
        """Text of unknown origin for a table cell or a sentence on stdout: one line, escaped if a terminal shows it."""
        return escape_line(str(text)) if self.out_is_terminal else str(text).replace("\n", "\\n")

    def say(self, text: str) -> None:
        """A line of the result for people (already safe)."""
        self.write((text + "\n").encode("utf-8", "backslashreplace"))

    def write(self, data: bytes) -> None:
        """Bytes to stdout, at once."""
        try:
            self._out.write(data)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"the output could not be written: {error.strerror}",
                syscall="write", errno=errno.errorcode.get(error.errno or 0), target="standard output",
            ) from None  # fmt: skip

    def write_error(self, data: bytes) -> None:
        """Bytes to stderr, at once."""
        with contextlib.suppress(OSError):  # there is nobody left to tell
            self._err.write(data)
            self._err.flush()

    def json(self, value: Mapping[str, Any]) -> None:
        """One line of JSON on stdout: ASCII only, so it is safe on a terminal too."""
        self.write(json.dumps(value, separators=(",", ":"), default=_plain).encode() + b"\n")

    def words(self, text: str) -> None:
        """Words for people on stderr, with our name in front."""
        text = escape(text) if self.err_is_terminal else text
        self.write_error(f"meso: {text}\n".encode("utf-8", "backslashreplace"))


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else str(value)
