"""How `run` and `logs` show what happens: raw, as prefixed lines, as JSON Lines, or under a live tree.

What lives here: one small class for each way, all with the same five methods. What must not: sockets, signals, decisions.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Any, Protocol

from mesocosm.kernel.cli.live import FRAME_SECONDS, Painter, rows
from mesocosm.kernel.cli.output import COLOURS, ColourFilter, Console, escape, pad
from mesocosm.kernel.cli.progress import Progress
from mesocosm.kernel.cli.tables import age, event_text

MAX_LINE = 64 * 1024  # a line that never ends is shown in pieces, not collected


class Printer(Protocol):
    """One way of showing a run."""

    def event(self, event: Mapping[str, Any]) -> None:
        """An event line; the model has taken it in already. Not called with `end`."""
        ...

    def output(self, container_id: str, stream: str, offset: int, data: bytes) -> None:
        """Bytes that a container has written."""
        ...

    def dropped(self, container_id: str, stream: str, offset: int, count: int) -> None:
        """So many bytes from there on are not kept any more."""
        ...

    def say(self, text: str) -> None:
        """Words of ours, in between."""
        ...

    def tick(self) -> float | None:
        """Called when nothing happens; how many seconds until the next call, None for no need."""
        ...

    def finish(self) -> None:
        """The run is over: whatever was held back, and the end of it (`Progress.end`)."""
        ...


class RawPrinter:
    """A single foreground command: its bytes on our stdout and stderr, as if it had been started without us."""

    def __init__(self, console: Console, progress: Progress, *, unfiltered: bool = False) -> None:
        self._console = console
        self._progress = progress
        self._filters = {
            stream: ColourFilter()
            for stream, is_terminal in (("stdout", console.out_is_terminal), ("stderr", console.err_is_terminal))
            if is_terminal and not unfiltered
        }

    def event(self, event: Mapping[str, Any]) -> None:
        """Nothing: the program speaks for itself."""

    def output(self, container_id: str, stream: str, offset: int, data: bytes) -> None:
        if stream in self._filters:
            data = self._filters[stream].feed(data)
        (self._console.write if stream == "stdout" else self._console.write_error)(data)

    def dropped(self, container_id: str, stream: str, offset: int, count: int) -> None:
        self.say(gap(stream, count))

    def say(self, text: str) -> None:
        self._console.words(text)

    def tick(self) -> float | None:
        return None

    def finish(self) -> None:
        for stream, held in self._filters.items():
            last = held.close()
            if last:
                (self._console.write if stream == "stdout" else self._console.write_error)(last)
        for member in self._progress.members.values():
            if member.wait and (member.wait.get("oom") or member.wait.get("limit")):
                self._console.words(f"{member.id}: {member.ending}")


class JsonPrinter:
    """The event lines as they come, `output` lines between them, the `end` line last."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._held: dict[tuple[str, str], tuple[int, bytes]] = {}

    def event(self, event: Mapping[str, Any]) -> None:
        self._console.json(event)

    def output(self, container_id: str, stream: str, offset: int, data: bytes) -> None:
        start, held = self._held.pop((container_id, stream), (offset, b""))
        data = held + data
        cut = _incomplete(data)
        if cut:  # a character that the end of the piece cuts waits for its rest
            self._held[container_id, stream] = (start + len(data) - cut, data[len(data) - cut :])
            data = data[: len(data) - cut]
        if data:
            self._line(container_id, stream, start, data)

    def _line(self, container_id: str, stream: str, offset: int, data: bytes) -> None:
        line = {"v": 1, "seq": self._progress.last_seq, "time": time.time(), "id": container_id, "type": "output"}
        line |= {"stream": stream, "offset": offset}
        try:
            self._console.json({**line, "data": data.decode()})
        except UnicodeDecodeError:
            self._console.json({**line, "data": data.decode(errors="replace"), "base64": base64.b64encode(data).decode()})

    def dropped(self, container_id: str, stream: str, offset: int, count: int) -> None:
        if held := self._held.pop((container_id, stream), None):
            self._line(container_id, stream, *held)
        line = {"v": 1, "seq": self._progress.last_seq, "time": time.time(), "id": container_id, "type": "output"}
        self._console.json({**line, "stream": stream, "offset": offset, "data": "", "dropped": count})

    def say(self, text: str) -> None:
        self._console.words(text)

    def tick(self) -> float | None:
        return None

    def finish(self) -> None:
        for (container_id, stream), (offset, data) in self._held.items():
            self._line(container_id, stream, offset, data)
        self._held.clear()
        if self._progress.end is not None:
            self._console.json(self._progress.end)


class LinePrinter:
    """Members' lines with their names in front, each stream on its own side; what happened as words on stderr."""

    def __init__(self, console: Console, progress: Progress, *, quiet: bool = False, unfiltered: bool = False) -> None:
        self._console = console
        self._progress = progress
        self._quiet = quiet
        self._unfiltered = unfiltered
        self._partial: dict[tuple[str, str], bytes] = {}
        self._colours: dict[str, str] = {}
        self._width = 0
        self._running = False

    def event(self, event: Mapping[str, Any]) -> None:
        kind, container_id = event.get("type"), str(event.get("id", ""))
        if self._quiet:
            return
        if kind == "started" and not self._running and self._progress.members:
            self._running = True
            self.say(f"{self._progress.title} runs")
        elif kind == "parked":
            self.say(f"{container_id}: cannot be undone yet: {event_text(event)}")
        elif kind == "exited" and container_id != self._progress.name:
            self.say(f"{container_id}: {self._progress.members[container_id].ending}")

    def output(self, container_id: str, stream: str, offset: int, data: bytes) -> None:
        data = self._partial.pop((container_id, stream), b"") + data
        lines = data.split(b"\n")
        rest = lines.pop()
        if len(rest) > MAX_LINE:
            lines.append(rest)
            rest = b""
        if rest:
            self._partial[container_id, stream] = rest
        for line in lines:
            self._line(container_id, stream, line)

    def dropped(self, container_id: str, stream: str, offset: int, count: int) -> None:
        if partial := self._partial.pop((container_id, stream), b""):
            self._line(container_id, stream, partial)
        self._put("stderr", f"meso: {gap(f'{container_id}: {stream}', count)}".encode())

    def _line(self, container_id: str, stream: str, line: bytes) -> None:
        name = self._progress.short(container_id)
        names = [self._progress.short(each) for each in self._progress.members if each != self._progress.name]
        self._width = max(self._width, len(name), *map(len, names))
        colour = self._colours.setdefault(container_id, COLOURS[len(self._colours) % len(COLOURS)])
        is_terminal = self._console.out_is_terminal if stream == "stdout" else self._console.err_is_terminal
        shown = line.removesuffix(b"\r")
        if is_terminal and not self._unfiltered:
            shown = escape(shown.decode("utf-8", "backslashreplace")).encode()
        front = f"{pad(name, min(self._width, 24))} │ "
        front = self._console.paint(front, colour) if is_terminal else front
        self._put(stream, front.encode() + shown)
        if member := self._progress.members.get(container_id):
            member.last_line = shown.decode("utf-8", "backslashreplace") or member.last_line

    def _put(self, stream: str, line: bytes) -> None:
        (self._console.write if stream == "stdout" else self._console.write_error)(line + b"\n")

    def say(self, text: str) -> None:
        self._console.words(text)

    def tick(self) -> float | None:
        return None

    def finish(self) -> None:
        self._flush()
        if not self._quiet and self._progress.end is not None:
            self.say(summary(self._progress))

    def _flush(self) -> None:
        for (container_id, stream), rest in self._partial.items():
            self._line(container_id, stream, rest)
        self._partial.clear()


class LivePrinter(LinePrinter):
    """The same lines, and under them the tree of the group, redrawn in place."""

    def __init__(self, console: Console, progress: Progress) -> None:
        super().__init__(console, progress)
        self._painter = Painter(console)
        self._next = 0.0
        self._changed = True
        self._note = "ctrl-C ends the group"

    def event(self, event: Mapping[str, Any]) -> None:
        self._changed = True
        if event.get("type") == "parked":
            super().event(event)

    def _put(self, stream: str, line: bytes) -> None:
        if stream == "stderr" and not self._console.err_is_terminal:
            super()._put(stream, line)
            return
        self._painter.print_above(line.decode("utf-8", "backslashreplace"))
        self._changed = True

    def say(self, text: str) -> None:
        self._note = escape(text)
        self._changed = True

    def tick(self) -> float | None:
        now = time.monotonic()
        # Ages go on by themselves; a change is shown at once, or as soon as the last frame is old enough.
        due = self._next if self._changed else self._next + 1.0 - FRAME_SECONDS
        if now < due:
            return due - now
        self._paint()
        return 1.0

    def _paint(self) -> None:
        console = self._console
        lines = rows(self._progress, time.time(), console.columns, console.rows, console.safe, console.paint, self._note)
        self._painter.frame(lines)
        self._changed = False
        self._next = time.monotonic() + FRAME_SECONDS

    def finish(self) -> None:
        self._flush()
        self._note = escape(summary(self._progress)) if self._progress.end is not None else ""
        # The last frame stays: whole, however high the window is, without a note that is cut off.
        console = self._console
        lines = rows(self._progress, time.time(), console.columns, 10_000, console.safe, console.paint)
        self._painter.frame([*lines, self._note] if self._note else lines)


def gap(what: str, count: int) -> str:
    """What is said where bytes are missing."""
    return f"{what}: {count} bytes dropped: more was printed than the budget keeps"


def summary(progress: Progress) -> str:
    """One sentence about how a group ended."""
    end = progress.end or {}
    if end.get("state") == "ROLLED_BACK":
        return f"{progress.title}: rolled back, no program ran"
    if end.get("error"):
        return f"{progress.title} ended with an error"
    began = [member.started for member in progress.members.values() if member.started is not None]
    done = [member.ended for member in progress.members.values() if member.ended is not None]
    span = f" after {age(max(done) - min(began))}" if began and done else ""
    return f"{progress.title} ended{span}, exit {end.get('exit')}"


def _incomplete(data: bytes) -> int:
    """How many bytes at the end of `data` begin a UTF-8 character that is not whole yet."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte < 0x80:
            return 0
        if byte >= 0xC0:
            need = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < need and byte < 0xF8 else 0
    return 0
