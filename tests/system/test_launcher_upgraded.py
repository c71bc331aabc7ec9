"""An agent of another build finds a launcher with containers: it executes the new program in place, and nobody notices."""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).resolve().parents[2]
LONG = ("sleep", "600")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Path]:
    """A copy of this build that differs in a comment: where its packages are imported from."""
    directory = Path(tempfile.mkdtemp(prefix="meso-build-"))
    directory.chmod(0o755)
    package = directory / "mesocosm"
    package.mkdir()
    for name in ("kernel", "plugins"):
        shutil.copytree(REPOSITORY / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "kernel" / "launcher" / "zygote.py").open("a") as module:
        module.write("# another build\n")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def other(world: Any, elsewhere: Path) -> Any:
    """The same world, used with that build."""
    path = world.environment["PYTHONPATH"].replace(str(REPOSITORY / "contrib" / "import-root"), str(elsewhere))
    return replace(world, environment={**world.environment, "PYTHONPATH": path})


def kill(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


def begin(world: Any, name: str, *command: str) -> int:
    answer = world.meso("run", "-d", "--name", name, "--", *command)
    assert answer.code == 0, answer.err
    pid: int = world.ps()[name]["pid"]
    return pid


def is_of(build: Path, launcher: int) -> bool:
    return str(build).encode() in Path(f"/proc/{launcher}/cmdline").read_bytes()


def until_of(build: Path, launcher: int) -> None:
    deadline = time.monotonic() + 30
    while not is_of(build, launcher):
        assert time.monotonic() < deadline, Path(f"/proc/{launcher}/cmdline").read_bytes()
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def afterwards_nobody_serves(world: Any, other: Any) -> Iterator[None]:
    """Each test begins with an agent and a launcher of the first build."""
    yield
    assert other.meso("agent", "--stop").code in (0, 7)


def test_a_launcher_of_another_build_becomes_one_of_the_agents_in_place(world: Any, other: Any, elsewhere: Path) -> None:
    stays = begin(world, "stays", *LONG)
    over = begin(world, "over", *LONG)
    exits = begin(world, "exits", "sh", "-c", "trap 'exit 7' TERM; sleep 600 & wait")
    launcher = world.launcher_pid()
    assert not is_of(elsewhere, launcher)
    before = len(os.listdir(f"/proc/{launcher}/fd"))
    kill(world.agent_pid())
    kill(over)  # nobody acknowledges this one

    assert other.ps()["stays"]["pid"] == stays
    until_of(elsewhere, launcher)
    assert other.launcher_pid() == launcher
    assert other.meso("wait", "over").code == 128 + signal.SIGKILL
    assert other.ps()["exits"]["pid"] == exits
    assert other.meso("run", "--in", "stays", "--", "sh", "-c", "exit 5").code == 5
    assert other.meso("run", "--", "true").code == 0
    assert other.meso("kill", "-s", "TERM", "exits").code == 0
    assert other.meso("wait", "exits").code == 7
    assert len(os.listdir(f"/proc/{launcher}/fd")) <= before
    assert other.meso("kill", "-s", "KILL", "stays").code == 0
    assert other.meso("wait", "stays").code == 128 + signal.SIGKILL
    assert {name for name, line in other.ps().items() if line["state"] != "DEAD"} == set()
    assert other.launcher_pid() == launcher


def test_those_of_a_killed_launcher_stay_known_through_an_upgrade(world: Any, other: Any, elsewhere: Path) -> None:
    stays = begin(world, "stays", *LONG)
    kill(world.launcher_pid())
    begin(world, "own", *LONG)
    launcher = world.launcher_pid()
    kill(world.agent_pid())
    assert other.ps()["stays"]["pid"] == stays
    until_of(elsewhere, launcher)
    kill(other.agent_pid())
    kill(stays)
    assert other.meso("wait", "stays").code == 128 + signal.SIGKILL
    assert other.launcher_pid() == launcher
    assert other.meso("kill", "own").code == 0
    other.meso("wait", "own")


def test_a_new_program_that_does_not_come_up_costs_no_container(world: Any, other: Any, elsewhere: Path) -> None:
    module = elsewhere / "mesocosm" / "kernel" / "launcher" / "process.py"
    whole = module.read_text()
    stays = begin(world, "stays", *LONG)
    launcher = world.launcher_pid()
    kill(world.agent_pid())
    module.write_text(whole.replace("    state = upgrade.read_state(file)\n", "    raise SystemExit('not today')\n"))
    assert module.read_text() != whole
    try:
        assert other.ps()["stays"]["pid"] == stays
        deadline = time.monotonic() + 30
        while Path(f"/proc/{launcher}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert other.meso("run", "--in", "stays", "--", "sh", "-c", "exit 5").code == 5
        assert other.meso("kill", "-s", "KILL", "stays").code == 0
        assert other.meso("wait", "stays").code == 128 + signal.SIGKILL
    finally:
        module.write_text(whole)
