"""`meso audit`: what the agent found on the machine that its ledger does not have, and the other way round.

What lives here: the verb and its table. What must not: looking, or judging: the agent does that.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mesocosm.kernel.cli import connection
from mesocosm.kernel.cli.output import Console
from mesocosm.kernel.cli.tables import Paint, Safe, aligned

FINDINGS = 6
_CLASSES = (("leftover", "left over", "31"), ("missing", "missing", "33"), ("strangers", "stranger", "36"))


def audit(arguments: argparse.Namespace, console: Console) -> int:
    """The verb; FINDINGS if there is anything to say."""
    with connection.connect(arguments) as client:
        answer = client.audit(repair=arguments.repair)
    notes = answer.get("notes", ())
    if console.as_json:
        console.json(answer)
    else:
        for line in lines(answer, console.columns, console.safe, console.paint):
            console.say(line)
        for note in notes:
            console.words(note)
    return FINDINGS if any(answer[name] for name, _, _ in _CLASSES) else 0


def lines(answer: Mapping[str, Any], columns: int, safe: Safe, paint: Paint) -> list[str]:
    """The table, a line for each finding and one in which its reason has room; last, how many there are."""
    shown: list[str] = []
    done = answer.get("repaired")
    if done:
        shown += _table("undone", [("undone", each) for each in done], columns, safe, paint)
        shown.append("")
    findings = [(word, each) for name, word, _ in _CLASSES for each in answer[name]]
    if findings:
        shown += _table("what", findings, columns, safe, paint)
        shown.append("")
    counts = [f"{len(answer[name])} {text}" for name, text in _COUNTED if answer[name]]
    undone = f"{len(done)} undone; " if done else ""
    shown.append(undone + (", ".join(counts) if counts else "Nothing is left over, nothing is missing, nobody is a stranger."))
    return shown


_COUNTED = (("leftover", "left over"), ("missing", "missing"), ("strangers", "strange"))


def _table(
    what: str, findings: Sequence[tuple[str, Mapping[str, Any]]], columns: int, safe: Safe, paint: Callable[[str, str], str]
) -> list[str]:
    rows = [[what.upper(), "KIND", "CONTAINER", "TARGET"]]
    rows += [[word, safe(each["kind"]), safe(each["ledger"] or "-"), safe(each["target"])] for word, each in findings]
    table = aligned(rows, columns, paint, {0: {word: style for _, word, style in _CLASSES}})
    shown = table[:1]
    for line, (_, each) in zip(table[1:], findings, strict=True):
        shown.append(line)
        if each.get("note"):
            shown.append("    " + safe(each["note"])[: max(20, columns - 4)])
    return shown
