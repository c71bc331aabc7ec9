"""What `run` knows of its group, from event lines alone: members, states, how each ended.

What lives here: a model fed with events and asked by whatever paints it. What must not: painting, clocks, sockets.

Theory: the client keeps no opinion of its own about states; it remembers the last word of the agent for each member.
So a run that lost its agent and found the next one goes on with the same model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesocosm.kernel.cli.tables import how_it_ended, moment
from mesocosm.kernel.core.names import is_within

# What the type of an event means for the state of the container it is about.
STATES: Mapping[str, str] = {
    "planned": "PLANNED",
    "admitted": "ADMITTED",
    "effect": "PREPARING",
    "step": "PREPARING",
    "staged": "STAGED",
    "committed": "COMMITTED",
    "started": "RUNNING",
    "exited": "DESTROYING",
    "undone": "DESTROYING",
    "dead": "DEAD",
    "rolled_back": "ROLLED_BACK",
}
_NEVER_BACK = {"DEAD", "ROLLED_BACK"}


@dataclass
class Member:
    """One container of the group. `last_line`: what it printed last, unescaped."""

    id: str
    state: str = "PLANNED"
    started: float | None = None
    ended: float | None = None
    wait: Mapping[str, Any] | None = None
    last_line: str = ""

    @property
    def ending(self) -> str:
        """How it ended, in words; empty while it has not."""
        return how_it_ended(self.wait)


@dataclass
class Progress:
    """The group and its members, in the order in which they were heard of.

    Of a nested group, `name` is the container that it is in, `nested` its tasks, and `group` its id, once that is known.
    """

    name: str
    members: dict[str, Member] = field(default_factory=dict)
    last_seq: int = 0
    end: Mapping[str, Any] | None = None
    nested: Sequence[str] = ()
    group: str | None = None

    def feed(self, event: Mapping[str, Any]) -> Member | None:
        """Takes one event line in; the member it is about, None where it is about the whole."""
        if isinstance(event.get("seq"), int):
            self.last_seq = max(self.last_seq, event["seq"])
        kind = str(event.get("type"))
        if self.nested and self.group is None:
            self.group = event.get("group")
        if kind == "end" and event.get("group") == self.group:
            self._finish(event)
            return None
        if not event.get("id"):
            return None
        for container_id in event.get("containers") or ():
            if isinstance(container_id, str):
                self.members.setdefault(container_id, Member(container_id))
        if self.nested and event["id"] == self.name:
            return None  # about the group; the container around it is none of it
        member = self.members.setdefault(str(event["id"]), Member(str(event["id"])))
        if "group" in event:
            return member  # about a group that was launched inside this container
        state = STATES.get(kind)
        if kind == "undone" and member.state in ("PLANNED", "PREPARING", "STAGED", "ADMITTED", "ROLLING_BACK"):
            state = "ROLLING_BACK"
        if state and member.state not in _NEVER_BACK:
            member.state = state
        if kind == "started":
            member.started = moment(event.get("time"))
        if kind == "committed" and member.id == self.name:
            member.started = member.started or moment(event.get("time"))
        if kind in ("exited", "dead"):
            member.ended = member.ended or moment(event.get("time"))
            member.wait = event.get("wait") or (event if "exit" in event else member.wait)
        return member

    def _finish(self, event: Mapping[str, Any]) -> None:
        self.end = event
        waits = event.get("containers") or {}
        for container_id, wait in waits.items():
            member = self.members.setdefault(container_id, Member(container_id))
            member.wait = wait or member.wait
            member.ended = member.ended or moment(event.get("time"))
        for member in self.members.values():
            member.state = str(event.get("state", "DEAD"))
        root = self.members.get(self.name)
        if root is not None and len(self.members) > 1 and isinstance(event.get("exit"), int):
            root.wait = {"exit": event["exit"]}  # it only held what the others shared: its own end says nothing

    def is_about(self, event: Mapping[str, Any]) -> bool:
        """Whether an event is about this group: the next agent tells of all that is in the container around a nested one."""
        if not self.nested:
            return True
        if event.get("id") == self.name:
            return self.group in (None, event.get("group"))
        return any(is_within(str(event.get("id")), root) for root in self.nested)

    @property
    def roots(self) -> Sequence[str]:
        """What to end if the group is to end."""
        return self.nested or [self.name]

    @property
    def title(self) -> str:
        """What to call the group as a whole."""
        return self.group or self.name

    def short(self, container_id: str) -> str:
        """The id without the group's name, for people who look at one group."""
        return container_id.removeprefix(self.name + ".")
