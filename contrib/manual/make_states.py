"""Writes states.md from the tables in mesocosm.kernel.core.states: the diagrams cannot say anything else than the code.

python contrib/manual/make_states.py            # prints the page
python contrib/manual/make_states.py --write    # replaces contrib/manual/states.md
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from mesocosm.kernel.core.states import CONTAINER, DEADLINES, ENDED, GROUP, JOINT, UNCLAIMED, UNTIMED, State

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
    untimed = "\n".join(f"| {state} | {bound} |" for state, bound in UNTIMED.items())
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

| state | no timer, since it is bounded by |
|---|---|
{untimed}

One task looks at all launches once a second, so a state may last a second longer than the table says, and none costs a timer.
COMMITTED is over when the first member has been heard of. Containers at a barrier whose agent has died wait {UNCLAIMED:g} s for
the next one; then the launcher aborts them.

## What is stuck

* What cannot be undone when the time of DESTROYING or ROLLING_BACK is over is parked: the container is DEAD, `ps` and `explain`
  name what is left and who holds it (pid, command, how), it is retried after 1, 2, 4 … 60 s, and it is in nobody's way: only a
  container that would make the very same thing is refused, with the holder's name.
* A process that SIGKILL does not end (it waits in the kernel for a file system that does not answer, a tracer holds it, a
  freezer of somebody else's froze it) stays DESTROYING. `ps` and `explain` say what it is stuck in and who could let it go; it is
  killed again after 1, 2, 4 … 60 s. Its group waits for it, all others go on. When it is let go of, all ends by itself.
* Whatever could wait for such a file system in the agent's stead (an undo near it, the opening of a volume's source on it) is
  done by a process of its own, which can be left behind.

A kill is accepted at once in every state that has not ended.
"""


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page())
