"""contrib/examples/postgres-dump: a transient task takes a backup of a database that is written to all the while.

What a backup must be: one moment of the bank, no matter which. What it must not do: be noticed by the bank.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

EXAMPLE = Path(__file__).resolve().parents[2] / "contrib" / "examples" / "postgres-dump"
PATIENCE = 300.0  # for what takes seconds; a guest on a busy machine is slow
CLIENT = ["--user", "postgres", "-v", "shared:socket:/var/run/postgresql", "-v", "shared:dump:/dump"]


class Bank:
    """The example's pod, running."""

    def __init__(self, world: Any) -> None:
        self.world = world
        answer = world.meso("run", "--json", "-d", str(EXAMPLE / "pod.toml"))
        assert answer.code == 0, (answer.out, answer.err)
        self.wait_for_more(than=0)

    def pids(self) -> dict[str, int]:
        """Who runs in it."""
        running = {name: line for name, line in self.world.ps().items() if line["state"] == "RUNNING"}
        return {name: line["pid"] for name, line in running.items() if name.partition(".")[0] == "bank"}

    def acknowledged(self) -> list[int]:
        """The numbers of the transfers that the writer has been told are in the database, in its order."""
        log = (self.world.run_dir / "containers/bank.writer/stdout").read_text()
        return [int(line) for line in log[: log.rfind("\n") + 1].split()]

    def wait_for_more(self, than: int | None = None) -> None:
        """Until a transfer is acknowledged that has been made after now: what is printed lags behind what is there."""
        seen = int(self.ask("select max(n) from transfer")) if than is None else than
        deadline = time.monotonic() + PATIENCE
        while max(self.acknowledged(), default=0) <= seen:
            assert time.monotonic() < deadline, self.world.meso("logs", "bank").err[-2000:]
            assert self.pids().keys() >= {"bank.server", "bank.writer"}, self.world.meso("logs", "bank").err[-2000:]
            time.sleep(0.05)

    def run(self, name: str, *command: str) -> Any:
        """A transient task of the bank, to its end."""
        return self.world.meso("run", "--in", "bank", "--name", name, *CLIENT, "--", *command, timeout=PATIENCE)

    def run_file(self, name: str) -> Any:
        """One of the example's."""
        return self.world.meso("run", "--in", "bank", str(EXAMPLE / name), timeout=PATIENCE)

    def ask(self, query: str, database: str = "bank") -> str:
        """What the database answers."""
        answer = self.run("ask", "psql", "-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", query, database)
        assert answer.code == 0, answer.err
        out: str = answer.out
        return out.strip()


@pytest.fixture(scope="module")
def bank(canary: Any) -> Iterator[Bank]:
    """One for all tests of a world; its end leaves nothing, and nobody else notices."""
    if not list(Path("/usr/lib/postgresql").glob("*/bin/postgres")) or shutil.which("pg_dump") is None:
        pytest.skip("PostgreSQL is missing: apt-get install postgresql")
    before = canary.census()
    opened = Bank(canary.world)
    yield opened
    world = canary.world
    world.meso("kill", "bank")
    ended = world.meso("wait", "bank", timeout=PATIENCE)
    assert ended.code == 0, ended
    assert "database system is shut down" in world.meso("logs", "bank").err
    assert world.meso("rm", "bank").code == 0
    # What was about to be closed when the census was taken ("-") is none of the bank's.
    assert [line for line in left_over(before) if not line.startswith("-")] == []
    canary.assert_untouched()


MISBOOKED = (
    "select count(*) from account where balance <> 1000"
    " - (select coalesce(sum(amount), 0) from transfer where source = id)"
    " + (select coalesce(sum(amount), 0) from transfer where target = id)"
)
FIRST = "select md5(string_agg(transfer::text, ' ' order by n)) from transfer where n <= {}"


def test_a_backup_is_one_moment_of_a_database_that_is_written_to(bank: Bank, figure: Callable[..., None]) -> None:
    began = bank.acknowledged()[-1]
    started = time.monotonic()

    dumped = bank.run_file("dump.toml")

    took = time.monotonic() - started
    ended = len(bank.acknowledged())
    assert dumped.code == 0, dumped.err
    assert bank.run("make", "createdb", "again").code == 0
    assert bank.run("fill", "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "/dump/bank.sql", "again").code == 0
    count, last, total = bank.ask("select count(*), max(n), (select sum(balance) from account) from transfer", "again").split("|")
    assert began <= int(last) == int(count)
    assert int(total) == 10_000
    assert bank.ask(MISBOOKED, "again") == "0"
    assert bank.ask(FIRST.format(count), "again") == bank.ask(FIRST.format(count))
    bank.wait_for_more()
    assert int(bank.ask("select max(n) from transfer")) > int(last)
    figure(seconds=round(took, 3), in_the_backup=int(count), written_meanwhile=ended - began)


def test_tables_that_are_copied_one_after_the_other_are_no_moment_at_all(bank: Bank) -> None:
    """The positive control of the test above: the same comparison tells when a copy is no snapshot."""
    prepared = bank.run("make", "sh", "-c", "createdb torn && pg_dump --schema-only bank | psql -X -q -v ON_ERROR_STOP=1 torn")
    assert prepared.code == 0, prepared.err
    for table in ("account", "transfer"):
        copy = f"psql -X -q -c 'copy {table} to stdout' bank | psql -X -q -v ON_ERROR_STOP=1 -c 'copy {table} from stdin' torn"
        assert bank.run("copy", "sh", "-c", copy).code == 0
        bank.wait_for_more()

    assert int(bank.ask(MISBOOKED, "torn")) > 0
    assert bank.ask(MISBOOKED) == "0"


def test_the_bank_does_not_notice_that_it_is_copied(bank: Bank) -> None:
    pids, opened = bank.pids(), bank.ask("select pg_postmaster_start_time()")

    assert bank.run_file("dump.toml").code == 0

    bank.wait_for_more()
    assert bank.pids() == pids
    assert bank.ask("select pg_postmaster_start_time()") == opened
    told = bank.acknowledged()
    assert told == list(range(1, len(told) + 1))
    assert bank.ask(f"select count(*), max(n) from transfer where n <= {told[-1]}") == f"{told[-1]}|{told[-1]}"
    assert bank.world.ps()["bank.dump"]["state"] == "DEAD"


def test_the_examples_own_check_passes_and_tells_of_a_backup_that_lacks_one_line(bank: Bank) -> None:
    assert bank.run_file("dump.toml").code == 0

    good = bank.run_file("restore.toml")
    assert bank.run("spoil", "sed", "-i", "/^COPY public.transfer/,/^\\\\\\./{/^2\\t/d}", "/dump/bank.sql").code == 0
    bad = bank.run_file("restore.toml")

    assert good.code == 0, (good.out, good.err)
    assert "every balance in it is what these transfers make it" in good.out
    assert bad.code == 1
    assert "they are not the bank's first" in bad.err


def test_a_backup_that_fails_is_told_and_ends_nothing_else(bank: Bank) -> None:
    pids = bank.pids()

    answer = bank.run("dump", "pg_dump", "--file=/dump/none.sql", "no-such-bank")

    assert answer.code == 1
    assert "no-such-bank" in answer.err
    bank.wait_for_more()
    assert bank.pids() == pids


def test_the_server_is_nobody_that_the_host_has(bank: Bank) -> None:
    """It is `postgres` inside. Outside it is an id of the pod's own range, or the ordinary user who runs the bank."""
    owner = Path(f"/proc/{bank.pids()['bank.server']}").stat().st_uid
    accounts = {int(line.split(":")[2]) for line in subprocess.check_output(["getent", "passwd"], text=True).splitlines()}

    assert bank.ask("select current_user") == "postgres"
    if bank.world.uid == 0:
        assert owner not in accounts
    else:
        assert owner == bank.world.uid
