"""The ledger: what has been made, what is about to be made, and how things ended. SQLite on tmpfs.

What lives here: statements. What must not: decisions, and the file itself (`book`). Theory: every transaction is one
sentence that must be true as a whole ("these entries exist from now on", "this group is committed", "this container is
dead and nothing of it is left"), and the events that tell about it are written by the same transaction. On tmpfs there is
no disk to wait for (synchronous=OFF): the file outlives the agent, and nothing outlives the machine.

A row that cannot be read is set aside and named in `set_aside`; it never stops the agent.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple
from urllib.parse import quote

from mesocosm.kernel.core.names import root_of
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.book import Book, EventRow
from mesocosm.kernel.runtime.seal import BrokenSealError, seal, sealed_line, unseal, unsealed_line
from mesocosm.kernel.runtime.undoing import Entry


class ContainerRow(NamedTuple):
    """A container as stored; the blobs are decoded by who reads it."""

    id: str
    group: str
    state: str
    plan: int
    spec: bytes
    base: int | None
    pid: int | None
    started: float | None
    ended: float | None
    wait: bytes | None
    error: bytes | None
    reason: str | None  # why it has been told to end, if a client did
    birth: str | None  # which process had that pid (linux.pidfds.identity)


class ParkedRow(NamedTuple):
    """An entry that could not be undone, and why."""

    seq: int
    container: str
    entry: bytes
    note: str


class Excerpt(NamedTuple):
    """Some of the event log as it is written, and what it refers to: specs by (container, plan), plans by key, both packed."""

    token: str | None  # which log it is
    rows: list[Any]  # (seq, lines, time, id, type, plan, body)
    specs: dict[tuple[str, int], bytes]
    plans: dict[int, bytes]
    is_all: bool  # of what counts by now, if there are fewer rows than were asked for; else some of it cannot be written yet


HOST = ""  # the container of entries that belong to the whole agent
Parked = tuple[str, Entry, str]  # (container, entry, why it is still there)


class Ledger(Book):
    """One open ledger. Use it as a context manager for a transaction: ``with ledger: ledger.dead(…)``."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._broken_plans: set[int] = set()  # that have been told of
        self.left_out = 0  # numbers that no event has, by the opening of this file
        self._drop_odd_rows()
        self.seq = self._rows("SELECT coalesce(max(seq + count - 1), 0) FROM events")[0][0]
        try:
            self.seq = max(self.seq, int(self.meta("seq") or 0))
        except ValueError as problem:
            self.note_set_aside(f"the number of the last event: {problem}")
        self.opened_at = self.seq  # whatever has a higher number, this agent has written, or nobody of this file
        if self.set_aside:
            self.left_out = _JUMP
            self.pending.append(EventRow(_JUMP, time.time(), "", "", None, None))
            self.flush()
        self._plan = self._rows("SELECT coalesce(max(key), 0) FROM plans")[0][0]

    # -- what a run is ------------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """A line about the whole ledger (boot_id, run_id)."""
        for (value,) in self._rows("SELECT value FROM meta WHERE key = ?", (key,)):
            try:
                return unsealed_line(value, key)
            except BrokenSealError as problem:
                self.note_set_aside(f"the line {key}: {problem}", str(value).encode())
        return None

    def set_meta(self, key: str, value: str) -> None:
        """Writes such a line."""
        self.write(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (key, sealed_line(value, key))
        )

    # -- the sentences ------------------------------------------------------------------------------------------

    def next_plan(self) -> int:
        """A key for a plan: never used before in this ledger."""
        self._plan += 1
        return int(self._plan)

    def intend(
        self,
        group: tuple[str, str, str],
        containers: Iterable[tuple[str, str, int, bytes, int | None]],
        plans: Iterable[tuple[int, bytes]],
        entries: Iterable[tuple[str, bytes]],
    ) -> None:
        """All of a launch before any of it exists.

        group (id, barrier, executor); containers (id, group, plan key, spec, uid base); plans (key, plan); entries
        (container, all of its entries). Blobs are `codec`'s.
        """
        self.write("INSERT INTO groups (id, barrier, executor, state) VALUES (?, ?, ?, 'PREPARING')", group)
        many = self.write_many
        rows = [(found, grp, plan, seal(spec, found, grp, plan, base), base) for found, grp, plan, spec, base in containers]
        many("INSERT INTO containers (id, grp, state, plan, spec, base) VALUES (?, ?, 'PREPARING', ?, ?, ?)", rows)
        many("INSERT INTO plans VALUES (?, ?)", [(key, seal(body, key)) for key, body in plans])
        many("INSERT INTO entries VALUES (?, ?)", [(found, seal(body, found)) for found, body in entries])

    def adopt(
        self,
        group: tuple[str, str, str],
        container_id: str,
        plan: int,
        spec: bytes,
        process: tuple[int | None, str | None],
        base: int | None = None,
        entries: bytes = b"",
    ) -> None:
        """A container that was found running without a record, in the group (id, barrier, executor); `process` (pid, birth)."""
        self.write("INSERT OR IGNORE INTO groups (id, barrier, executor, state) VALUES (?, ?, ?, 'COMMITTED')", group)
        self.write(
            "INSERT OR REPLACE INTO containers (id, grp, state, plan, spec, base, pid, birth)"
            " VALUES (?, ?, 'RUNNING', ?, ?, ?, ?, ?)",
            (container_id, group[0], plan, seal(spec, container_id, group[0], plan, base), base, *process),
        )
        if entries:
            self.write("INSERT OR REPLACE INTO entries VALUES (?, ?)", (container_id, seal(entries, container_id)))

    def commit(self, group: str, started: Iterable[tuple[int, str, float, str]]) -> None:
        """The decision: from here the group only goes forward. `started` (pid, its birth, time, container)."""
        self.write("UPDATE groups SET state = 'COMMITTED' WHERE id = ?", (group,))
        self.write_many("UPDATE containers SET state = 'RUNNING', pid = ?, birth = ?, started = ? WHERE id = ?", started)

    def born(self, container_id: str, pid: int, birth: str) -> None:
        """Which process it is, of one whose row did not say so."""
        self.write("UPDATE containers SET pid = ?, birth = ? WHERE id = ?", (pid, birth, container_id))

    def is_begun(self, container_ids: Iterable[str]) -> bool:
        """Whether it has been told of any of these that its program runs."""
        statement = "SELECT 1 FROM events WHERE type = 'started' AND id IN (SELECT value FROM json_each(?)) LIMIT 1"
        return bool(self._rows(statement, (json.dumps(list(container_ids)),)))

    def stopping(self, container_ids: Iterable[str], reason: str) -> None:
        """A client's decision that these end: an agent that comes after this one must know it."""
        self.write_many("UPDATE containers SET reason = ? WHERE id = ?", [(reason, found) for found in container_ids])

    def exited(self, container_id: str, ended: float, wait: bytes, error: bytes | None) -> None:
        """How it ended; what it had is still there."""
        self.write(
            "UPDATE containers SET state = 'DESTROYING', ended = ?, wait = ?, error = ? WHERE id = ?",
            (ended, seal(wait, container_id), error, container_id),
        )

    def dead(self, container_id: str, ended: float, wait: bytes, error: bytes | None) -> None:
        """It is dead, and nothing of it is left but what is kept, and what is parked."""
        self.write(
            "UPDATE containers SET state = 'DEAD', ended = ?, wait = ?, error = ? WHERE id = ?",
            (ended, seal(wait, container_id), error, container_id),
        )

    def park(self, container_id: str, entry: Entry, note: str) -> None:
        """This entry could not be undone: `note` says why."""
        row = (container_id, seal(codec.pack_entries([entry]), container_id), note)
        self.write("INSERT INTO parked (container, entry, note) VALUES (?, ?, ?)", row)

    def park_again(self, seq: int, note: str) -> None:
        """It is still there, for another reason."""
        self.write("UPDATE parked SET note = ? WHERE seq = ?", (note, seq))

    def end_group(self, group: str, state: str, blame: str | None, error: bytes | None) -> None:
        """DEAD or ROLLED_BACK."""
        self.write("UPDATE groups SET state = ?, blame = ?, error = ? WHERE id = ?", (state, blame, error, group))

    def blame(self, group: str, blame: str | None, error: bytes | None) -> None:
        """Who decided the end of a group, while it is still ending."""
        self.write("UPDATE groups SET blame = ?, error = ? WHERE id = ?", (blame, error, group))

    def undone(self, container_ids: Iterable[str], parked: Iterable[Parked]) -> None:
        """Nothing of these is left (kept entries neither), except what is parked."""
        for each in parked:
            self.park(*each)
        self.write_many("DELETE FROM entries WHERE container = ?", [(found,) for found in container_ids])

    def remove(self, container_ids: Sequence[str], groups: Sequence[str]) -> None:
        """Forgets containers and groups; what is parked stays until it is undone."""
        ids = [(found,) for found in container_ids]
        self.write_many("DELETE FROM containers WHERE id = ?", ids)
        self.write_many("DELETE FROM entries WHERE container = ?", ids)
        self.write_many("DELETE FROM groups WHERE id = ?", [(found,) for found in groups])

    def entries_are(self, container_id: str, entries: bytes) -> None:
        """All that is to be undone of this container, or under HOST of what the containers of this agent share."""
        self.write("INSERT OR REPLACE INTO entries VALUES (?, ?)", (container_id, seal(entries, container_id)))

    def drop_parked(self, seqs: Iterable[int]) -> None:
        """These have been undone."""
        self.write_many("DELETE FROM parked WHERE seq = ?", [(seq,) for seq in seqs])

    # -- reading ------------------------------------------------------------------------------------------------

    def groups(self) -> list[tuple[str, str, str, str, str | None, bytes | None]]:
        """All groups: (id, barrier, executor, state, blame, error)."""
        return self._rows("SELECT id, barrier, executor, state, blame, error FROM groups")

    def containers(self) -> list[ContainerRow]:
        """All containers in the order of their making; `opened` has what is in them."""
        rows = self._rows(
            "SELECT id, grp, state, plan, spec, base, pid, started, ended, wait, error, reason, birth"
            " FROM containers ORDER BY rowid"
        )
        return [ContainerRow(*row) for row in rows]

    def entries(self) -> dict[str, bytes]:
        """The entries of every container, and under HOST those of the agent, as far as they are what was written."""
        found = {}
        for container, body in self._rows("SELECT container, body FROM entries"):
            try:
                found[container] = unseal(body, container)
            except BrokenSealError as problem:
                whose = f"entries of {container}" if container else "entries of the agent"
                self.note_set_aside(f"{whose}: {problem}", body)
                self.write("DELETE FROM entries WHERE container = ?", (container,))
        return found

    def entries_of(self, container_id: str) -> bytes | None:
        """The entries of one container, or of HOST."""
        for (body,) in self._rows("SELECT body FROM entries WHERE container = ?", (container_id,)):
            return _unsealed(body, container_id) or None
        return None

    def parked(self) -> list[ParkedRow]:
        """What could not be undone, in the order in which that was found out. An entry that is not what was written is empty."""
        rows = self._rows("SELECT seq, container, entry, note FROM parked ORDER BY seq")
        return [ParkedRow(seq, container, _unsealed(entry, container), note) for seq, container, entry, note in rows]

    def opened(self, row: ContainerRow) -> ContainerRow:
        """The row with its spec and wait as they were given; BrokenSealError if they are not what was written."""
        return row._replace(
            spec=unseal(row.spec, row.id, row.group, row.plan, row.base), wait=row.wait and (_unsealed(row.wait, row.id) or None)
        )

    def plan(self, key: int) -> bytes | None:
        """The stored plan of that key; None if it is not there any more, or not what was written."""
        for (body,) in self._rows("SELECT body FROM plans WHERE key = ?", (key,)):
            try:
                return unseal(body, key)
            except BrokenSealError as problem:
                if key not in self._broken_plans:
                    self._broken_plans.add(key)
                    self.note_set_aside(f"plan {key}: {problem}", body)
        return None

    def excerpt(self, token: str | None, since: int, limit: int) -> Excerpt:
        """What has been written of the event log after `since`; from its beginning if it is not the log that `token` names."""
        own = self.meta("history")
        since = since if token == own else 0
        rows = self._rows(
            "SELECT seq, count, time, id, type, plan, body FROM events"
            " WHERE seq >= coalesce((SELECT max(seq) FROM events WHERE seq <= ?), 0) ORDER BY seq LIMIT ?",
            (since, limit + 1),
        )
        rows = [row for row in rows if row[0] + row[1] > since + 1][:limit]
        specs, plans = {}, {}
        for found, key in {(row[3], row[5]) for row in rows if row[5] is not None}:
            if (body := self.plan(key)) is not None:
                plans[key] = body
            one = "SELECT spec, grp, base FROM containers WHERE id = ? AND plan = ?"
            for spec, group, base in self._rows(one, (found, key)):
                specs[found, key] = _unsealed(spec, found, group, key, base)
        return Excerpt(own, rows, specs, plans, not self._unwritten)

    def events_after(self, since: int, limit: int) -> list[tuple[int, EventRow]]:
        """Stored rows that hold a line numbered above `since`, oldest first."""
        rows = self._rows(
            "SELECT * FROM events WHERE seq >= coalesce((SELECT max(seq) FROM events WHERE seq <= ?), 0) ORDER BY seq LIMIT ?",
            (since, limit + 1),
        )
        if len(rows) <= limit:
            rows += self._unwritten
        return [(row[0], EventRow(*row[1:])) for row in rows if row[0] + row[1] > since + 1][:limit]

    @property
    def pruned_at(self) -> int:
        """The number of the last event when `prune` was last called, by whichever agent; 0 for never."""
        return int(self.meta("pruned") or 0)

    def prune(self, keep: int, followed: Collection[str] = ()) -> None:
        """Drops events older than the last `keep` numbers, except those of the living and of the pods `followed`, and plans
        nobody refers to."""
        last = self.seq - keep
        ids = self._rows("SELECT DISTINCT id FROM events WHERE seq <= ?", (last,)) if followed else ()
        with self:
            self.set_meta("seq", str(self.seq))
            self.set_meta("pruned", str(self.seq))
            self.write(
                "DELETE FROM events WHERE seq <= ? AND id NOT IN (SELECT id FROM containers WHERE state != 'DEAD')"
                " AND id NOT IN (SELECT value FROM json_each(?))",
                (last, json.dumps([found for (found,) in ids if root_of(found) in followed])),
            )
            self.write(
                "DELETE FROM plans WHERE key NOT IN "
                "(SELECT plan FROM events WHERE plan IS NOT NULL UNION SELECT plan FROM containers)"
            )

    def set_row_aside(self, row: ContainerRow, error: Exception) -> None:
        """A container whose row cannot be believed: out of the way, named, and kept as it was; its entries stay."""
        self.note_set_aside(f"container {row.id}: {error}", repr(tuple(row)).encode())
        self.write("DELETE FROM containers WHERE id = ?", (row.id,))

    def _drop_odd_rows(self) -> None:
        """Rows with values of a kind that no ledger of ours has. Numbers among them: counting on from these would lead nowhere."""
        for table, condition in _ODD.items():
            odd = self._rows(f"SELECT count(*) FROM {table} WHERE {condition}")[0][0]
            if odd:
                self.note_set_aside(f"{odd} rows of {table} are of a kind that was never written")
                self.write(f"DELETE FROM {table} WHERE {condition}")


_JUMP = 1_000_000  # numbers of events that a damaged ledger may have forgotten: none of them is given again. A row without lines
_ODD = {
    "events": f"seq NOT BETWEEN 1 AND {1 << 52} OR typeof(count) != 'integer' OR count NOT BETWEEN 1 AND {1 << 20}"
    " OR typeof(time) NOT IN ('real', 'integer') OR typeof(id) != 'text' OR typeof(type) != 'text'",
    "containers": "typeof(id) != 'text' OR typeof(grp) != 'text' OR typeof(state) != 'text'",
    "groups": "typeof(id) != 'text' OR typeof(barrier) != 'text' OR typeof(executor) != 'text' OR typeof(state) != 'text'",
    "parked": "typeof(container) != 'text' OR typeof(note) != 'text'",
    "plans": f"key NOT BETWEEN 1 AND {1 << 52}",
}


def _unsealed(blob: object, *about: object) -> bytes:
    try:
        return unseal(blob, *about)
    except BrokenSealError:
        return b""


def living_processes(path: str, boot_id: str) -> list[tuple[int, str]]:
    """(pid, birth) of those that an earlier agent of this boot left alive, looked up without changing anything; none if that
    cannot be read: whoever opens the ledger for good deals with it."""
    try:
        with closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as db:
            [line] = db.execute("SELECT value FROM meta WHERE key = 'boot_id'").fetchone()
            if line not in (boot_id, sealed_line(boot_id, "boot_id")):  # as version 2 wrote it, and as we do
                return []
            return db.execute("SELECT pid, birth FROM containers WHERE state != 'DEAD' AND pid > 0 AND birth > ''").fetchall()
    except (sqlite3.Error, TypeError):
        return []


def encode_error(error: dict[str, Any] | None) -> bytes | None:
    """An error object for a column."""
    return None if error is None else codec.pack(error)
