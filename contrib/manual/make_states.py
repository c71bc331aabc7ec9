"""Writes states.md from the tables in mesocosm.kernel.core.states: the diagrams cannot say anything else than the code.

python contrib/manual/make_states.py            # prints the page
python contrib/manual/make_states.py --write    # replaces contrib/manual/states.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from mesocosm.kernel.core.states import CONTAINER, DEADLINES, ENDED, GROUP, JOINT, State

PAGE = Path(__file__).with_name("states.md")


def diagram(table: Mapping[State, Mapping[str, State]]) -> str:
    """One state machine as a Mermaid diagram; events with the same ends share an arrow."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(table))}"]
    for before, events in table.items():
        arrows: dict[State, list[str]] = {}
        for event, after in events.items():
            arrows.setdefault(after, []).append(event)
        lines += [f"    {before} --> {after}: {', '.join(names)}" for after, names in arrows.items()]
    lines += [f"    {state} --> [*]" for state in table if state in ENDED]
    return "\n".join([*lines, "```"])


def page() -> str:
    """The whole page."""
    deadlines = "\n".join(f"| {state} | {seconds:g} s | {event} |" for state, (seconds, event) in DEADLINES.items())
    joint = "\n".join(f"| {parent} | {child} | {event} |" for (parent, child), event in JOINT.items())
    return f"""# States

Made by make_states.py from the tables that the kernel runs on; a test compares the two.

## A container

{diagram(CONTAINER)}

## A group

{diagram(GROUP)}

## Parents pull their children along

| parent | child | the child is told |
|---|---|---|
{joint}

## No state lasts for ever

| state | at most | then |
|---|---|---|
{deadlines}

PLANNED, ADMITTED and STAGED have no timers of their own yet: the way up to the barrier is timed as a whole, by PREPARING's.

What cannot be undone when the time of DESTROYING or ROLLING_BACK is over is parked: named, shown and retried, and in
nobody's way. A kill is accepted at once in every state that has not ended.
"""


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page())
