"""A launcher dies while this process may open nothing more, or where nothing can be opened: that is said, and costs no agent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.launcher import starting
from mesocosm.kernel.launcher.connecting import Renewing
from mesocosm.kernel.linux.pidfds import identity
from mesocosm.kernel.runtime.machine import LinuxMachine


def none_left(*_args: Any, **_more: Any) -> int:
    raise OSError(errno.EMFILE, "Too many open files")


async def test_the_end_of_a_container_is_awaited_without_a_descriptor_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "600"])
    pidfd = os.pidfd_open(process.pid)
    machine = LinuxMachine(str(tmp_path))
    birth = identity(pidfd, process.pid)
    for name in ("dup", "open"):
        monkeypatch.setattr(os, name, none_left)
    told = []

    async def wait() -> None:
        told.append(await machine.how_it_ended("c", pidfd, process.pid, birth))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not told
        process.kill()
        process.wait()
        await machine.gone(pidfd)
    assert told[0].container_id == "c"
    assert told[0].status in (signal.SIGKILL, None), "None where the kernel does not keep it"
    machine.close(pidfd)


async def test_a_wait_for_an_end_that_was_told_otherwise_ends_before_its_descriptor_is_another_files(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    pidfd = os.pidfd_open(process.pid)
    machine = LinuxMachine(str(tmp_path))
    closed = trio.Event()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await machine.how_it_ended("c", pidfd, process.pid, "")
        closed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        machine.close(pidfd)
        await closed.wait()
    process.kill()
    process.wait()


async def test_a_run_directory_that_has_gone_is_an_error_of_ours(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(MesoError, match="finding or starting the launcher") as caught:
            await Renewing(str(tmp_path / "gone"), None, nursery).connection()
    assert caught.value.as_object()["errno"] == "ENOENT"


def test_so_is_a_program_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting.mounts, "open_tree", none_left)
    with pytest.raises(MesoError, match="starting the launcher") as caught:
        starting.open_program()
    assert caught.value.as_object()["errno"] == "EMFILE"
