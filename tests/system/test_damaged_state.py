"""What is in the run directory is damaged, taken, or used by somebody else; no descriptor is left: a real agent."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


def end(world: Any) -> None:
    """The agent is killed; what it ran goes on."""
    pidfd = os.pidfd_open(world.agent_pid())
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def test_a_damaged_ledger_ends_nobody_and_doctor_tells_until_it_has_been_seen(world: Any) -> None:
    pod = {"name": "pod", "tasks": [{"name": "a", "command": "sleep 1000"}, {"name": "b", "command": "exit 4", "essential": False}]}
    assert world.run(pod, "-d").code == 0
    assert world.meso("wait", "pod.b").code == 4
    before = world.ps()
    end(world)
    for path in world.run_dir.glob("ledger.db*"):  # the middle of everything
        data = bytearray(path.read_bytes())
        for at in range(len(data) // 3, len(data) * 2 // 3):
            data[at] ^= 0xFF
        path.write_bytes(data)

    after = world.ps()

    assert {found: (line["pid"], line["state"]) for found, line in after.items()} == {
        found: (line["pid"], line["state"]) for found, line in before.items()
    }
    said = [line for line in world.meso("doctor", "--json").lines if line["check"] == "ledger"]
    assert [line["ok"] for line in said] == [False]
    assert "set-aside" in said[0]["have"]
    assert "--forget" in said[0]["hint"]
    world.meso("doctor", "--forget")
    assert [line["ok"] for line in world.meso("doctor", "--json").lines if line["check"] == "ledger"] == [True]
    assert list(world.run_dir.glob("*.set-aside-*")) == []
    assert world.meso("run", "--", "true").code == 0
    assert world.meso("kill", "-s", "KILL", "pod.a").code == 0
    assert world.meso("wait", "pod").code == 137
    assert world.meso("rm", "pod").code == 0
    assert list((world.run_dir / "containers").glob("pod*")) == [], "nothing of it is left, though its record was lost"


def test_with_no_descriptor_left_what_runs_can_be_seen_killed_and_waited_for(world: Any) -> None:
    assert world.meso("run", "-d", "--name", "calm", "--", "sleep", "1000").code == 0
    agent = world.agent_pid()
    usual = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    used = {int(fd) for fd in os.listdir(f"/proc/{agent}/fd")}
    free = sorted(set(range(max(used) + 2)) - used)
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (free[0], usual[1]))  # the next one would be over it
    try:
        assert "calm" in world.ps()
        refused = world.meso("run", "--json", "--name", "no", "--", "true")
        assert refused.code == 125
        assert refused.error["errno"] == "EMFILE"
        assert world.meso("kill", "-s", "KILL", "calm").code == 0
        assert world.meso("wait", "--timeout", "60", "calm").code == 137
    finally:
        resource.prlimit(agent, resource.RLIMIT_NOFILE, usual)
    assert world.agent_pid() == agent
    assert world.meso("run", "--name", "no", "--", "true").code == 0


def test_an_agent_that_cannot_begin_says_why_and_nothing_else(world: Any) -> None:
    command = " ".join(world.command("run", "--", "true"))

    said = subprocess.run(
        ["/bin/sh", "-c", f"ulimit -n 40; exec {command}"],
        env=world.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert said.returncode == 7
    assert "Traceback" not in said.stderr
    assert said.stderr.count("ulimit -n") == 1, said.stderr


@pytest.fixture
def elsewhere(world: Any) -> Iterator[Path]:
    """The run directory by another path: bind mounted, where that is possible."""
    other = world.directory / "elsewhere"
    other.mkdir()
    if os.geteuid() == 0 and world.kind == "root":
        subprocess.run(["mount", "--bind", str(world.run_dir), str(other)], check=True)
        yield other
        subprocess.run(["umount", "-l", str(other)], check=True)
    else:
        other.rmdir()
        other.symlink_to(world.run_dir)
        yield other


@pytest.mark.parametrize("which", ["MESOCOSM_RUN_DIR", "MESOCOSM_STATE_DIR"])
def test_a_second_agent_in_the_same_directory_refuses_though_its_lock_is_gone(world: Any, elsewhere: Path, which: str) -> None:
    assert world.meso("run", "-d", "--name", "calm", "--", "sleep", "1000").code == 0
    agent = world.agent_pid()
    (world.run_dir / "agent.lock").unlink()
    changed = {"MESOCOSM_RUN_DIR": str(world.directory / "another")} if which == "MESOCOSM_STATE_DIR" else {which: str(elsewhere)}

    second = subprocess.run(
        world.command("agent"), env={**world.environment, **changed}, capture_output=True, text=True, timeout=60, check=False
    )

    assert second.returncode == 4, second.stderr
    assert "another agent is using this directory" in second.stderr
    assert which in second.stderr
    assert world.agent_pid() == agent
    assert world.ps()["calm"]["state"] == "RUNNING"


def test_neither_launcher_nor_container_has_the_agents_locks(world: Any) -> None:
    assert world.meso("run", "-d", "--name", "calm", "--", "sleep", "1000").code == 0
    locked = {os.stat(world.run_dir).st_ino, os.stat(world.run_dir / "agent.lock").st_ino}

    def locks(pid: int) -> int:
        found = 0
        for fd in os.listdir(f"/proc/{pid}/fdinfo"):
            text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
            found += any("FLOCK" in line and any(f":{inode} " in line for inode in locked) for line in text.splitlines())
        return found

    assert locks(world.agent_pid()) == 2, "the control"
    assert locks(world.launcher_pid()) == 0
    assert locks(world.ps()["calm"]["pid"]) == 0
