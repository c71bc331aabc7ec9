"""The launcher, its keeper and the agent are killed with -9, in every combination: what runs goes on, is killed, nested into and
waited for as before, how it ended is known as long as anybody saw it, and whoever comes next starts new ones."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.linux import pidfds
from mesocosm.kernel.runtime.seal import sealed_line

pytestmark = pytest.mark.system

LONG = ("sleep", "600")


def until_told(code: int) -> tuple[str, ...]:
    """A program that exits with `code` when it gets SIGTERM."""
    return "sh", "-c", f"trap 'exit {code}' TERM; sleep 600 & wait"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(*pids: int) -> None:
    """SIGKILL for all of them at once; back when none of them runs any more."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    for pidfd in pidfds:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)


def keeper_of(launcher: int) -> int:
    keeper = parent_of(launcher)
    assert Path(f"/proc/{keeper}/comm").read_text() == "meso-keeper\n"
    return keeper


def begin(world: Any, name: str, *command: str) -> int:
    """A pod of one container; its first process."""
    answer = world.meso("run", "-d", "--name", name, "--", *command)
    assert answer.code == 0, answer.err
    pid: int = world.ps()[name]["pid"]
    return pid


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_of(world: Any, name: str) -> dict[str, Any]:
    """How a container ended, as the contract has it."""
    answer = world.meso("wait", "--json", name)
    wait: dict[str, Any] = answer.lines[-1]
    return wait


def living_in(world: Any) -> set[str]:
    return {name for name, line in world.ps().items() if line["state"] != "DEAD"}


def test_what_ran_under_a_killed_launcher_goes_on_and_its_end_is_known(world: Any) -> None:
    for name, command in (("exits", until_told(7)), ("killed", LONG), ("stays", LONG)):
        begin(world, name, *command)
    first = world.launcher_pid()
    kill(first)

    assert world.meso("run", "--", "true").code == 0
    assert world.launcher_pid() != first
    assert living_in(world) >= {"killed", "stays"}
    assert world.meso("kill", "-s", "KILL", "killed").code == 0
    assert world.meso("wait", "killed").code == 128 + signal.SIGKILL
    assert world.meso("kill", "-s", "TERM", "exits").code == 0
    assert world.meso("wait", "exits").code == 7
    assert world.meso("kill", "stays").code == 0
    assert wait_of(world, "stays")["reason"] == "killed"
    assert living_in(world) == set()


def test_a_container_of_a_killed_launcher_can_be_nested_into(world: Any) -> None:
    begin(world, "outer", *LONG)
    kill(world.launcher_pid())
    nested = world.meso("run", "--in", "outer", "--", "sh", "-c", "exit 5")
    assert nested.code == 5, nested.err
    kill(world.launcher_pid())
    assert world.meso("run", "-d", "--in", "outer", "--", *LONG).code == 0
    kill(world.launcher_pid())
    assert world.meso("kill", "outer").code == 0
    world.meso("wait", "outer")
    assert living_in(world) == set(), "what was nested by another launcher has gone with it"


def test_launcher_after_launcher_may_die_and_every_keeper_leaves_when_its_own_have_ended(world: Any) -> None:
    known = []
    for number in range(3):
        begin(world, f"c{number}", *LONG)
        launcher = world.launcher_pid()
        known.append(os.pidfd_open(keeper_of(launcher)))
        kill(launcher)
    assert world.meso("run", "--", "true").code == 0
    for number in reversed(range(3)):
        assert not select.select([known[number]], [], [], 0)[0]
        assert world.meso("kill", "-s", "KILL", f"c{number}").code == 0
        assert world.meso("wait", f"c{number}").code == 128 + signal.SIGKILL
        assert select.select([known[number]], [], [], 30)[0]
        os.close(known[number])


def test_agents_that_come_later_find_those_of_a_killed_launcher_like_the_others(world: Any) -> None:
    begin(world, "old", *until_told(9))
    kill(world.launcher_pid())
    begin(world, "new", *LONG)
    launcher = world.launcher_pid()
    kill(world.agent_pid())
    assert living_in(world) == {"old", "new"}
    assert world.launcher_pid() == launcher
    assert world.meso("kill", "-s", "TERM", "old").code == 0
    assert world.meso("wait", "old").code == 9
    assert world.meso("kill", "new").code == 0
    world.meso("wait", "new")


def test_with_agent_and_launcher_gone_the_living_are_taken_over_and_ends_in_between_are_known(world: Any) -> None:
    stays = begin(world, "stays", *LONG)
    ended = begin(world, "ended", *LONG)
    begin(world, "late", *until_told(4))
    kill(world.agent_pid(), world.launcher_pid())
    os.kill(ended, signal.SIGKILL)
    until(lambda: has_ended(ended))

    assert wait_of(world, "ended")["signal"] == signal.SIGKILL
    assert world.ps()["stays"]["pid"] == stays
    assert living_in(world) >= {"stays"}
    assert world.meso("run", "--in", "stays", "--", "sh", "-c", "exit 6").code == 6
    assert world.meso("kill", "-s", "TERM", "late").code == 0
    assert world.meso("wait", "late").code == 4
    assert world.meso("kill", "stays").code == 0
    world.meso("wait", "stays")
    assert living_in(world) == set()


def test_with_the_keeper_gone_too_an_end_that_nobody_saw_is_unknown_and_says_why(world: Any) -> None:
    stays = begin(world, "stays", *LONG)
    ended = begin(world, "ended", *LONG)
    launcher = world.launcher_pid()
    kill(world.agent_pid(), keeper_of(launcher), launcher)
    os.kill(ended, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{ended}").exists())

    wait = wait_of(world, "ended")
    assert (wait["reason"], wait["exit"], wait["signal"]) == ("unknown", None, None)
    assert "keeper" in wait["message"]
    assert world.ps()["stays"]["pid"] == stays
    assert world.meso("kill", "stays").code == 0
    wait = wait_of(world, "stays")  # reaped by nobody of ours: only the kernel can tell, if it keeps that
    if the_kernel_keeps_how_children_ended():
        assert (wait["reason"], wait["exit"]) == ("killed", None)
        assert wait["signal"] in (signal.SIGTERM, signal.SIGKILL)
    else:
        assert wait["reason"] == "unknown"
        assert "PIDFD_GET_INFO" in wait["message"]


def the_kernel_keeps_how_children_ended() -> bool:
    child = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = os.pidfd_open(child)
    os.waitpid(child, 0)
    try:
        return pidfds.exit_status(pidfd) is not None
    finally:
        os.close(pidfd)


@pytest.fixture
def sentinel() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody else's process, which must not be touched."""
    with subprocess.Popen(LONG) as process:
        yield process
        assert process.poll() is None, "it was somebody else's"
        process.kill()


def test_who_has_the_number_of_a_dead_container_now_is_neither_signalled_nor_watched(
    world: Any, sentinel: subprocess.Popen[bytes]
) -> None:
    ended = begin(world, "ended", *LONG)
    kill(world.agent_pid(), world.launcher_pid())
    os.kill(ended, signal.SIGKILL)
    until(lambda: has_ended(ended))
    # The kernel would give the number away again at some time; the ledger cannot tell the difference but by the identity.
    with sqlite3.connect(world.run_dir / "ledger.db") as ledger:
        assert ledger.execute("UPDATE containers SET pid = ? WHERE id = 'ended'", (sentinel.pid,)).rowcount == 1
    ledger.close()

    world.meso("kill", "-s", "KILL", "ended")
    assert wait_of(world, "ended")["reason"] == "unknown"
    assert living_in(world) == set()
    assert sentinel.poll() is None


def test_another_boot_signals_nobody(world: Any, sentinel: subprocess.Popen[bytes]) -> None:
    container = os.pidfd_open(begin(world, "before", *LONG))
    kill(world.agent_pid(), world.launcher_pid())
    pidfd = os.pidfd_open(sentinel.pid)
    process = (sentinel.pid, pidfds.identity(pidfd, sentinel.pid))  # not even somebody who looks like the one that is meant
    os.close(pidfd)
    with sqlite3.connect(world.run_dir / "ledger.db") as ledger:
        ledger.execute("UPDATE containers SET pid = ?, birth = ?", process)
        ledger.execute("UPDATE meta SET value = ? WHERE key = 'boot_id'", (sealed_line("another", "boot_id"),))
    ledger.close()
    assert wait_of(world, "before")["reason"] == "rebooted"
    assert living_in(world) == set()
    assert sentinel.poll() is None
    with contextlib.suppress(ProcessLookupError):  # with control groups its own have ended it: those are found by name
        signal.pidfd_send_signal(container, signal.SIGKILL)
    os.close(container)


def test_a_launch_is_whole_or_gone_whenever_its_launcher_is_killed(world: Any, rounds: Any) -> None:
    pod = world.directory / "web.json"
    pod.write_text(json.dumps({"name": "web", "tasks": [{"name": name, "command": [*LONG]} for name in "abc"]}))
    pod.chmod(0o644)
    begin(world, "other", *LONG)
    for number in range(rounds(4, 200)):
        child = world.start("run", "--json", "-d", str(pod))
        time.sleep(0.2 + 0.02 * (number % 10))  # somewhere in it: the interpreter of the client takes most of this
        kill(world.launcher_pid())
        child.communicate(timeout=60)
        until(lambda: living_in(world) - {"other"} in ({"web", "web.a", "web.b", "web.c"}, set()))
        if "web" in living_in(world):
            assert world.meso("kill", "web").code == 0
            world.meso("wait", "web")
        assert world.meso("run", "--", "true").code == 0
    assert living_in(world) == {"other"}
    assert world.meso("kill", "-s", "KILL", "other").code == 0
    world.meso("wait", "other")
