"""The ledger's files, damaged in every way there is: the next agent starts, who runs goes on, and nothing false is obeyed.

What runs is made once; then the files are damaged, an agent comes and goes, and the files are put back, thousands of times.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import LaunchError, MesoError
from mesocosm.kernel.runtime import codec, schema
from mesocosm.kernel.runtime import salvage as salvaging
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.runtime.seal import unseal, unsealed_line
from mesocosm.kernel.testing.simulation import Simulation

POD = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "200000"]}, {"name": "b", "command": ["sleep", "100000"]}]}
SOLO = {"container_id": "solo", "command": ["sleep", "100000"]}
Files = dict[str, bytes]


class Running:
    """A pod, a container of its own and one that is over; `files` and `log`: the ledger, and the ledger before its log was
    written into it."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.directory = Path(simulation.ledger).parent
        self.files: Files = {}
        self.log: Files = {}
        self.true: dict[str, tuple[Any, ...]] = {}
        self.things: dict[str, str] = {}
        self.asides = 0  # rounds in which something was set aside

    async def prepare(self) -> None:
        """Launches all of it."""
        async with self.simulation.agent() as agent:
            await agent.launch_group(POD)
            await agent.launch_container(SOLO)
            await agent.launch_container({"container_id": "over", "command": ["exit", "3"]})
            await agent.wait_container("over")
            await trio.sleep(2)
            agent.world.ledger.flush()
            self.log = self.read()
            self.true = {found: self.of(agent, found) for found in agent.world.cells if found != "over"}
        self.files = self.read()
        self.things = dict(self.simulation.machine.things)

    def read(self) -> Files:
        """What there is now."""
        return {path.name: path.read_bytes() for path in self.directory.iterdir() if path.is_file()}

    def write(self, files: Files) -> None:
        """Nothing but these."""
        for path in self.directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        for name, data in files.items():
            (self.directory / name).write_bytes(data)
            (self.directory / name).chmod(0o600)

    def of(self, agent: Agent, container_id: str) -> tuple[Any, ...]:
        """What an agent knows of a container that it would act upon."""
        cell = agent.world.cells[container_id]
        return cell.spec, cell.base, cell.entries, cell.grants, agent.world.tree.state(container_id), cell.pid

    @contextlib.asynccontextmanager
    async def after(self, files: Files | None = None) -> AsyncIterator[Agent]:
        """The next agent, with these files in place of what is there; then the machine is as it was."""
        if files is not None:
            self.write(files)
        try:
            async with self.simulation.agent() as agent:
                yield agent
        finally:
            self.simulation.machine.things = dict(self.things)

    async def goes_on(self, files: Files | None = None) -> list[str]:
        """All that runs does so after an agent has found `files`, and is known for what it is; what was set aside."""
        living = list(self.simulation.launcher.living)
        async with self.after(files) as agent:
            known = {found: self.of(agent, found)[:5] for found in agent.world.cells if found != "over"}
            whole = all(cell.plan.effects for cell in agent.world.cells.values() if cell.id != "over")
            aside = list(agent.world.ledger.set_aside)
            assert known == {found: true[:5] for found, true in self.true.items()}
            assert {(true[1] - 0x70000000) >> 16 for true in self.true.values() if true[1] is not None} <= agent.world.ids._used
            assert "over" not in agent.world.cells or agent.world.cells["over"].gone.is_set()
            assert self.simulation.launcher.living == living
            gone = [path for path in self.things if path not in self.simulation.machine.things and "over" not in path]
            assert gone == []
            assert whole or aside, "a plan is missing, and nobody says so"
        self.asides += bool(aside)
        return aside


@pytest.fixture
def running(simulation: Simulation) -> Running:
    """Not prepared yet: that needs a loop."""
    return Running(simulation)


def spread(items: Any, count: int) -> Iterator[Any]:
    """So many of them, the first and the last among them."""
    step = max(1, len(items) // count)
    yield from items[::step]
    yield items[-1]


def bits_that_count(data: bytes) -> list[int]:
    """Every bit of the bytes that are not empty, and one of each sixteenth byte that is."""
    return [8 * at + bit for at, byte in enumerate(data) for bit in range(8) if byte or (not at % 16 and bit == at // 16 % 8)]


@pytest.mark.parametrize("which", ["files", "log"])
async def test_whatever_bit_falls_over_who_runs_goes_on_and_nothing_false_is_obeyed(
    running: Running, autojump_clock: MockClock, rounds: Callable[[int, int], int], figure: Callable[..., None], which: str
) -> None:
    await running.prepare()
    whole: Files = getattr(running, which)
    count = 0
    for name, data in whole.items():
        for bit in spread(bits_that_count(data), rounds(300, 100_000) // len(whole)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            await running.goes_on({**whole, name: bytes(damaged)})
            count += 1
    assert running.asides > count // 4, "most bits hold something"
    figure(bits=count, noticed=running.asides, containers_lost=0)


@pytest.mark.parametrize("which", ["files", "log"])
async def test_wherever_the_files_end_who_runs_goes_on(
    running: Running, autojump_clock: MockClock, rounds: Callable[[int, int], int], figure: Callable[..., None], which: str
) -> None:
    await running.prepare()
    whole: Files = getattr(running, which)
    count = 0
    for name, data in whole.items():
        edges = [at + off for at in range(0, len(data), 4096) for off in (-1, 0, 1) if 0 <= at + off < len(data)]
        for end in sorted({*spread(edges, 60), *spread(range(len(data)), rounds(60, 20_000))}):
            await running.goes_on({**whole, name: data[:end]})
            count += 1
    figure(ends=count, noticed=running.asides, containers_lost=0)


@pytest.mark.parametrize("fill", [b"\0", b"\xff"], ids=["zeros", "ones"])
@pytest.mark.parametrize("which", ["files", "log"])
async def test_whichever_page_is_overwritten_who_runs_goes_on(
    running: Running, autojump_clock: MockClock, figure: Callable[..., None], which: str, fill: bytes
) -> None:
    await running.prepare()
    whole: Files = getattr(running, which)
    count = 0
    for name, data in whole.items():
        first, step = (32, 4096 + 24) if name.endswith("-wal") else (0, 4096)
        for at in range(first, len(data), step):
            await running.goes_on({**whole, name: data[:at] + fill * step + data[at + step :]})
            count += 1
    # Of a log nobody misses the end, which may never have been written; nor the first page of the file, which it has as well.
    assert running.asides >= count - 2 * (which == "log")
    figure(pages=count, noticed=running.asides, containers_lost=0)


async def test_a_log_that_is_gone_takes_nobody_with_it(running: Running, autojump_clock: MockClock) -> None:
    await running.prepare()

    await running.goes_on({"ledger.db": running.log["ledger.db"]})
    await running.goes_on({"ledger.db-wal": running.log["ledger.db-wal"]})
    await running.goes_on({})


async def test_a_ledger_older_than_what_runs_ends_nobody(running: Running, autojump_clock: MockClock) -> None:
    """As it is after a damaged log: every transaction's file, found by an agent that comes after all of them."""
    old: list[Files] = []
    async with running.simulation.agent() as agent:
        commit = agent.world.ledger.on_commit
        agent.world.ledger.on_commit = lambda: (old.append(running.read()), commit())[1]
        await agent.launch_container({"container_id": "web", "command": ["exit", "1"]})  # the same name, an earlier life
        await agent.wait_container("web")
        await agent.remove_container("web")
    await running.prepare()
    async with running.simulation.agent() as agent:
        commit = agent.world.ledger.on_commit
        agent.world.ledger.on_commit = lambda: (old.append(running.read()), commit())[1]
        await agent.launch_nested_group("web.a", [{"name": "x", "command": ["sleep", "100000"]}])
        await trio.sleep(2)
        running.true["web.a.x"] = running.of(agent, "web.a.x")
    running.things = dict(running.simulation.machine.things)

    assert len(old) >= 6
    for files in old:
        await running.goes_on(files)


def as_version_2(files: Path, old: Path) -> None:
    """What an earlier build would have written: no checksums, no table of what has been set aside."""
    tables = {
        "meta": "key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "groups": "id TEXT PRIMARY KEY, barrier TEXT NOT NULL, executor TEXT NOT NULL, state TEXT NOT NULL,"
        " blame TEXT, error BLOB) WITHOUT ROWID",
        "containers": "id TEXT PRIMARY KEY, grp TEXT NOT NULL, state TEXT NOT NULL, plan INTEGER NOT NULL, spec BLOB NOT NULL,"
        " base INTEGER, pid INTEGER, started REAL, ended REAL, wait BLOB, error BLOB, reason TEXT)",
        "plans": "key INTEGER PRIMARY KEY, body BLOB NOT NULL)",
        "entries": "container TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
        "parked": "seq INTEGER PRIMARY KEY, container TEXT NOT NULL, entry BLOB NOT NULL, note TEXT NOT NULL)",
        "events": "seq INTEGER PRIMARY KEY, count INTEGER NOT NULL, time REAL NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL,"
        " plan INTEGER, body BLOB)",
    }
    with contextlib.closing(sqlite3.connect(files)) as new, contextlib.closing(sqlite3.connect(old)) as db:
        new.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode = WAL")
        for table, columns in tables.items():
            db.execute(f"CREATE TABLE {table} ({columns}")
            names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            for row in new.execute(f"SELECT {', '.join(names)} FROM {table}"):
                values = dict(row)
                match table:
                    case "meta":
                        values["value"] = unsealed_line(row["value"], row["key"])
                    case "containers":
                        values["spec"] = unseal(row["spec"], row["id"], row["grp"], row["plan"], row["base"])
                        values["wait"] = row["wait"] and unseal(row["wait"], row["id"])
                    case "plans":
                        values["body"] = unseal(row["body"], row["key"])
                    case "entries":
                        values["body"] = unseal(row["body"], row["container"])
                db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})", tuple(values.values()))
        db.execute("PRAGMA user_version = 2")
        db.commit()


async def test_a_ledger_of_the_version_before_is_taken_over_whole(
    running: Running, autojump_clock: MockClock, tmp_path_factory: pytest.TempPathFactory
) -> None:
    await running.prepare()
    old = tmp_path_factory.mktemp("old") / "ledger.db"
    as_version_2(Path(running.simulation.ledger), old)
    for process in running.simulation.launcher._processes.values():  # an earlier build leaves no notes
        process.request = msgspec.structs.replace(process.request, note=b"")

    assert await running.goes_on({"ledger.db": old.read_bytes()}) == []
    async with running.after() as agent:
        assert agent.world.ledger._rows("PRAGMA user_version") == [(schema.VERSION,)]
        assert (await agent.wait_container("over"))["exit"] == 3
        assert {cell.plan.id for cell in agent.world.cells.values() if cell.plan.effects} == {*running.true, "over"}


async def test_a_migration_that_is_interrupted_has_not_happened(
    running: Running, autojump_clock: MockClock, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.prepare()
    old = tmp_path_factory.mktemp("old") / "ledger.db"
    as_version_2(Path(running.simulation.ledger), old)
    running.write({"ledger.db": old.read_bytes()})
    with monkeypatch.context() as patched:
        patched.setattr(schema, "_seal_all", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            Ledger(running.simulation.ledger)
    with contextlib.closing(sqlite3.connect(running.simulation.ledger)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 2
        assert "aside" not in schema.columns(db)

    assert await running.goes_on() == []


def _interrupted(db: sqlite3.Connection) -> None:
    raise KeyboardInterrupt


async def test_a_newer_ledger_is_kept_as_it_is_and_what_is_known_of_it_is_taken(
    running: Running, autojump_clock: MockClock
) -> None:
    await running.prepare()
    with contextlib.closing(sqlite3.connect(running.simulation.ledger)) as db:
        db.execute("ALTER TABLE containers ADD COLUMN later TEXT")
        db.execute("CREATE TABLE later (key TEXT)")
        db.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
        db.commit()
    newer = Path(running.simulation.ledger).read_bytes()

    aside = await running.goes_on()

    assert f"schema version {schema.VERSION + 1}" in aside[0]
    assert [path.read_bytes() for path in running.directory.glob("*.set-aside-*")] == [newer]
    async with running.after() as agent:
        assert (await agent.wait_container("over"))["exit"] == 3
        assert agent.world.ledger.seq > 0


async def test_rows_that_are_there_twice_are_there_once(running: Running, autojump_clock: MockClock) -> None:
    await running.prepare()
    with contextlib.closing(sqlite3.connect(running.simulation.ledger)) as db:
        for table in ("containers", "groups", "entries"):
            db.execute(f"CREATE TABLE twice AS SELECT * FROM {table} UNION ALL SELECT * FROM {table}")
            db.execute(f"DROP TABLE {table}")
            db.execute(f"ALTER TABLE twice RENAME TO {table}")
        db.commit()

    assert "did not fit" in (await running.goes_on())[0]


async def test_somebody_elses_database_is_set_aside_unharmed(running: Running, autojump_clock: MockClock) -> None:
    await running.prepare()
    running.write({})
    with contextlib.closing(sqlite3.connect(running.simulation.ledger)) as db:
        db.execute("CREATE TABLE containers (id TEXT, name TEXT)")
        db.execute("INSERT INTO containers VALUES ('solo', 'a ship')")
        db.commit()
    theirs = Path(running.simulation.ledger).read_bytes()

    assert await running.goes_on() != []
    assert [path.read_bytes() for path in running.directory.glob("*.set-aside-*")] == [theirs]


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def _device(path: str) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this machine cannot make devices as this user")


THINGS: dict[str, Callable[[str], object]] = {
    "directory": os.mkdir,
    "symlink": lambda path: os.symlink(f"{path}.target", path),
    "pipe": os.mkfifo,
    "socket": _socket,
    "device": _device,
}


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("thing", THINGS)
async def test_what_is_no_file_goes_out_of_the_way_and_is_kept(
    running: Running, autojump_clock: MockClock, thing: str, suffix: str
) -> None:
    await running.prepare()
    running.write({name: data for name, data in running.log.items() if name != f"ledger.db{suffix}"})
    THINGS[thing](running.simulation.ledger + suffix)
    kind = os.lstat(running.simulation.ledger + suffix).st_mode

    aside = await running.goes_on()

    assert "no file" in aside[0]
    assert kind in [os.lstat(path).st_mode for path in running.directory.glob(f"ledger.db{suffix}.set-aside-*")]
    assert not os.path.lexists(f"{running.simulation.ledger}{suffix}.target"), "nothing was written through a link"


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_what_others_could_have_written_is_not_obeyed(running: Running, autojump_clock: MockClock, suffix: str) -> None:
    await running.prepare()
    running.write(running.log)
    os.chmod(running.simulation.ledger + suffix, 0o602)

    assert "others could write it" in (await running.goes_on())[0]

    if os.geteuid() == 0:
        running.write(running.log)
        os.chown(running.simulation.ledger + suffix, 1234, -1)
        assert "belongs to uid 1234" in (await running.goes_on())[0]


async def test_a_mode_that_forbids_us_what_is_ours_is_put_right(running: Running, autojump_clock: MockClock) -> None:
    await running.prepare()
    os.chmod(running.simulation.ledger, 0)

    assert await running.goes_on() == []
    assert os.stat(running.simulation.ledger).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["removed", "log removed", "replaced", "cut", "overwritten", "directory"])
async def test_damage_while_the_agent_runs_stops_no_agent_and_the_next_one_knows_all(
    running: Running, autojump_clock: MockClock, how: str
) -> None:
    await running.prepare()
    path = Path(running.simulation.ledger)
    async with running.simulation.agent() as agent:
        await agent.launch_container({"container_id": "before", "command": ["sleep", "100000"]})
        match how:
            case "removed":
                path.unlink()
            case "log removed":
                Path(f"{path}-wal").unlink()
            case "replaced":
                path.unlink()
                path.write_bytes(b"something else" * 1000)
            case "cut":
                os.truncate(path, 5000)
            case "overwritten":
                with open(path, "r+b") as file:
                    file.write(b"\xff" * 30_000)
            case _:
                path.unlink()
                path.mkdir()
        await agent.kill_container("solo")
        await agent.wait_container("solo")
        with contextlib.suppress(MesoError):  # one may be refused: it is what finds the damage
            await agent.launch_container({"container_id": "first", "command": ["exit", "0"]})
            await agent.wait_container("first")
        await agent.launch_container({"container_id": "after", "command": ["sleep", "100000"]})
        assert agent.world.ledger.trouble is None
        known = {found: running.of(agent, found)[:5] for found in ("web", "web.a", "web.b", "before", "after")}
    async with running.simulation.agent() as agent:
        assert {found: running.of(agent, found)[:5] for found in known} == known
        assert agent.get_containers() != []
        assert {line["id"]: line["state"] for line in agent.get_containers()} == dict.fromkeys(known, "RUNNING")


async def test_what_was_set_aside_is_told_until_it_has_been_seen(running: Running, autojump_clock: MockClock) -> None:
    await running.prepare()
    with contextlib.closing(sqlite3.connect(running.simulation.ledger)) as db:
        db.execute("UPDATE containers SET spec = x'c1' WHERE id = 'solo'")
        db.commit()
    async with running.after() as agent:
        await trio.sleep(1)
    async with running.after() as agent:  # and this one has found everything in order
        told = agent.set_aside(forget=False)
        assert ["solo" in line["said"] for line in told["set_aside"]] == [True, True]
        assert told["trouble"] is None
        rows = agent.world.ledger._rows("SELECT body FROM aside WHERE body IS NOT NULL")
        assert [b"'solo'" in body for (body,) in rows] == [True], "the row itself is kept"
        assert agent.set_aside(forget=True)["set_aside"] == told["set_aside"]
        assert agent.set_aside(forget=False)["set_aside"] == []
    async with running.after() as agent:
        assert agent.set_aside(forget=False)["set_aside"] == []


@pytest.mark.parametrize("moment", ["before", "between"])
async def test_a_replacement_that_is_interrupted_is_finished_by_the_next_agent(
    running: Running, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    await running.prepare()
    whole = running.files["ledger.db"]
    running.write({"ledger.db": whole[:4096] + b"\xff" * 4096 + whole[8192:], "ledger.db-wal": b"no log"})
    rename, calls = os.rename, []

    def dying(old: str, new: str) -> None:
        calls.append(old)
        if len(calls) == (1 if moment == "before" else 2):  # the file has gone out of the way, its log has not
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            Ledger(running.simulation.ledger)

    await running.goes_on()
    assert not list(running.directory.glob("*.new*"))


def test_a_file_that_may_not_be_written_is_refused_by_its_name_and_with_the_way_out(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "ledger.db"
    Ledger(str(path)).close()
    get, put, immutable = 0x80086601, 0x40086602, 0x10  # linux/fs.h: FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IMMUTABLE_FL
    with open(path, "rb") as file:
        try:
            flags = int.from_bytes(fcntl.ioctl(file, get, bytes(8)), "little")
            fcntl.ioctl(file, put, (flags | immutable).to_bytes(8, "little"))
        except OSError as error:
            pytest.skip(f"this machine cannot make files immutable here: {error.strerror}")
        try:
            with pytest.raises(LaunchError) as refused:
                Ledger(str(path))
            assert refused.value.fields["target"] == str(path)
            assert "chattr -i" in refused.value.fields["hint"]
        finally:
            fcntl.ioctl(file, put, flags.to_bytes(8, "little"))
    Ledger(str(path)).close()


def test_an_entry_is_worth_nothing_for_another_container(tmp_path: Path) -> None:
    with contextlib.closing(Ledger(str(tmp_path / "ledger.db"))) as book:
        with book:
            entries = [("x", codec.pack_entries([])), ("y", codec.pack_entries([]))]
            book.intend(("x", "b", "e"), [], [], entries)
            book.write("UPDATE entries SET body = (SELECT body FROM entries WHERE container = 'x') WHERE container = 'y'")
        assert list(book.entries()) == ["x"]
        assert "entries of y" in book.set_aside[0]


def test_a_frame_that_tells_of_more_pages_than_there_are_asks_for_no_memory(tmp_path: Path) -> None:
    path, log = tmp_path / "ledger.db", tmp_path / "ledger.db-wal"
    with contextlib.closing(Ledger(str(path))) as book:
        book.write_many("INSERT INTO plans VALUES (?, ?)", [(key, bytes(900)) for key in range(100)])
        book.set_meta("boot_id", "this one")
        files = path.read_bytes(), log.read_bytes()
    for bit in range(32):  # of the number of pages after the last transaction, in the head of its last frame
        path.write_bytes(files[0])
        damaged = bytearray(files[1])
        damaged[len(damaged) - 4096 - 24 + 7 - bit // 8] ^= 1 << bit % 8
        log.write_bytes(damaged)
        page_size, image = salvaging._image(str(path))
        assert len(image) <= len(files[0]) + len(files[1]) <= 1 << 20
        found = salvaging.salvage(str(path))
        assert page_size == 4096
        assert len(found.rows["plans"]) == 100
