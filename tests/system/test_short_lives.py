"""Programs that print something and end at once, by the thousand: no exit, no byte and no event is lost, and nothing piles up."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

LEDGER_BYTES = 16 * 1024 * 1024  # 25,000 lines of events, and the plans that they refer to


def live(world: Any, **wanted: Any) -> dict[str, Any]:
    """Lets lives.py launch, wait, read and remove, and see whether all is as it should be."""
    seen: dict[str, Any] = world.script("lives.py", json.dumps(wanted), timeout=60 + wanted["lives"])
    return seen


def anonymous_kib(pid: int) -> int:
    """The memory of a process that is its own."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))


@pytest.mark.parametrize(("size", "connections"), [(1, 1), (1, 16), (10, 1), (10, 8)])
def test_no_exit_no_byte_and_no_event_of_a_short_life_is_lost(
    canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int], size: int, connections: int
) -> None:
    before = canary.census()

    with pulse() as seen:
        told = live(canary.world, lives=rounds(100, 10_000), size=size, connections=connections)

    assert told.pop("findings") == []
    assert left_over(before) == []
    canary.assert_untouched()
    figure(size=size, connections=connections, **told, **vars(seen))


def test_who_follows_the_output_of_a_short_life_from_before_its_end_gets_all_of_it(
    canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int]
) -> None:
    world = canary.world
    gates = Path(world.directory) / "gates"
    gates.mkdir()
    os.chown(gates, world.uid, world.gid)
    gates.chmod(0o755)
    before = canary.census()

    with pulse() as seen:
        told = live(world, lives=rounds(100, 2_000), size=10, connections=6, gates=str(gates))

    assert told.pop("findings") == []
    assert list(gates.iterdir()) == []
    assert left_over(before) == []
    canary.assert_untouched()
    figure(followed=True, **told, **vars(seen))


def test_the_check_of_short_lives_finds_what_is_not_so(canary: Any) -> None:
    """The positive control: all is expected to be one more, or one byte less, than it is."""
    findings = live(canary.world, lives=10, size=10, connections=1, lie=True)["findings"]

    for number in range(10):
        for about in ("the end", "stdout", "stderr", "the ends"):
            assert [line for line in findings if line.startswith(f"{about} of life0.m{number}")], (about, number)


def test_nothing_piles_up_however_many_have_lived(canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int]) -> None:
    """Memory and descriptors of agent and launcher, directories and the ledger are the same after more of the same."""
    world = canary.world
    agent, launcher = world.agent_pid(), world.launcher_pid()
    warm = rounds(300, 15_000)  # until all that is bounded has been filled
    assert live(world, lives=warm, size=1, connections=8)["findings"] == []
    before, kib = canary.census(), [anonymous_kib(agent), anonymous_kib(launcher)]
    kept = sorted(path for path in Path(world.directory).rglob("*") if "ledger.db" not in path.name)

    with pulse() as seen:
        told = live(world, lives=rounds(200, 10_000), size=1, connections=8, first=warm)

    assert told.pop("findings") == []
    after = [anonymous_kib(agent), anonymous_kib(launcher)]
    # A few lives show only a coarse leak, since Python's memory takes thousands of them to find its level.
    assert after[0] - kib[0] < rounds(16, 4) * 1024
    assert after[1] - kib[1] < 1024
    assert left_over(before) == []
    assert sorted(path for path in Path(world.directory).rglob("*") if "ledger.db" not in path.name) == kept
    assert rows(world) == {"groups": 1, "containers": 2, "entries": 3}  # the canary's, and what all share
    ledger = sum(path.stat().st_size for path in world.run_dir.glob("ledger.db*"))
    assert ledger < LEDGER_BYTES
    canary.assert_untouched()
    figure(**told, agent_kib=[kib[0], after[0]], launcher_kib=[kib[1], after[1]], ledger=ledger, **vars(seen))


def rows(world: Any) -> dict[str, int]:
    """How many rows the ledger has, once what is written lazily has been: in a copy, since the original is the agent's."""
    copy = Path(world.directory) / "copy.db"
    deadline = time.monotonic() + 10
    while True:
        for suffix in ("", "-wal"):
            shutil.copy(f"{world.run_dir}/ledger.db{suffix}", f"{copy}{suffix}")
        db = sqlite3.connect(copy)
        try:
            found = {
                table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("groups", "containers", "entries")
            }
        finally:
            db.close()
            for path in copy.parent.glob("copy.db*"):
                path.unlink()
        if found["containers"] == 2 or time.monotonic() > deadline:
            return found
        time.sleep(0.05)
