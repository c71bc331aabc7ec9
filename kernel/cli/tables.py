"""Containers in words: the table of `ps`, the tree, ages, how something ended, one line for an event.

What lives here: pure functions from the agent's answers to lines of text. What must not: reading or writing
anything. `safe` is the Console's escaping of text that came from elsewhere; colour is added by `paint`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from mesocosm.kernel.cli.output import fit, pad, width_of

Line = Mapping[str, Any]
Safe = Callable[[object], str]
Paint = Callable[[str, str], str]

STATE_STYLES: Mapping[str, str] = {
    "RUNNING": "32",
    "DEAD": "2",
    "ROLLED_BACK": "31",
    "ROLLING_BACK": "31",
    "STOPPING": "33",
    "DESTROYING": "33",
}


def age(seconds: float) -> str:
    """A span for people, at most six columns: ``0.4 s``, ``12 s``, ``3 min``, ``2 h``, ``5 d``."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for limit, size, unit in ((100, 1, "s"), (100 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def moment(value: object) -> float | None:
    """Seconds since 1970 of a time on the wire: a number, or ISO 8601 text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return None


def clock(value: object) -> str:
    """The time of day of an event, local, with milliseconds."""
    at = moment(value)
    return "" if at is None else time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at * 1000) % 1000:03d}"


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15, ``signal 40`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def how_it_ended(wait: Line | None) -> str:
    """A WAIT in words: ``exit 0``, ``SIGKILL, killed at its memory limit of 64 MiB``, ``nobody saw how``; empty while it lives."""
    if not wait:
        return ""
    reason = wait.get("reason")
    if wait.get("exit") is None and reason in ("group", "parent"):
        return f"ended with its {reason}"
    if wait.get("exit") is not None:
        text = f"exit {wait['exit']}"
    elif wait.get("signal") is not None:
        text = signal_name(int(wait["signal"]))
    else:
        words = {"unknown": "nobody saw how", "rebooted": "the machine was rebooted", "rolled_back": "rolled back"}
        text = words.get(str(reason), str(reason or "nobody saw how"))
        reason = None
    because = {
        "killed": "killed",
        "memory": str(wait.get("message") or "memory limit"),
        "rolled_back": "rolled back",
    }.get(str(reason), "")
    if wait.get("oom") and reason != "memory":
        because = "out of memory"
    elif wait.get("limit") and reason != "memory":
        because = f"{because} {wait['limit']}".strip()
    return f"{text}, {because}" if because else text


def group_wait(wait: Line) -> Line:
    """The WAIT of a group for the WAIT of its root container, which only holds what the members share and is always killed."""
    group = wait.get("group")
    return {"exit": group["exit"]} if isinstance(group, Mapping) and isinstance(group.get("exit"), int) else wait


def code_of(wait: Line | None) -> int:
    """The exit code a WAIT stands for: the program's own, 128 + n, or 1 where nobody knows."""
    if not wait:
        return 0
    if wait.get("exit") is not None:
        return int(wait["exit"])
    return 1 if wait.get("signal") is None else 128 + int(wait["signal"])


def aligned(
    rows: Sequence[Sequence[str]], columns: int, paint: Paint, styles: Mapping[int, Mapping[str, str]] | None = None
) -> list[str]:
    """Rows as lines with aligned columns, the last one cut to what the terminal leaves; the first row is the heading."""
    widths = [max(width_of(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        left, cells = columns, []
        for index, cell in enumerate(row):
            last = index == len(row) - 1
            text = fit(cell, max(0, left)) if last else fit(pad(cell, widths[index]), max(0, left))
            left -= width_of(text) + 2
            style = "1" if number == 0 else (styles or {}).get(index, {}).get(cell, "")
            cells.append(paint(text, style))
            if left <= 0:
                break
        lines.append("  ".join(cells).rstrip())
    return lines


def ps_lines(containers: Sequence[Line], now: float, columns: int, safe: Safe, paint: Paint) -> list[str]:
    """The table of `ps`: ID STATE PID AGE ENDED."""
    rows = [["ID", "STATE", "PID", "AGE", "ENDED"]]
    for line in sorted(containers, key=_in_tree_order):
        started = moment(line.get("started"))
        rows.append(
            [
                safe(line["id"]),
                safe(line.get("state", "")),
                safe(line.get("pid") or ""),
                "" if started is None else age(now - started),
                safe(ended_and_left(line)),
            ]
        )
    return aligned(rows, columns, paint, {1: STATE_STYLES})


def ended_and_left(line: Line) -> str:
    """The last column of `ps` and `tree`: how it ended, and what of it cannot be undone yet, or keeps it from ending."""
    return "; ".join(found for found in (how_it_ended(line.get("wait")), *map(str, line.get("parked") or ())) if found)


def nest(containers: Iterable[Line]) -> list[dict[str, Any]]:
    """The lines of `ps` as trees: each with `children`, roots first. A line whose parent is not listed is a root."""
    in_order = sorted(containers, key=_in_tree_order)
    nodes: dict[str, dict[str, Any]] = {str(line["id"]): {**line, "children": []} for line in in_order}
    roots: list[dict[str, Any]] = []
    for node in nodes.values():
        parent = nodes.get(str(node.get("parent")))
        (roots if parent is None else parent["children"]).append(node)
    return roots


def tree_rows(roots: Sequence[Line]) -> list[tuple[str, Line]]:
    """The trees from top to bottom: (the box drawing and the name, the container)."""
    rows: list[tuple[str, Line]] = []
    # A stack of our own: 32 levels are allowed, and nothing here should care.
    todo: list[tuple[str, str, Line]] = [("", "", root) for root in reversed(roots)]
    while todo:
        lead, below, node = todo.pop()
        text = str(node["id"]) if not lead else str(node["id"]).rpartition(".")[2]
        rows.append((lead + text, node))
        children = list(node.get("children", ()))
        for index, child in reversed(list(enumerate(children))):
            last = index == len(children) - 1
            todo.append((below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "), child))
    return rows


def tree_lines(containers: Sequence[Line], now: float, columns: int, safe: Safe, paint: Paint) -> list[str]:
    """The output of `tree`."""
    rows = [["CONTAINER", "STATE", "PID", "AGE", "ENDED"]]
    for text, line in tree_rows(nest(containers)):
        started = moment(line.get("started"))
        rows.append(
            [
                safe(text),
                safe(line.get("state", "")),
                safe(line.get("pid") or ""),
                "" if started is None else age(now - started),
                safe(ended_and_left(line)),
            ]
        )
    return aligned(rows, columns, paint, {1: STATE_STYLES})


def event_text(event: Line) -> str:
    """What an event says beside its time, id and type, in a few words (not escaped)."""
    kind = event.get("type")
    if kind == "effect":
        args = event.get("args") or {}
        target = args.get("path") or args.get("target") or next((undo.get("target") for undo in event.get("undo") or ()), "")
        return f"{event.get('kind')} {target}".strip()
    if kind == "step":
        return f"{event.get('stage')}: {event.get('kind')}"
    if kind == "undone" and "entries" in event:
        return f"{event['entries']} effects"
    if kind == "parked":
        return " ".join(str(event[key]) for key in ("kind", "target", "note", "reason", "message") if event.get(key))
    if kind in ("exited", "dead"):
        return how_it_ended(event.get("wait") or event)
    if kind in ("rolled_back", "end"):
        error = event.get("error") or {}
        return str(error.get("message") or f"{event.get('state', '')} exit {event.get('exit')}".strip())
    if kind == "started" and event.get("pid"):
        return f"pid {event['pid']}"
    known = {"v", "seq", "time", "id", "type"}
    simple = (f"{key}={value}" for key, value in event.items() if key not in known and not isinstance(value, (dict, list)))
    return " ".join(simple)[:200]


def _in_tree_order(line: Line) -> list[str]:
    return str(line["id"]).split(".")


def event_line(event: Line, safe: Safe, paint: Paint) -> str:
    """An event for people: ``12:03:04.123  started      web.db  pid 4711``."""
    kind = str(event.get("type", ""))
    style = {"rolled_back": "31", "parked": "33", "started": "32", "end": "1"}.get(kind, "")
    cells = (
        clock(event.get("time")),
        paint(pad(safe(kind), 11), style),
        pad(safe(event.get("id") or "-"), 16),
        safe(event_text(event)),
    )
    return "  ".join(cells).rstrip()
