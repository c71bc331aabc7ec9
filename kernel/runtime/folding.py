"""What each line of the event log means for the history: lines in, rows out.

What lives here: one transaction's worth of the log, folded into a row for each life of a container and each launch. What must not:
which lines these are (`recording`), and the file (`annals`). Theory: a table says what to do with each type of line; types that it
does not have change no state. A line about somebody nobody has told of is no error: recovery finds such containers, and logs
have gaps.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, Wait
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.annals import Annals, Change, GroupLine, Line
from mesocosm.kernel.runtime.ledger import Excerpt


class Fold:
    """One transaction's worth of the log. Lives and groups that it touches are in memory until `put`."""

    def __init__(
        self,
        annals: Annals,
        source: Excerpt,
        kept: Mapping[tuple[str, int], tuple[ContainerSpec, ContainerPlan]],
        clock: Callable[[], float],
    ) -> None:
        self.new = 0
        self.unreadable: list[tuple[str, bytes | None]] = []  # bodies, and whose
        self._annals, self._source, self._kept, self._clock = annals, source, kept, clock
        self._lines: dict[int, Line] = {line.key: line for line in annals.open_lines()}
        self._open: dict[str, int] = {line.id: line.key for line in self._lines.values()}
        self._members: dict[int, list[int]] = {}
        for line in self._lines.values():
            self._members.setdefault(line.grp, []).append(line.key)
        self._lives: dict[str, int] = {}
        self._groups: dict[int, GroupLine] = {}
        self._named: dict[str, int] = {}  # groups that are not over, by id
        for key in self._members:
            if (group := annals.group(key)) is not None:
                self._groups[key] = group
                self._named[group.id] = key
        self._dirty: set[int] = set()
        self._dirty_groups: set[int] = set()
        self._changes: deque[Change] = deque()
        self._last_line, self._last_group, self._last_change = (
            annals.last("containers"),
            annals.last("groups"),
            annals.last("changes", "n"),
        )

    @property
    def has_changed(self) -> bool:
        """Whether there is anything to put."""
        return bool(self._dirty or self._dirty_groups)

    def put(self) -> None:
        """Hands everything to the file."""
        self._annals.put(
            [self._groups[key] for key in self._dirty_groups], [self._lines[key] for key in sorted(self._dirty)], self._changes
        )

    def take(self, when: float, container_id: str, kind: str, plan: int | None, packed: bytes | None) -> None:
        """One row of the log."""
        if plan is not None:
            self._fill(container_id, plan)
        act = _ACTS.get(kind)
        if act is not None:
            try:
                body = codec.unpack_line(packed)[1]
            except ValueError as problem:  # that it happened, and to whom, is in the row itself
                self.unreadable.append((f"what the event log says of {container_id} with {kind!r}: {problem}", packed))
                body = {}
            act(self, when, container_id, plan, body)

    # -- what each line means -----------------------------------------------------------------------------------

    def _planned(self, when: float, container_id: str, plan: int | None, body: Mapping[str, Any]) -> None:
        key = self._add_group(str(body.get("group", container_id)), State.PREPARING, when, body.get("asked"))
        for offset, member in enumerate(body.get("containers", ())):
            if member in self._open:  # its end was never told: the log has a gap
                self._end(self._open[member], when, Wait(member, reason="unknown", message="its end was not written down"))
            self._add(member, key, State.PREPARING, when, None if plan is None else plan + offset)

    def _staged(self, when: float, container_id: str, plan: int | None, body: Mapping[str, Any]) -> None:
        self._move(self._known(container_id, when), State.STAGED, when)

    def _committed(self, when: float, container_id: str, plan: int | None, body: Mapping[str, Any]) -> None:
        key = self._named.get(str(body.get("group", container_id)))
        if key is None:
            return
        self._set_group(key, state=State.RUNNING.value)
        for line in self._living(key):
            self._move(line.key, State.RUNNING, when, started=when)

    def _exited(self, when: float, container_id: str, plan: int | None, body: Mapping[str, Any]) -> None:
        ended = body.get("ended")
        wait = codec.pack(body["wait"]) if "wait" in body else None
        self._move(self._known(container_id, when), State.DESTROYING, when, ended=when if ended is None else ended, wait=wait)

    def _dead(self, when: float, container_id: str, plan: int | None, body: Mapping[str, Any]) -> None:
        key = self._known(container_id, when)
        self._close(key, when, body.get("wait"), body.get("error"))

    def _over(self, when: float, container_id: str, plan: int | None, body: Mapping[str, Any]) -> None:
        key = self._named.pop(str(body.get("group", container_id)), None)
        if key is None:
            return
        error = body.get("error")
        told = body.get("containers")
        waits: Mapping[str, Any] = told if isinstance(told, dict) else {}
        for line in self._living(key):
            guilty = error if error and error.get("id") == line.id else None
            self._close(line.key, when, waits.get(line.id), guilty)
        self._set_group(
            key, state=str(body.get("state", State.DEAD.value)), ended=when, exit=body.get("exit"), blame=body.get("blame"),
            error=codec.pack(error) if error else None,
        )  # fmt: skip

    # -- what follows from another ledger, or another agent -----------------------------------------------------

    def close_all(self, reason: str) -> None:
        """Those that were open in a ledger that is no more."""
        words = "the machine was restarted" if reason == "rebooted" else "the ledger that knew of it was lost"
        now = self._clock()
        if reason == "rebooted":  # the last moment at which it can have been; if nobody has set the clock since
            now -= time.clock_gettime(time.CLOCK_BOOTTIME)
        for key, line in [(key, line) for key, line in self._lines.items() if line.died is None]:
            self._end(key, max(now, line.started or line.planned), Wait(line.id, reason=reason, message=words))
        for key, group in list(self._groups.items()):
            if group.ended is None:
                self._set_group(key, state=State.DEAD.value, ended=now)
        self._named.clear()

    def compare(self, living: Mapping[str, int], when: float) -> None:
        """What is open here and did not live then has ended unseen; what lived and is not open here was found by recovery."""
        for container_id, key in list(self._open.items()):
            if container_id not in living:
                self._end(key, when, Wait(container_id, reason="unknown", message="its end was not written down"))
        for container_id, plan in living.items():
            self._known(container_id, when, plan)

    def is_open(self, container_id: str) -> bool:
        """Whether it lives, as far as is known here."""
        return container_id in self._open

    def has_ended(self, container_id: str) -> bool:
        """Whether it has lived, and does no more, as far as is known here."""
        return container_id not in self._open and bool(self._lives.get(container_id) or self._annals.life(container_id))

    def _living(self, group: int) -> list[Line]:
        return [self._lines[key] for key in self._members.get(group, ()) if self._lines[key].died is None]

    # -- rows ---------------------------------------------------------------------------------------------------

    def _known(self, container_id: str, when: float, plan: int | None = None) -> int:
        """The life that goes on under that id; one that nobody told of is taken in as it is."""
        key = self._open.get(container_id)
        if key is None:
            name = f"{container_id}+0"  # as `recovery` calls the group of a container that was found without a record
            group = self._named.get(container_id.partition(".")[0]) or self._named.get(name)
            if group is None:
                group = self._add_group(name, State.RUNNING, when, None)
            key = self._add(container_id, group, State.RUNNING, when, plan)
        return key

    def _add_group(self, group_id: str, state: State, when: float, asked: Any) -> int:
        self._last_group += 1
        key = self._last_group
        self._groups[key] = GroupLine(key, group_id, state.value, when, asked=asked if isinstance(asked, int) else None)
        self._named[group_id] = key
        self._dirty_groups.add(key)
        return key

    def _set_group(self, key: int, **fields: Any) -> None:
        self._groups[key] = self._groups[key]._replace(**fields)
        self._dirty_groups.add(key)

    def _add(self, container_id: str, group: int, state: State, when: float, plan: int | None) -> int:
        life = self._lives.get(container_id)
        life = self._lives[container_id] = 1 + (self._annals.life(container_id) if life is None else life)
        self._last_line += 1
        key = self._last_line
        self.new += 1
        spec, text = self._texts(container_id, plan)
        self._lines[key] = Line(key, container_id, life, group, state.value, when, born=self._last_change + 1, spec=spec, plan=text)
        self._open[container_id] = key
        self._members.setdefault(group, []).append(key)
        self._change(key, when, state)
        return key

    def _texts(self, container_id: str, plan: int | None) -> tuple[int | None, int | None]:
        """The keys of its spec and plan: from the ledger, or from memory if they have been removed from there."""
        if plan is None:
            return None, None
        kept = self._kept.get((container_id, plan))
        spec = self._source.specs.get((container_id, plan)) or (codec.pack_struct(kept[0]) if kept else None)
        body = self._source.plans.get(plan) or (codec.pack_plan(kept[1]) if kept else None)
        text = self._annals.text
        return text(spec, container_id) if spec else None, text(body, container_id) if body else None

    def _fill(self, container_id: str, plan: int) -> None:
        """What it is, if that was not to be had yet when it was told of: a pod is planned in one line, and may be read so far."""
        key = self._open.get(container_id)
        if key is not None and self._lines[key].plan is None:
            spec, text = self._texts(container_id, plan)
            self._lines[key] = self._lines[key]._replace(spec=spec, plan=text)
            self._dirty.add(key)

    def _move(self, key: int, state: State, when: float, **fields: Any) -> None:
        self._lines[key] = self._lines[key]._replace(state=state.value, **fields)
        self._change(key, when, state)

    def _change(self, key: int, when: float, state: State) -> None:
        self._last_change += 1
        self._changes.append(Change(self._last_change, when, key, state.value))
        self._dirty.add(key)

    def _end(self, key: int, when: float, wait: Wait) -> None:
        self._close(key, when, {name: getattr(wait, name) for name in wait.__struct_fields__}, None)

    def _close(self, key: int, when: float, wait: Any, error: Any) -> None:
        line = self._lines[key]
        self._move(
            key, State.DEAD, when,
            ended=when if line.ended is None else line.ended,
            wait=codec.pack(wait) if wait is not None else line.wait,
            error=codec.pack(error) if error is not None else line.error,
        )  # fmt: skip
        self._lines[key] = self._lines[key]._replace(died=self._last_change)
        self._open.pop(line.id, None)


_ACTS: Mapping[str, Callable[[Fold, float, str, int | None, Mapping[str, Any]], None]] = {
    "planned": Fold._planned,
    "staged": Fold._staged,
    "committed": Fold._committed,
    "exited": Fold._exited,
    "dead": Fold._dead,
    "end": Fold._over,
}
