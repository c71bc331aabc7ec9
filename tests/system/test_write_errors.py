"""Every write and sync of the agent's files fails, with each error of a disk: what runs can be seen, ended and waited for."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EROFS")
WRITES = "pwrite64,pwritev,ftruncate,fsync,fdatasync,rename,unlink,fallocate"


@contextmanager
def failing(pid: int, error: str) -> Iterator[Callable[[], int]]:
    """Each of WRITES fails, in all threads of a process; said afterwards is how many have."""
    if shutil.which("strace") is None:
        pytest.skip("this machine cannot: there is no strace")
    command = ["strace", "-f", "-p", str(pid), "-e", f"trace={WRITES}", "-e", f"inject={WRITES}:error={error}"]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    said = strace.stderr.readline()
    if "attached" not in said:
        strace.wait()
        pytest.skip(f"this machine cannot be traced: {said}")
    try:
        yield lambda: said.count("INJECTED")
    finally:
        strace.send_signal(signal.SIGINT)
        said = strace.communicate()[1]


def test_whatever_error_writes_answer_with_launches_are_refused_and_what_runs_can_be_ended(
    world: Any, canary: Any, figure: Callable[..., None]
) -> None:
    for error in ERRORS:
        assert world.meso("run", "-d", "--name", error.lower(), "--", "sleep", "1000").code == 0
    failed, agent = 0, world.agent_pid()
    before = sorted(os.listdir(world.run_dir / "containers"))
    for error in ERRORS:
        name = error.lower()
        with failing(agent, error) as count:
            refused = world.meso("run", "--json", "--name", "new", "--", "true")
            assert (refused.code, refused.error["code"]) == (125, "launch_failed"), refused
            assert "ledger cannot be written" in refused.error["message"]
            assert refused.error["hint"]
            assert sorted(os.listdir(world.run_dir / "containers")) == before, "nothing was begun"
            lines = world.ps()
            assert {lines[each]["state"] for each in canary.ids} == {"RUNNING"}
            assert world.meso("kill", "-s", "KILL", name).code == 0
            assert world.meso("wait", name).code == 137
            told = world.meso("history", "--json", name)
            assert told.code == 4 or [line["state"] for line in told.lines] != ["DEAD"], "what is not on disk is not in it"
        failed += count()
        assert count(), "the control: something was written"
        assert world.meso("run", "--name", "new", "--", "true").code == 0, "the next is taken"
        assert world.meso("rm", "new").code == 0
    assert world.agent_pid() == agent

    pidfd = os.pidfd_open(agent)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
    for error in ERRORS:
        assert world.meso("wait", error.lower()).code == 137, "the next agent knows it"
    deadline = time.monotonic() + 60
    while (answer := world.meso("history", "--json")).code != 0:  # what failed is tried again some seconds later
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for error in ERRORS:
        found = [line for line in answer.lines if line.get("id") == error.lower()]
        assert [line["state"] for line in found] == ["DEAD"], found
        assert world.meso("rm", error.lower()).code == 0
    figure(errors=len(ERRORS), writes_failed=failed, refused=len(ERRORS), ends_lost=0)
    assert not (Path(world.run_dir) / "containers" / "new").exists()
