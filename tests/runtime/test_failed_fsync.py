"""An fsync that fails is a loss, and is not made good by the next one: what the history has promised is on the disk all the same.

Every sync of the history fails in turn, of the file, its log and their directory; the disk is one that forgets what it could not
write (disks.py). At each promise the power is cut, and another agent reads what is there.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import ConflictError
from mesocosm.kernel.runtime import past
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.annals import Annals
from mesocosm.kernel.testing.simulation import Simulation

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="this machine cannot be traced with these registers")


@pytest.fixture
def disks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module beside this one."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("disks")


async def promised(agent: Agent, told: Callable[[dict[str, Any]], None]) -> None:
    """Asks for the history until it answers; what it says, and how often it said that it could not."""
    assert agent.world.history is not None
    for refused in range(5):
        try:
            answer = await agent.history(limit=500)
        except ConflictError as error:
            assert "cannot be read" in str(error)  # noqa: PT017 - an error or none
            assert agent.world.history.trouble is not None
            agent.world.history._tried = float("-inf")  # that much later
            continue
        assert answer["notes"] == []
        told({"refused": refused, "lines": [line for line in answer["history"] if line["state"] == "DEAD"]})
        return
    raise AssertionError("it did not recover")


def live(directory: Path, told: Callable[[dict[str, Any]], None]) -> None:
    """Two agents, one after the other, and a promise after each pod."""

    async def main() -> None:
        simulation = Simulation(directory, history=True)
        for number in range(2):
            async with simulation.agent() as agent:
                for letter in "ab":
                    await agent.launch_group({"name": f"{letter}{number}", "tasks": [{"name": "t", "command": ["sleep", "1"]}]})
                    await agent.wait_container(f"{letter}{number}")
                    await promised(agent, told)

    begin = Annals._open_once

    def often(self: Annals) -> Any:
        db = begin(self)
        db.execute("PRAGMA wal_autocheckpoint = 20")  # pages: so that these few lines are carried over now and then
        return db

    Annals._open_once = often  # type: ignore[method-assign] # in a process of its own
    trio.run(main, clock=MockClock(autojump_threshold=0))


def after_the_cut(image: dict[str, bytes], place: Path) -> list[dict[str, Any]]:
    """What another agent makes of the files that are on the disk."""
    place.mkdir()
    for name, data in image.items():
        if name.startswith("history.db"):
            (place / name).write_bytes(data)
    with closing(Annals(str(place / "history.db"))) as found:
        assert found.set_aside == []
        lines: list[dict[str, Any]] = past.page(found, None, limit=500)["history"]
    return lines


def one_life(disks: Any, place: Path, at: int, *, lies: bool = False) -> tuple[Any, list[dict[str, Any]], int]:
    """With the `at`-th sync failing: the disk, what was promised and is lost, how often the history said that it failed."""
    (place / "host").mkdir(parents=True)
    disk, lost, refused = disks.Disk(place / "host", at, lies=lies), [], 0

    def child(say: int) -> None:
        live(place / "host", lambda words: os.write(say, json.dumps(words).encode()) and None)

    for number, (words, image) in enumerate(disks.trace(disk, child)):
        promise = json.loads(words)
        refused += promise["refused"]
        kept = after_the_cut(image, place / f"cut{number}")
        lost += [line for line in promise["lines"] if line not in kept]
    return disk, lost, refused


def test_whichever_sync_fails_what_was_promised_is_on_the_disk(
    disks: Any, tmp_path: Path, figure: Callable[..., None], rounds: Callable[[int, int], int]
) -> None:
    at, count, told, files = 0, 0, 0, set()
    while True:
        at += 1 if at < 2 else rounds(2, 1)
        disk, lost, refused = one_life(disks, tmp_path / str(at), at)
        assert lost == [], f"sync {at}, of {disk.failed}"
        if not disk.failed:
            break
        count += 1
        files.add(Path(disk.failed).name)
        told += refused > 0
    figure(syncs=count, told=told, lost=0)
    assert {"history.db", "history.db-wal", "host"} <= files
    assert told > count / 4, "who asks is told"


def test_a_disk_that_lies_loses_what_was_promised_and_that_is_noticed(disks: Any, tmp_path: Path) -> None:
    """The control."""
    _, lost, _ = one_life(disks, tmp_path, 0, lies=True)

    assert lost != []
