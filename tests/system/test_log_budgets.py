"""Floods of output: the budget holds, offsets stay true, readers are told what they missed, and others do not notice."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.client import connect
from mesocosm.kernel.linux import holes

pytestmark = pytest.mark.system

MIB = 2**20
BUDGET = 4 * MIB
PERIOD = 251  # the byte at an offset is offset % PERIOD: NULs and line ends among them, and never a whole line
BLOCK = bytes(range(PERIOD)) * 4096
WRITER = f"""
import os, sys, threading
block, count = bytes(range({PERIOD})) * 4096, int(sys.argv[1])
def write(fd):
    for _ in range(count):
        left = memoryview(block)
        while left:
            left = left[os.write(fd, left):]
for fd in (1, 2):
    threading.Thread(target=write, args=(fd,)).start()
"""
PYTHON = "/usr/bin/python3"


@pytest.fixture(autouse=True)
def _can_flood(world: Any) -> None:
    if not os.path.exists(PYTHON):
        pytest.skip(f"this machine cannot run the flood: no {PYTHON}")
    world.meso("ps")
    if not holes.can_punch(str(world.run_dir)):
        pytest.skip("this machine cannot punch holes where tests have their run directories")


def flood(world: Any, name: str, blocks: int, log: str = "4MiB") -> None:
    """Starts a container that writes so many blocks to both of its streams, as fast as it can."""
    pod = {"name": name, "tasks": [{"name": "t", "command": [PYTHON, "-c", WRITER, str(blocks)], "log": log}]}
    answer = world.run(pod, "-d")
    assert answer.code == 0, answer.err


@contextmanager
def measured(*logs: Path) -> Iterator[dict[str, int]]:
    """The most that files took together while the block lasted: ``{"peak"}``, bytes."""
    seen = {"peak": 0}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            seen["peak"] = max(seen["peak"], sum(kept(log) for log in logs))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def kept(log: Path) -> int:
    try:
        return log.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


class Reader:
    """Reads a log through the socket and checks every byte of it against its offset."""

    def __init__(self, world: Any, container_id: str, stream: str) -> None:
        self.read = self.dropped = self.notes = 0
        self._world, self._id, self._stream = world, container_id, stream

    def follow(self, pause: float = 0.0) -> Reader:
        """To the end, resting after each piece."""
        with connect(self._world.run_dir / "agent.sock", timeout=120) as client:
            for item in client.stream("READ_LOGS", container_id=self._id, stream=self._stream, follow=True):
                assert item["offset"] == self.read + self.dropped
                if item.get("dropped"):
                    assert item["data"] == b""
                    self.notes += 1
                    self.dropped += item["dropped"]
                else:
                    start = item["offset"] % PERIOD
                    assert item["data"] == BLOCK[start : start + len(item["data"])]
                    self.read += len(item["data"])
                time.sleep(pause)
        return self


@pytest.mark.one_world
def test_a_flood_on_both_streams_stays_within_its_budget_and_nobody_else_notices(
    canary: Any, pulse: Any, figure: Callable[..., None], rounds: Callable[[int, int], int]
) -> None:
    world = canary.world
    blocks = rounds(1500, 20_000)
    size = blocks * len(BLOCK)
    logs = [world.run_dir / "containers" / "flood.t" / stream for stream in ("stdout", "stderr")]
    slow = Reader(world, "flood.t", "stderr")
    with pulse() as seen, measured(*logs) as most:
        began = time.monotonic()
        flood(world, "flood", blocks)
        reading = threading.Thread(target=slow.follow, args=(0.05,))
        reading.start()
        quick = Reader(world, "flood.t", "stdout").follow()
        assert world.meso("wait", "flood", timeout=300).code == 0
        took = time.monotonic() - began
        reading.join(120)

    for reader in (quick, slow):
        assert reader.read + reader.dropped == size
    assert slow.notes > 0
    explained = world.meso("explain", "flood.t", "--json").lines[0]["logs"]
    for stream in ("stdout", "stderr"):
        assert explained[stream]["size"] == size
        assert explained[stream]["kept"] <= BUDGET
        assert size - explained[stream]["dropped"] <= explained[stream]["kept"]
        assert world.ps()["flood.t"]["dropped"][stream] == explained[stream]["dropped"]
    assert most["peak"] < size  # of twice that; how close to the budget is a figure
    figure(
        bytes=2 * size, gb_per_s=round(2 * size / took / 1e9, 2), budget=2 * BUDGET, peak=most["peak"], slow_notes=slow.notes,
        pulse_p99_ms=seen.p99_ms, pulse_max_ms=seen.max_ms,
    )  # fmt: skip
    assert world.meso("rm", "flood").code == 0
    canary.assert_untouched()


@pytest.mark.one_world
def test_a_flood_stays_within_its_budget_while_its_agent_is_killed_again_and_again(
    world: Any, kill_agent: Callable[[Any], None], rounds: Callable[[int, int], int]
) -> None:
    blocks = rounds(1500, 20_000)
    flood(world, "hounded", blocks)
    readers = [Reader(world, "hounded.t", stream) for stream in ("stdout", "stderr")]
    threads = [threading.Thread(target=reader.follow) for reader in readers]
    for thread in threads:
        thread.start()
    for _ in range(rounds(4, 40)):
        kill_agent(world)
        assert world.meso("ps").code == 0  # which starts the next
    assert world.meso("wait", "hounded", timeout=300).code == 0
    for thread in threads:
        thread.join(120)
    for reader in readers:
        assert reader.read + reader.dropped == blocks * len(BLOCK)
    log = world.meso("explain", "hounded.t", "--json").lines[0]["logs"]["stdout"]
    assert log["kept"] <= BUDGET
    assert world.meso("rm", "hounded").code == 0


def test_what_was_dropped_is_said_on_stderr_and_the_rest_printed(world: Any) -> None:
    flood(world, "said", 40, log="1MiB")
    assert world.meso("wait", "said").code == 0
    lines = world.meso("logs", "--json", "--stream", "stdout", "said.t").lines
    assert lines[0]["dropped"] == lines[1]["offset"] > 0
    explained = world.meso("explain", "said.t")
    assert f"the first {lines[1]['offset']} were dropped" in explained.out
    world.meso("rm", "said")


@pytest.mark.one_world
def test_a_budget_that_is_none_is_refused_before_anything_is_made(world: Any) -> None:
    for log, message in (("4KiB", "too little"), ("much", "not a size")):
        answer = world.run({"name": "odd", "tasks": [{"name": "t", "command": "true", "log": log}]})
        assert answer.code == 2
        assert answer.error["path"] == "$.tasks[0].log"
        assert message in answer.error["message"]
    assert "odd" not in world.ps()


def test_the_output_of_the_last_life_of_an_id_stays_readable_until_it_is_removed(world: Any) -> None:
    def run(text: str) -> None:
        assert world.meso("run", "--name", "phoenix", "--", "sh", "-c", f"echo {text}").code == 0

    def previous() -> Any:
        return world.meso("logs", "--json", "--previous", "phoenix")

    run("first")
    assert previous().error["code"] == "not_found"
    for before, text in (("first", "second"), ("second", "third")):
        run(text)
        assert previous().lines[0]["data"] == f"{before}\n"
        assert world.meso("logs", "phoenix").out == f"{text}\n"
    assert world.meso("rm", "phoenix").code == 0
    assert not list((world.run_dir / "former").iterdir())
