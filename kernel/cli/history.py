"""Verbs about what has been: history, and explain, which goes on where a container is gone.

What lives here: how a moment is written, the table of lives, the chain of causes as text. What must not: what is a cause of what.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mesocosm.kernel.cli import connection, tables
from mesocosm.kernel.cli.output import Console, fit
from mesocosm.kernel.core.errors import SpecError

_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_EXAMPLES = "'5m ago', '2h', '14:30', '2026-11-22 14:30:05', '@1764000000'"
_PAGE = 200  # lines asked for at once


def history(arguments: argparse.Namespace, console: Console) -> int:
    """`meso history`: what has been, the latest last; with --at who was there at a moment."""
    now = time.time()
    bounds: dict[str, Any] = {}
    for option in ("at", "since"):
        if (text := getattr(arguments, option)) is not None:
            bounds[option] = moment(text, now, f"--{option}")
    if len(bounds) > 1:
        raise SpecError("one of both: a moment, or the time since one", path="--at", hint="leave --since out")
    if arguments.limit is not None and arguments.limit < 1:
        raise SpecError("out of range", path="--limit", have=str(arguments.limit), need="1 or more")
    limit = arguments.limit or (100_000 if bounds else 50)
    lines: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    with connection.connect(arguments) as client:
        cursor: int | None = None
        while len(lines) < limit:
            asked = {**bounds, "limit": min(_PAGE, limit - len(lines)), **({} if cursor is None else {"cursor": cursor})}
            answer = client.history(arguments.id, **asked)
            lines += answer["history"]
            notes |= dict.fromkeys(answer["notes"])
            cursor = answer["next"]
            if cursor is None:
                break
    if "at" not in bounds:
        lines.reverse()
    if console.as_json:
        for line in lines:
            console.json({"v": 1, **line})
    else:
        for text in history_lines(lines, bounds.get("at"), now, console):
            console.say(text)
    for note in notes:
        console.words(_readable(note))
    if cursor is not None:
        console.words("there is more: --limit N shows it")
    return 0


def explain(arguments: argparse.Namespace, console: Console) -> int:
    """`meso explain`: the state, and the chain of causes down to what to do; also of one that is long gone."""
    if arguments.life is not None and arguments.life < 1:
        raise SpecError("out of range", path="--life", have=str(arguments.life), need="1 or more")
    with connection.connect(arguments) as client:
        answer = client.explain(arguments.id, arguments.life)
    if console.as_json:
        console.json(answer)
        return 0
    for text in explain_lines(answer, time.time(), console):
        console.say(text)
    return 0


def moment(text: str, now: float, path: str) -> float:
    """Seconds since 1970 of a time as people write it: ago, of today, of a day, or ``@`` and such a number. SpecError else."""
    words = text.strip()
    found: float | None = None
    ago = words.removesuffix("ago").strip()
    number = ago.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = ago[len(number) :].strip()
    try:
        if words.startswith("@"):
            found = float(words[1:])
        elif unit in _UNITS:
            found = now - float(number) * _UNITS[unit] if number[0] != "-" else None
        elif words == "now":
            found = now
        elif "-" not in words and ":" in words:
            found = datetime.fromisoformat(f"{datetime.fromtimestamp(now).date()}T{words}").timestamp()
        else:
            found = datetime.fromisoformat(words).timestamp()
    except (ValueError, OverflowError, OSError, IndexError):
        pass
    if found is None or not 0 <= found < 2**40:
        raise SpecError(f"{text[:80]!r} is no moment", path=path, hint=f"write it as {_EXAMPLES}")
    return found


def stamp(at: float | None, now: float) -> str:
    """A moment for people, local: with the day unless that is today."""
    if at is None:
        return ""
    day = time.strftime("%Y-%m-%d ", time.localtime(at))
    return ("" if day == time.strftime("%Y-%m-%d ", time.localtime(now)) else day) + time.strftime("%H:%M:%S", time.localtime(at))


def history_lines(lines: Sequence[Mapping[str, Any]], at: float | None, now: float, console: Console) -> list[str]:
    """The table of `history`."""
    if not lines:
        return ["Nobody was there." if at is not None else "Nothing is remembered."]
    rows = [["ID", "LIFE", "STARTED", "STATE", "FOR" if at is not None else "LASTED", "" if at is not None else "ENDED"]]
    for line in lines:
        started, ended = line.get("started"), line.get("ended")
        until = at if at is not None else ended if ended is not None else now
        rows.append(
            [
                console.safe(line["id"]),
                f"#{line['life']}",
                stamp(started if started is not None else line["planned"], now),
                console.safe(line["state"]),
                "" if started is None else tables.age(until - started),
                console.safe(tables.how_it_ended(line.get("wait"))),
            ]
        )
    if at is not None:
        rows = [row[:-1] for row in rows]
    return tables.aligned(rows, console.columns, console.paint, {3: tables.STATE_STYLES})


_LEADS = {"error": "because", "place": "where", "kernel": "kernel", "limit": "limit", "advice": "what to do"}


def explain_lines(answer: Mapping[str, Any], now: float, console: Console) -> list[str]:
    """The chain of causes as text: each container a paragraph, each further cause below the one it led to."""
    safe, lines = console.safe, []
    first = True
    for link in answer.get("chain") or ():
        says = safe(link["says"])
        if link["kind"] == "state":
            if first:
                lines.append(console.paint(says + _times(answer, now), "1"))
            else:
                lines += ["", "and that was because of " + console.paint(safe(link["id"]), "1") + ":"]
            first = False
        elif link["kind"] == "end":
            lines.append(f"  {says}")
        else:
            lines.append(f"  {_LEADS[link['kind']] + ':':12}{says}")
    if (lives := answer.get("lives", 1)) > 1:
        lines += ["", f"life {answer['life']} of {lives} under this id; the others: meso explain --life N {safe(answer['id'])}"]
    if things := answer.get("parked"):
        lines += [
            "",
            "cannot be undone yet, and is tried again:",
            *("  " + fit(safe(text), console.columns - 3) for text in things),
        ]
    for stream, log in (answer.get("logs") or {}).items():
        if log.get("dropped"):
            text = f"of {log['size']} bytes of {stream} the first {log['dropped']} were dropped; its budget is {log['budget']}"
            lines += ["", text]
    if changes := answer.get("changes"):
        lines += ["", *(f"  {stamp(change['time'], now):>19}  {safe(change['state'])}" for change in changes)]
    return lines


def _times(answer: Mapping[str, Any], now: float) -> str:
    started, ended = answer.get("started"), answer.get("ended")
    if started is None:
        return "" if ended is None else f" since {stamp(ended, now)}"
    if ended is None:
        return f", started {tables.age(now - started)} ago"
    return f": it ran for {tables.age(ended - started)}, until {stamp(ended, now)}"


def _readable(note: str) -> str:
    """A moment in a note, in local time."""
    head, mark, number = note.rpartition(" ended at ")
    return f"{head}{mark}{stamp(float(number), 0.0)}" if mark and number.isdigit() else note
