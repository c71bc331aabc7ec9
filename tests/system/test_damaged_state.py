"""What is in the run directory is damaged, taken, or used by somebody else; no descriptor is left: a real agent."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import select
import signal
import socket
import subprocess
import time
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
    left = {path.name for path in (world.run_dir / "containers").iterdir()}
    assert not left & {"pod", "pod.a"}, "nothing is left of what ran, though its record was lost"


def open_in(pid: int) -> set[int]:
    """The numbers of its descriptors."""
    return {int(fd) for fd in os.listdir(f"/proc/{pid}/fd")}


@pytest.fixture
def calm(world: Any) -> Iterator[str]:
    """A container that sleeps."""
    assert world.meso("run", "-d", "--name", "calm", "--", "sleep", "1000").code == 0
    yield "calm"
    world.meso("kill", "-s", "KILL", "calm")
    world.meso("wait", "calm")
    assert world.meso("rm", "calm").code == 0


@pytest.mark.usefixtures("calm")
def test_with_no_descriptor_left_what_runs_can_be_seen_killed_and_waited_for(world: Any) -> None:
    agent = world.agent_pid()
    try:
        usual = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    except PermissionError:
        pytest.skip("this machine cannot set limits for a process in another user namespace")
    with contextlib.ExitStack() as stack:
        while max(used := open_in(agent)) + 1 > len(used):  # every number that is free below the last
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.settimeout(60)
            peer.connect(str(world.run_dir / "agent.sock"))
            peer.sendall(bytes.fromhex("0000000a940001a450494e479180"))  # a PING, as contrib/manual/wire.md has it
            assert peer.recv(100)
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (len(used), usual[1]))
        stack.callback(resource.prlimit, agent, resource.RLIMIT_NOFILE, usual)
        assert "calm" in world.ps()
        refused = world.meso("run", "--json", "--name", "no", "--", "true")
        assert refused.code == 125
        assert refused.error["errno"] == "EMFILE"
        assert world.meso("kill", "-s", "KILL", "calm").code == 0
        assert world.meso("wait", "--timeout", "60", "calm").code == 137
    assert world.agent_pid() == agent
    assert world.meso("run", "--name", "yes", "--", "true").code == 0  # something of the other may still be parked


def test_an_agent_that_cannot_begin_says_why_and_nothing_else(world: Any) -> None:
    command = world.as_user("/bin/sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *world.command("run", "--", "true"))
    alone = {
        **world.environment,
        "MESOCOSM_RUN_DIR": f"{world.run_dir}/alone",
        "MESOCOSM_STATE_DIR": f"{world.run_dir}/alone-state",
    }

    said = subprocess.run(command, env=alone, cwd="/", capture_output=True, text=True, timeout=60, check=False)

    assert said.returncode == 7, said.stderr
    assert "Traceback" not in said.stderr
    assert said.stderr.count("ulimit -n") == 1, said.stderr


@pytest.fixture
def elsewhere(world: Any) -> Iterator[Path]:
    """The run directory by another path: bind mounted, where that is possible."""
    other = world.directory / "elsewhere"
    if world.user == "root":
        other.mkdir()
        subprocess.run(["mount", "--bind", str(world.run_dir), str(other)], check=True)
        yield other
        subprocess.run(["umount", "-l", str(other)], check=True)
        other.rmdir()
    else:  # a link to it is refused before its lock is asked
        other.symlink_to(world.run_dir.parent)
        yield other / world.run_dir.name
        other.unlink()


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("which", ["MESOCOSM_RUN_DIR", "MESOCOSM_STATE_DIR"])
def test_a_second_agent_in_the_same_directory_refuses_though_its_lock_is_gone(world: Any, elsewhere: Path, which: str) -> None:
    agent = world.agent_pid()
    (world.run_dir / "agent.lock").unlink(missing_ok=True)
    other = {"MESOCOSM_RUN_DIR": str(elsewhere if which == "MESOCOSM_RUN_DIR" else world.run_dir / "another")}

    command = world.as_user(*world.command("agent"))
    second = subprocess.run(
        command, env={**world.environment, **other}, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )

    assert second.returncode == 4, second.stderr
    assert "another agent is using this directory" in second.stderr
    assert which in second.stderr
    assert world.agent_pid() == agent
    assert world.ps()["calm"]["state"] == "RUNNING"


@pytest.mark.usefixtures("calm")
def test_a_verb_whose_agent_would_need_anothers_state_directory_names_who_has_it(world: Any) -> None:
    agent = world.agent_pid()
    another = dataclasses.replace(
        world, environment={**world.environment, "MESOCOSM_RUN_DIR": str(world.run_dir / "another")}, children=[]
    )

    began = time.monotonic()
    said = another.meso("ps", "--json")

    assert said.code == 4, said.err
    error = said.error
    assert (error["code"], error["target"]) == ("conflict", world.environment["MESOCOSM_STATE_DIR"])
    assert error["have"] == f"process {agent}, whose run directory is {world.run_dir}"
    assert "set MESOCOSM_STATE_DIR" in error["hint"]
    assert time.monotonic() - began < 30
    assert world.agent_pid() == agent
    apart = {**another.environment, "MESOCOSM_STATE_DIR": str(world.run_dir / "another" / "state")}
    another = dataclasses.replace(another, environment=apart)
    assert another.meso("ps").code == 0  # the control: as the hint has it
    assert another.meso("agent", "--stop").code == 0
    assert world.ps()["calm"]["state"] == "RUNNING"


@pytest.mark.usefixtures("calm")
def test_neither_launcher_nor_container_has_the_agents_locks(world: Any) -> None:
    locked = {os.stat(world.run_dir).st_ino}

    def locks(pid: int) -> int:
        found = 0
        for fd in os.listdir(f"/proc/{pid}/fdinfo"):
            with contextlib.suppress(FileNotFoundError):  # it has just been closed
                text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text()
                found += any("FLOCK" in line and any(f":{inode} " in line for inode in locked) for line in text.splitlines())
        return found

    assert locks(world.agent_pid()) == 1, "the control"
    assert locks(world.launcher_pid()) == 0
    assert locks(world.ps()["calm"]["pid"]) == 0
