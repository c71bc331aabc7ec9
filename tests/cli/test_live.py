"""The live tree: every row fits, whatever the window, and a frame takes the place of the one before."""

from __future__ import annotations

import os
import re
import types
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.cli import live
from mesocosm.kernel.cli.output import escape_line, width_of
from mesocosm.kernel.cli.progress import Progress


def plain(text: str, _style: str) -> str:
    return text


def safe(text: object) -> str:
    return escape_line(str(text))


def progress(count: int = 2) -> Progress:
    found = Progress("web")
    ids = ["web", *(f"web.task-{number}" for number in range(count))]
    found.feed({"seq": 1, "time": 100.0, "id": "web", "type": "planned", "containers": ids})
    for each in ids:
        found.feed({"seq": 2, "time": 100.0, "id": each, "type": "started"})
    return found


def test_rows_tell_state_age_and_the_last_line() -> None:
    model = progress()
    model.members["web.task-0"].last_line = "ready \x1b[2J"
    model.feed(
        {"seq": 3, "time": 103.0, "id": "web.task-1", "type": "exited", "wait": {"exit": None, "signal": 9, "reason": "memory"}}
    )
    shown = live.rows(model, 112.0, 80, 24, safe, plain, "note")
    assert re.fullmatch(r"├─ task-0  RUNNING +12 s  ready \\x1b\[2J", shown[1])
    assert re.fullmatch(r"└─ task-1  DESTROYING +3\.0 s  SIGKILL, memory limit", shown[2])
    assert shown[3] == "note"


@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 30), st.text(max_size=30))
def test_every_frame_fits_the_window(columns: int, height: int, count: int, last_line: str) -> None:
    model = progress(count)
    for member in model.members.values():
        member.last_line = last_line
    shown = live.rows(model, 200.0, columns, height, safe, plain, "ctrl-C ends the group")
    assert all(width_of(row) < columns or columns == 1 for row in shown)
    assert len(shown) <= max(2, height)


def test_what_does_not_fit_the_height_is_counted() -> None:
    shown = live.rows(progress(30), 200.0, 80, 10, safe, plain)
    assert len(shown) == 6
    assert shown[-1] == "… 26 more: 26 RUNNING"


class Screen:
    """As much of a terminal as the painter uses; pieces of text without wrapping."""

    columns = 20

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, data: bytes) -> None:
        text = data.decode()
        if match := re.match(r"(?:\x1b\[(\d+)A)?\r\x1b\[J", text):
            up = int(match[1] or 0)
            self.lines = self.lines[: len(self.lines) - up]
            text = text[match.end() :]
        self.lines += text.splitlines()


def test_frames_replace_each_other_and_output_stays_above() -> None:
    screen: Any = Screen()
    painter = live.Painter(screen)
    painter.frame(["tree 1", "note"])
    painter.print_above("output a")
    painter.frame(["tree 2", "more", "note"])
    painter.print_above("output b")
    painter.frame(["tree 3"])
    assert screen.lines == ["output a", "output b", "tree 3"]


def test_a_window_that_became_narrower_is_counted_with_its_new_width() -> None:
    written: list[bytes] = []
    screen: Any = types.SimpleNamespace(columns=20, write=written.append)
    painter = live.Painter(screen)
    painter.frame(["x" * 18, "y" * 9])
    screen.columns = 10
    painter.frame(["z"])
    assert written[-1] == b"\x1b[3A\r\x1b[Jz" + os.linesep.encode()
