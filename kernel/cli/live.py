"""The live tree of `run` on a terminal: what members print scrolls by above it, the tree stays at the bottom.

What lives here: the rows of the tree (pure), and the painter that puts them where they were before. What must not:
deciding anything, or letting text of a container through unescaped.

Theory: a frame is painted by going up as many lines as the last one took and clearing to the end of the screen. A window
may have become narrower since, and a terminal then wraps the old rows, so the lines it takes now are counted with the
new width. No row is ever as wide as the window: the last column wraps on some terminals and not on others.
"""

from __future__ import annotations

from typing import Any

from mesocosm.kernel.cli.output import Console, fit, pad, width_of
from mesocosm.kernel.cli.progress import Member, Progress
from mesocosm.kernel.cli.tables import STATE_STYLES, Paint, Safe, age, tree_rows

FRAME_SECONDS = 0.1  # redrawn no more often than this
_SPARE_ROWS = 4  # lines of the window that the tree leaves to the output


def rows(progress: Progress, now: float, columns: int, height: int, safe: Safe, paint: Paint, note: str = "") -> list[str]:
    """The frame: one row for each container, cut to `columns` and `height`, then `note`."""
    columns = max(1, columns - 1)
    shown = _nested(progress)
    limit = max(1, height - _SPARE_ROWS - bool(note))
    hidden = shown[limit - 1 :] if len(shown) > limit else []
    shown = shown[: len(shown) - len(hidden)]
    names = min(max((width_of(text) for text, _ in shown), default=0), max(8, columns // 2))
    states = max((len(member.state) for _, member in shown), default=0)
    lines = [_row(text, member, now, columns, names, states, safe, paint) for text, member in shown]
    if hidden:
        counts: dict[str, int] = {}
        for _, member in hidden:
            counts[member.state] = counts.get(member.state, 0) + 1
        lines.append(fit(f"… {len(hidden)} more: " + ", ".join(f"{count} {state}" for state, count in counts.items()), columns))
    if note:
        lines.append(paint(fit(note, columns), "2"))
    return lines


def _nested(progress: Progress) -> list[tuple[str, Member]]:
    nodes: dict[str, dict[str, Any]] = {}
    roots: list[dict[str, Any]] = []
    for container_id in sorted(progress.members, key=lambda text: text.count(".")):
        node = nodes[container_id] = {"id": container_id, "children": []}
        parent = nodes.get(container_id.rpartition(".")[0])
        (roots if parent is None else parent["children"]).append(node)
    return [(text, progress.members[str(node["id"])]) for text, node in tree_rows(roots)]


def _row(text: str, member: Member, now: float, columns: int, names: int, states: int, safe: Safe, paint: Paint) -> str:
    name = pad(fit(safe(text), names), names)
    until = member.ended if member.ended is not None else now
    span = "" if member.started is None else age(until - member.started)
    left = columns - names - 2
    if left < states:
        return fit(name.rstrip() + " " + member.state, columns)
    style = STATE_STYLES.get(member.state, "")
    if member.wait and member.wait.get("exit") != 0 and member.wait.get("reason") not in ("group", "parent"):
        style = "31"
    row = f"{name}  {paint(pad(member.state, states), style)}"
    left -= states + 2
    if left >= 6 and not (member.ending and left < 10 + width_of(member.ending)):  # how it ended says more than when
        row += f"  {span:>6}"
        left -= 8
    tail = member.ending or member.last_line
    if tail and left >= 4:
        row += "  " + paint(fit(safe(tail), left), "" if member.ending else "2")
    return row.rstrip()


class Painter:
    """Puts frames on the console's terminal; `print_above` lets text scroll by above the frame."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._widths: list[int] = []
        self._above: list[str] = []

    def print_above(self, text: str) -> None:
        """A line (safe, without newline) for above the tree; shown with the next frame."""
        self._above.append(text)

    def frame(self, lines: list[str]) -> None:
        """Paints this frame in place of the last one."""
        columns = max(1, self._console.columns)
        taken = sum(max(1, -(-width // columns)) for width in self._widths)
        data = (f"\x1b[{taken}A" if taken else "") + ("\r\x1b[J" if self._widths else "")
        data += "".join(line + "\n" for line in (*self._above, *lines))
        self._above.clear()
        self._widths = [width_of(line) for line in lines]
        self._console.write(data.encode("utf-8", "backslashreplace"))
