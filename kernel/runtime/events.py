"""The event log: one numbered line for everything that happens to a container or a group.

What lives here: how lines are stored, expanded again, and followed. Theory: numbers are given when a line is
written into the ledger and a line is shown only then, so numbers have no gaps, survive an agent, and a line that
somebody has seen is never taken back. Lines that the plan can tell (`effect`, `step`) are not stored one by one:
a row says "effects a…b, then steps c…d, then this" and is expanded when it is read.

A subscriber reads the ledger at its own speed and is only *woken* by it: a slow one costs nothing. Nor may it keep the
history from being forgotten: one that is further behind than that is told so, and never handed a gap. Who follows one pod
needs so few lines that they are kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import trio

from mesocosm.kernel.core.errors import LaggedError
from mesocosm.kernel.core.names import is_within, root_of
from mesocosm.kernel.core.plan import ContainerPlan, effect_as_data, step_as_data
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.book import EventRow
from mesocosm.kernel.runtime.ledger import Ledger

HISTORY = 20_000  # numbers of ended containers that are kept
_PRUNE_EVERY = 5_000
_BATCH = 200
_LAZY = 0.01  # seconds that a line may wait for a transaction to ride on, if somebody follows
_LAZIER = 0.05  # if nobody does
_AGAIN = 1.0  # seconds until what could not be written is tried again


class Journal:
    """Adds lines, follows them, keeps the history bounded."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.time) -> None:
        self._ledger, self._clock = ledger, clock
        self._changed = trio.lowlevel.ParkingLot()
        self._idle: trio.lowlevel.ParkingLot = trio.lowlevel.ParkingLot()
        self._is_woken = False
        self._followers: Counter[str] = Counter()  # by the pod that they follow; "" for all
        # Written down: agents that live for a minute each would never have told of enough to prune.
        self._pruned_at = ledger.pruned_at
        self._forgotten = max(0, self._pruned_at - HISTORY)  # up to this number there are gaps
        self._pruned_at += ledger.left_out
        self._hurried = trio.lowlevel.ParkingLot()  # the writer, while nobody follows
        self._plans: dict[int, ContainerPlan] = {}
        ledger.on_commit = self._wake

    def _wake(self) -> None:
        self._changed.unpark_all()

    def add(
        self,
        container_id: str,
        kind: str,
        body: Mapping[str, Any] | None = None,
        *,
        plan: int | None = None,
        span: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> None:
        """A line, written by the next transaction or within some milliseconds.

        `span` (effects from, to, steps from, to) puts lines of the plan `plan` before it; kind "" adds only those.
        """
        count = span[1] - span[0] + span[3] - span[2] + (1 if kind else 0)
        if not count:
            return
        spanned = span if plan is not None else None
        packed = codec.pack([spanned, body]) if spanned or body else None
        self._ledger.pending.append(EventRow(count, self._clock(), container_id, kind, plan, packed))
        if self._idle:
            self._idle.unpark_all()

    async def changed(self) -> None:
        """Returns when the next line has been written."""
        await self._changed.park()

    def wake(self) -> None:
        """There is something to tidy, though nothing to write."""
        self._is_woken = True
        self._idle.unpark_all()

    async def keep_writing(self, tidy: Callable[[], Awaitable[None]]) -> None:
        """Writes lines that no transaction came along for, calls `tidy`, and prunes. Runs as long as the agent."""
        while True:
            if not self._ledger.pending and not self._is_woken:
                with trio.move_on_after(float("inf") if self._ledger.trouble is None else _AGAIN):
                    await self._idle.park()
            self._is_woken = False
            if self._followers:
                await trio.sleep(_LAZY)
            else:
                with trio.move_on_after(_LAZIER):
                    await self._hurried.park()
            self._ledger.flush()
            await tidy()
            if self._ledger.seq - self._pruned_at > _PRUNE_EVERY:
                self.prune(HISTORY)

    def prune(self, keep: int) -> None:
        """Forgets all but the last `keep` numbers, what lives, and the pods that somebody follows."""
        self._ledger.prune(keep, self._followers)
        self._pruned_at = self._ledger.seq
        self._forgotten = self._pruned_at - keep
        self._plans.clear()

    def expand(self, first: int, row: EventRow) -> list[dict[str, Any]]:
        """The lines of a stored row, numbered from `first`."""
        base = {"v": 1, "seq": first, "time": row.time, "id": row.id}
        lines: list[dict[str, Any]] = []
        try:
            span, body = codec.unpack_line(row.body)
        except ValueError:
            return [{**base, "seq": first + row.lines - 1, "type": row.type or "step"}]
        if span:
            plan = self._plan(row.plan)
            if plan is None or not _fits(span, row, plan):  # pruned in between, or damaged: the numbers stay, their content is gone
                return [{**base, "seq": first + row.lines - 1, "type": row.type or "step", **body}]
            for index in range(span[0], span[1]):
                lines.append({**base, "seq": first + len(lines), "type": "effect", **effect_as_data(index, plan.effects[index])})
            for index in range(span[2], span[3]):
                lines.append({**base, "seq": first + len(lines), "type": "step", **step_as_data(index, plan.setup[index])})
        if row.type:
            lines.append({**base, "seq": first + len(lines), "type": row.type, **body})
        return lines

    def _plan(self, key: int | None) -> ContainerPlan | None:
        if key is None:
            return None
        found = self._plans.get(key)
        if found is None:
            blob = self._ledger.plan(key)
            if blob is None:
                return None
            found = codec.unpack_plan(blob)
            if len(self._plans) > 256:
                self._plans.clear()
            self._plans[key] = found
        return found

    def read(self, since: int, container_id: str | None = None) -> tuple[int, list[dict[str, Any]]]:
        """Some lines numbered above `since` (of one container and all below it), and the number to go on from."""
        rows = self._ledger.events_after(since, _BATCH)
        if not rows:  # numbers that a damaged ledger has lost, or that were left out after it
            return max(since, self._ledger.seq), []
        lines: list[dict[str, Any]] = []
        for first, row in rows:
            last = first + row.lines - 1
            if container_id is None or is_within(row.id, container_id):
                lines.extend(line for line in self.expand(first, row) if line["seq"] > since)
            since = max(since, last)
        return since, lines

    async def follow(self, since: int, container_id: str | None = None) -> AsyncGenerator[dict[str, Any], None]:
        """All lines numbered above `since` that are kept, for ever; from the first one on there are no gaps. LaggedError for a
        reader of everything who is so far behind that there would be one."""
        followed = "" if container_id is None else root_of(container_id)
        self._followers[followed] += 1
        self._hurried.unpark_all()
        if since > self._ledger.seq:
            since = 0  # numbers that an earlier agent gave and could not write down any more: better twice than never
        try:
            while True:
                since, lines = self.read(since, container_id)
                for line in lines:
                    yield line
                if since >= self._ledger.seq:
                    await self._changed.park()
                else:
                    await trio.lowlevel.checkpoint()
                if since < self._forgotten and not followed:
                    raise LaggedError(
                        "lagged: this reader did not keep up, and what it would read next has been forgotten",
                        have=f"{self._ledger.seq - since} lines behind",
                        need=f"≤ {HISTORY}",
                        hint="read faster, or follow one container",
                    )
        finally:
            self._followers -= Counter([followed])

    async def follow_group(
        self, since: int, event_id: str, mark: str | None, roots: Sequence[str]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of one group, up to its `end`: of what is at or below `roots`, and those about the group as a whole,
        which carry `event_id` and, if it is a nested one, `mark` as their `group`."""
        async with aclosing(self.follow(since, event_id)) as lines:
            async for line in lines:
                about_all = line["id"] == event_id and line.get("group") == mark
                if about_all or any(is_within(line["id"], root) for root in roots):
                    yield line
                if about_all and line["type"] == "end":
                    return


def _fits(span: tuple[int, int, int, int], row: EventRow, plan: ContainerPlan) -> bool:
    """Whether the plan has these, and they are as many as the row has numbers for."""
    one, other, first, last = span
    count = other - one + last - first + (1 if row.type else 0)
    return 0 <= one <= other <= len(plan.effects) and 0 <= first <= last <= len(plan.setup) and count == row.lines
