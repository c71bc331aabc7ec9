"""The machine that is looked at: a run directory, its agents under a warden, and what can be seen of them without asking any.

What lives here: beginning and ending agents, and looking (the ledger in a copy, the launcher's inventory, a census). What must not:
what is done meanwhile (every_call_scenarios.py), when somebody is killed (every_call_rounds.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import select
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import wardens

from mesocosm.kernel import client as clients
from mesocosm.kernel.cli import paths
from mesocosm.kernel.client import Client, RemoteError
from mesocosm.kernel.launcher.connecting import connect as to_launcher
from mesocosm.kernel.launcher.passing import receive, send
from mesocosm.kernel.launcher.protocol import MAX_MESSAGE
from mesocosm.kernel.linux.probe import run_id
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.testing.census import Census, census, left_over

PATIENCE = 30.0  # seconds for what takes some hundredths
TABLES = ("groups", "containers", "entries", "parked", "aside")


def until(what: str, condition: Callable[[], Any]) -> Any:
    """What `condition` answers once it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)
    return found


class Machine:
    """The run directory, its agents, and what can be seen of them without asking any."""

    def __init__(self, marks: str, mishaps: Mapping[str, Callable[[], None]]) -> None:
        self.marks = marks
        self.run_dir = paths.make_run_dir()
        self.agents = wardens.Agents(mishaps)
        self.client: Client | None = None
        self.keepers: dict[int, int] = {}  # pidfds of the launchers, and of the processes above them

    def begin(self, mishap: str = "") -> Client:
        """An agent that serves; `client` is a connection to it."""
        until("a directory that nobody has locked", self._is_free)
        self.agents.start(mishap)
        client = self.attach()
        self.know_keeper()
        return client

    def _is_free(self) -> bool:
        """Whether nobody has the agent's lock: a program that it was just starting has it, too, up to its execve."""
        with contextlib.suppress(FileNotFoundError):
            directory = os.open(self.run_dir, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                os.close(directory)
        return True

    def know_keeper(self) -> None:
        """Who keeps the launcher that there is."""
        for pid in self.launcher():
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{pid}/status").read_text().partition("\nPPid:")[2].split()[0])
                for found in {parent, pid} - {found for found, pidfd in self.keepers.items() if not self._has_ended(pidfd)}:
                    if found in self.keepers:
                        os.close(self.keepers.pop(found))
                    self.keepers[found] = os.pidfd_open(found)

    def attach(self) -> Client:
        """A new connection to the agent that is on its way up."""
        try:
            ended = os.pidfd_open(self.agents.pid)
        except ProcessLookupError:
            raise AgentDiedError from None
        try:
            self.client = until("an agent that serves", lambda: self._try(ended))
        finally:
            os.close(ended)
        return self.client  # type: ignore[return-value] # just made

    def _try(self, ended: int) -> Client | None:
        try:
            found = clients.connect(f"{self.run_dir}/agent.sock", timeout=PATIENCE, reconnect=0)  # none that was not begun here
        except RemoteError:
            if select.select([ended], [], [], 0)[0]:
                raise AgentDiedError(self.last_words()) from None
            return None
        try:
            found.ping()
        except RemoteError:  # of one that has died
            return None
        return found

    def last_words(self) -> str:
        """The end of what agents have said."""
        with contextlib.suppress(FileNotFoundError):
            return Path(f"{self.run_dir}/agent.log").read_text(errors="replace")[-2000:]
        return ""

    def end(self) -> dict[str, Any]:
        """Ends the agent with -9; how it ended."""
        if self.client is not None:
            self.client.close()
            self.client = None
        return self.agents.kill()

    def lines(self) -> dict[str, dict[str, Any]]:
        """`ps -a` by id."""
        assert self.client is not None
        return {line["id"]: line for line in self.client.containers(all=True)}

    @contextlib.contextmanager
    def ledger(self) -> Iterator[sqlite3.Connection]:
        """A copy of the ledger as it was at one moment: the file itself is the agent's alone, locks and all."""
        with tempfile.TemporaryDirectory() as directory:
            for name, data in until("a ledger that is not being written", self._ledger_files).items():
                Path(directory, name).write_bytes(data)
            with contextlib.closing(sqlite3.connect(f"{directory}/ledger.db")) as db:
                yield db

    def _ledger_files(self) -> dict[str, bytes] | None:
        """None if they are not twice the same: then they are not of one moment."""
        first, second = (
            {path.name: path.read_bytes() for path in Path(self.run_dir).glob("ledger.db*") if path.suffix in (".db", ".db-wal")}
            for _ in range(2)
        )
        return first if first == second else None

    def select(self, statement: str, *values: Any) -> list[Any]:
        """Read from the ledger, whoever writes it."""
        with self.ledger() as db:
            return db.execute(statement, values).fetchall()

    def seq(self) -> int:
        """The number of the last event."""
        return int(self.select("SELECT coalesce(max(seq + count - 1), 0) FROM events")[0][0])

    def dump(self, since: int) -> dict[str, set[str]]:
        """The ledger, all of it but the events up to `since`."""
        with self.ledger() as db:
            found = {table: set(map(repr, db.execute(f"SELECT * FROM {table}"))) for table in TABLES}
            return found | {"events": set(map(repr, db.execute("SELECT * FROM events WHERE seq > ?", (since,))))}

    def inventory(self) -> dict[str, str]:
        """id → phase, as the launcher says. Only while there is no agent: whoever asks takes its place."""
        connection = to_launcher(self.run_dir)
        if connection is None:
            return {}
        found, kind, buffer = {}, "more", bytearray(MAX_MESSAGE * 4)
        with connection:
            connection.settimeout(PATIENCE)
            send(connection, msgpack.packb([1, "inventory", {}]))
            while kind == "more":
                data, fds, _ = receive(connection, buffer)
                for fd in fds:
                    os.close(fd)
                number, kind, body = msgpack.unpackb(data)
                if number == 0:
                    kind = "more"
                    continue
                found.update({line["id"]: line["phase"] for line in body["lines"]})
        return found

    def launcher(self) -> list[int]:
        """Its pid, if there is one."""
        connection = to_launcher(self.run_dir)
        if connection is None:
            return []
        with connection:
            return [int.from_bytes(connection.getsockopt(1, 17, 12)[:4], sys.byteorder)]  # SOL_SOCKET, SO_PEERCRED

    def gone(self) -> None:
        """Once neither the launchers nor their keepers are there."""
        # Not by connecting: a launcher that is connected to stays.
        until("the launcher's end", lambda: all(self._has_ended(found) for found in self.keepers.values()))
        for found in self.keepers.values():
            os.close(found)
        self.keepers.clear()

    def _has_ended(self, pidfd: int) -> bool:
        return bool(select.select([pidfd], [], [], 0)[0])

    def census(self) -> Census:
        """Of everything but the agent and what only it holds."""
        keys = "APART" not in os.environ
        agent = [self.agents.pid]
        roots = [f"{self.run_dir}/containers"]
        return census(pids=self.launcher(), roots=roots, ignore=agent, run_id=run_id(self.run_dir), keys=keys)

    def left(self, before: Census) -> list[str]:
        """What is not as it was."""
        return left_over(dataclasses.replace(before, ignore=frozenset([self.agents.pid])), seconds=PATIENCE / 2)

    def events(self, since: int) -> list[tuple[int, int, str, str, dict[str, Any]]]:
        """(number, count, id, type, body) of the rows above `since`."""
        rows = self.select("SELECT seq, count, id, type, body FROM events WHERE seq > ? ORDER BY seq", since)
        return [(seq, count, about, kind, (codec.unpack(body)[1] or {}) if body else {}) for seq, count, about, kind, body in rows]

    def path(self, container_id: str, name: str = "stdout") -> str:
        """Where what it prints is."""
        return f"{self.run_dir}/containers/{container_id}/{name}"

    def mark(self, name: str) -> str:
        """What a program leaves."""
        return os.path.join(self.marks, name)


class AgentDiedError(Exception):
    """It died before it served: its turn had come."""


def misnumbered(events: list[Any], since: int) -> Iterator[str]:
    """Numbers without gaps or repeats."""
    expected = since + 1
    for seq, count, about, kind, _ in events:
        if seq != expected:
            yield f"event {kind} of {about} has number {seq}, not {expected}"
        expected = seq + count


def miscounted(events: list[Any]) -> Iterator[str]:
    """Of each launch one end; of each member one exit and one death if it was committed, none if it was rolled back."""
    told = Counter((about, kind) for _, _, about, kind, _ in events)
    launches = [(about, body) for _, _, about, kind, body in events if kind == "planned"]
    for about, planned in launches:
        key = (about, planned.get("group"))
        kinds = Counter(kind for _, _, other, kind, body in events if (other, body.get("group")) == key)
        if kinds["end"] != 1 or kinds["committed"] + kinds["rolled_back"] != 1:
            yield f"{about}: {kinds['committed']} committed, {kinds['rolled_back']} rolled back, {kinds['end']} ends"
        for member in planned["containers"]:
            for kind in ("exited", "dead"):
                if told[member, kind] != kinds["committed"]:
                    yield f"{member}: {told[member, kind]} {kind}, committed {kinds['committed']}"
