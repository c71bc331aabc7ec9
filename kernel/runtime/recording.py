"""From the ledger's event log to the durable history: what happened is folded into one row for each life of a container.

What lives here: the fold, and the task that carries it on. What must not: the file (`annals`), and anything that a launch
waits for. Theory: the history is a reader of the event log like any other. Its place in the log is written by the same
transaction as what it has read, so whoever goes on after a kill -9 reads each line once. Which log that was is written
beside it, since a ledger does not outlive the machine: where it is another one, what the old one left open is closed, as
`rebooted` after another boot, else as `unknown`.

Everything that may wait for a disk happens in a thread. What cannot be written is tried again, counted and told to whoever
asks for the history; the agent goes on all the same.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import quote

import trio

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, Wait
from mesocosm.kernel.core.states import State
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.annals import Annals, AnnalsError, Change, GroupLine, Line
from mesocosm.kernel.runtime.ledger import Ledger

log = logging.getLogger("mesocosm.history")

PAUSE = 1.0  # seconds from something to its being written
_AGAIN = 10.0  # seconds until what could not be written is tried again
_LAST = 5.0  # seconds that an agent's end waits for its disk
_AT_ONCE = 500  # rows of the log in one transaction
_MOST_KEPT = 20_000  # removed containers that wait for the disk with what only the memory knows of them

Aside = Callable[[Callable[[], None]], Awaitable[object]]


async def in_a_thread(work: Callable[[], None]) -> None:
    """Calls it beside the loop; given up at once when cancelled, though it goes on."""
    await trio.to_thread.run_sync(work, abandon_on_cancel=True)


class Recorder:
    """One history on one ledger. `run` must be running; `aside` is how what may take long is called."""

    def __init__(
        self, path: str, ledger: Ledger, boot_id: str, *, aside: Aside = in_a_thread, clock: Callable[[], float] = time.time
    ):
        self.path = path
        self.annals: Annals | None = None
        self.cursor = 0  # the last line of the log that is on disk here
        self.trouble: str | None = None  # why the history cannot be written at the moment
        self.failures = 0  # attempts to write it that failed
        self.set_aside: list[str] = []
        self._ledger, self._boot_id, self._aside, self._clock = ledger, boot_id, aside, clock
        self._working = threading.Lock()
        self._kept: dict[tuple[str, int], tuple[ContainerSpec, ContainerPlan]] = {}
        self._living: dict[str, int] | None = None  # when this agent began: (id, pid); compared once
        self._tried = float("-inf")
        self._source: sqlite3.Connection | None = None

    # -- in the agent's loop ------------------------------------------------------------------------------------

    def keep(self, container_id: str, plan_key: int, spec: ContainerSpec, plan: ContainerPlan) -> None:
        """The ledger is about to forget this one, perhaps before it was read from there."""
        if len(self._kept) < _MOST_KEPT:
            self._kept[container_id, plan_key] = spec, plan

    def begin(self, living: Mapping[str, int]) -> None:
        """After recovery: these live, and nobody else."""
        token = self._ledger.meta("history")
        if token is None:
            self._ledger.set_meta("history", os.urandom(8).hex())
        self._living = dict(living)

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Writes what happens, some moments later. `changed` returns when something has been added to the log."""
        while True:
            await self._aside(self.catch_up)
            if self.trouble is None and self.cursor >= self._ledger.seq:
                await changed()
            await trio.sleep(PAUSE if self.trouble is None else _AGAIN)

    async def finish(self) -> None:
        """What is left, and the end; a disk that does not answer is not waited for."""
        with trio.CancelScope(shield=True), trio.move_on_after(_LAST):
            await self._aside(self._finish)

    async def beside(self, work: Callable[[], None]) -> None:
        """Calls what may wait for a disk."""
        await self._aside(work)

    # -- beside it ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self._tried = float("-inf")
        self.catch_up()
        with self._working:
            self._close()

    def _close(self) -> None:
        if self.annals is not None:
            self.annals.close()
        if self._source is not None:
            self._source.close()
        self.annals = self._source = None

    def catch_up(self) -> None:
        """Writes all that the log has; raises nothing. What has been read when this returns is on disk, unless `trouble`."""
        with self._working:
            if self.trouble is not None and time.monotonic() < self._tried + _AGAIN / 2:
                return
            self._tried = time.monotonic()
            kept = list(self._kept)
            try:
                self._open()
                assert self.annals is not None
                while self._carry_over(self.annals):
                    pass
                while self.annals.prune():
                    pass
            except (sqlite3.Error, OSError, AnnalsError, ValueError, TypeError, KeyError, IndexError) as error:
                words = f"{type(error).__name__}: {error}" if not isinstance(error, AnnalsError) else str(error)
                if words != self.trouble:
                    log.warning("the history cannot be written: %s", words)
                self.trouble = words
                self.failures += 1
                self._close()
                return
            self.trouble = None
            for key in kept:
                self._kept.pop(key, None)

    def read(self, query: Callable[[Annals], Any]) -> Any:
        """What `query` answers; AnnalsError if it cannot be asked."""
        self.catch_up()
        with self._working:
            try:
                if self.annals is None:
                    raise AnnalsError(self.trouble or "the history is closed")
                return query(self.annals)
            except (sqlite3.Error, OSError) as error:
                raise AnnalsError(f"the history cannot be read: {error}") from error

    def _open(self) -> None:
        if self.annals is None:
            self.annals = Annals(self.path)
            for words in self.annals.set_aside:
                log.warning("set aside: %s", words)
            self.set_aside += self.annals.set_aside
        if self._source is None:
            self._source = sqlite3.connect(
                f"file:{quote(self._ledger.path)}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )

    def _carry_over(self, annals: Annals) -> bool:
        """One transaction; whether there may be more."""
        source = self._source
        assert source is not None
        source.execute("BEGIN")
        try:
            annals.begin()
            try:
                fold = Fold(annals, source, self._kept, self._clock)
                found = source.execute("SELECT value FROM meta WHERE key = 'history'").fetchone()
                if not found:
                    raise AnnalsError("the ledger, which it is copied from, cannot be written")
                token = str(found[0])
                if annals.meta("ledger") != token:
                    if annals.meta("ledger") is not None:
                        fold.close_all("unknown" if annals.meta("boot_id") == self._boot_id else "rebooted")
                    annals.set_meta(ledger=token, cursor=0)
                cursor = int(annals.meta("cursor") or 0)
                rows = source.execute(
                    "SELECT seq, count, time, id, type, plan, body FROM events WHERE seq > ? ORDER BY seq LIMIT ?",
                    (cursor, _AT_ONCE),
                ).fetchall()
                lost = 0
                for row in rows:
                    lost += row[0] - cursor - 1
                    cursor = row[0] + row[1] - 1
                    fold.take(*row[2:])
                if lost:
                    annals.set_meta(lost=int(annals.meta("lost") or 0) + lost)
                is_last = len(rows) < _AT_ONCE
                if is_last and self._living is not None:
                    fold.compare(self._living)
                fold.put()
                annals.set_meta(cursor=cursor, boot_id=self._boot_id)
                if rows or fold.has_changed or self._living is not None:
                    annals.commit()
                    annals.count += fold.new
                else:
                    annals.roll_back()
            except BaseException:
                annals.roll_back()
                raise
        finally:
            source.execute("ROLLBACK")
        self.cursor = cursor
        if is_last:
            self._living = None
        return not is_last


class Fold:
    """One transaction's worth of the log. Lives and groups that it touches are in memory until `put`."""

    def __init__(
        self,
        annals: Annals,
        source: sqlite3.Connection,
        kept: Mapping[tuple[str, int], tuple[ContainerSpec, ContainerPlan]],
        clock: Callable[[], float],
    ) -> None:
        self.new = 0
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
        act = _ACTS.get(kind)
        if act is not None:
            body = (codec.unpack(packed)[1] if packed else None) or {}
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
        waits: Mapping[str, Any] = body.get("containers") or {}
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

    def compare(self, living: Mapping[str, int]) -> None:
        """What is open here and does not live has ended unseen; what lives and is not open here was found by recovery."""
        now = self._clock()
        for container_id, key in list(self._open.items()):
            if container_id not in living:
                self._end(key, now, Wait(container_id, reason="unknown", message="its end was not written down"))
        for container_id, plan in living.items():
            self._known(container_id, now, plan)

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
        row = self._source.execute("SELECT spec FROM containers WHERE id = ? AND plan = ?", (container_id, plan)).fetchone()
        spec = row[0] if row else codec.pack_struct(kept[0]) if kept else None
        row = self._source.execute("SELECT body FROM plans WHERE key = ?", (plan,)).fetchone()
        body = row[0] if row else codec.pack_plan(kept[1]) if kept else None
        text = self._annals.text
        return text(spec, container_id) if spec else None, text(body, container_id) if body else None

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
