"""The file system of the run directory is full: what runs goes on and can be ended, and nothing new is begun."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.needs_root]


@pytest.fixture
def small(world: Any) -> Iterator[Any]:
    """Another agent, whose run directory is on a file system of 8 MiB."""
    directory = world.directory / "small"
    (directory / "run").mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "tmpfs", str(directory / "run")]
    subprocess.run(mount, check=True)
    environment = {**world.environment, "MESOCOSM_RUN_DIR": str(directory / "run"), "MESOCOSM_STATE_DIR": str(directory / "state")}
    other = dataclasses.replace(world, directory=directory, environment=environment, children=[])
    yield other
    other.close()
    subprocess.run(["umount", "-l", str(directory / "run")], check=True)  # its launcher may be on its way out


def fill(run_dir: Path) -> Path:
    """Takes every byte."""
    ballast = run_dir / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    assert os.statvfs(run_dir).f_bavail == 0
    return ballast


def test_an_agent_that_begins_without_a_byte_left_shows_kills_and_waits(small: Any) -> None:
    assert small.meso("run", "-d", "--name", "calm", "--", "sleep", "1000").code == 0
    assert small.meso("run", "-d", "--name", "other", "--", "sleep", "1000").code == 0
    agent = small.agent_pid()
    pid = small.ps()["calm"]["pid"]
    pidfd = os.pidfd_open(agent)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
    ballast = fill(small.run_dir)

    assert small.ps()["calm"]["pid"] == pid
    assert small.agent_pid() != agent
    refused = small.meso("run", "--json", "--", "true")
    assert (refused.code, refused.error["errno"]) == (125, "ENOSPC")
    assert small.meso("kill", "-s", "KILL", "other").code == 0
    assert small.meso("wait", "other").code == 137
    assert small.meso("rm", "other").code == 0
    doctor = small.meso("doctor")
    assert doctor.code == 6
    assert "cannot be written" in doctor.out

    ballast.unlink()
    assert small.meso("run", "--", "true").code == 0
    assert small.ps()["calm"]["pid"] == pid
    assert small.meso("kill", "-s", "KILL", "calm").code == 0


def test_a_container_that_fills_it_stops_no_agent_and_no_other_container(small: Any) -> None:
    assert small.meso("run", "-d", "--name", "calm", "--", "sleep", "1000").code == 0
    assert (
        small.meso("run", "-d", "--name", "loud", "--", "sh", "-c", "trap 'exit 3' TERM; while :; do yes || sleep 0.1; done").code
        == 0
    )
    agent = small.agent_pid()
    deadline = time.monotonic() + 60
    while not small.ps()["loud"].get("dropped"):  # what it prints has given way: it alone fills nothing
        assert time.monotonic() < deadline
    assert small.meso("kill", "-s", "KILL", "loud").code == 0
    assert small.meso("wait", "loud").code == 137
    assert small.meso("rm", "loud").code == 0  # and with it its output
    assert small.meso("run", "-d", "--name", "other", "--", "sleep", "1000").code == 0
    ballast = fill(small.run_dir)

    refused = small.meso("run", "--json", "--", "true")
    assert refused.code == 125
    assert refused.error["errno"] == "ENOSPC"
    assert small.agent_pid() == agent
    assert small.ps()["calm"]["state"] == "RUNNING"
    assert small.meso("kill", "-s", "KILL", "other").code == 0
    assert small.meso("wait", "other").code == 137

    ballast.unlink()
    assert small.meso("run", "--", "true").code == 0
    assert small.agent_pid() == agent
    assert small.ps()["calm"]["state"] == "RUNNING"
    assert small.meso("kill", "-s", "KILL", "calm").code == 0


def test_what_was_printed_gives_way_when_the_room_is_gone_without_needing_any(small: Any) -> None:
    said = "dd if=/dev/zero bs=64k count=48 2>/dev/null; exec sleep 1000"
    assert small.meso("run", "-d", "--name", "talker", "--", "sh", "-c", said).code == 0
    log = small.run_dir / "containers" / "talker" / "stdout"
    deadline = time.monotonic() + 60
    while log.stat().st_size < 48 * 65536:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = log.stat().st_blocks * 512
    ballast = fill(small.run_dir)
    while log.stat().st_blocks * 512 > before // 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert log.stat().st_size == 48 * 65536
    while not os.statvfs(small.run_dir).f_bavail:  # a page of the log is no more its own a moment before it is anybody's
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ballast.unlink()
    said_at_last = small.meso("logs", "talker")
    assert said_at_last.out == "\0" * len(said_at_last.out)
    assert f"{48 * 65536 - len(said_at_last.out)} bytes dropped" in said_at_last.err
    assert small.meso("kill", "-s", "KILL", "talker").code == 0
