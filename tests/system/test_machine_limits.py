"""A limit of the machine that is reached: who comes too late is told which one it was, in numbers, and nobody else notices."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.linux.probe import run_id
from mesocosm.kernel.testing.census import census, left_over

pytestmark = pytest.mark.system

JOIN_KEYRING = "import ctypes, os, sys; ctypes.CDLL(None).syscall(250, 1, None); os.execv(sys.argv[1], sys.argv[1:])"


def tasks_of(uid: int) -> int:
    """How many processes and threads a user has."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            status = path.read_text()
        except OSError:
            continue
        if f"\nUid:\t{uid}\t" in status:
            count += int(re.findall(r"\nThreads:\t(\d+)", status)[0])
    return count


def few_files(_world: Any) -> list[str]:
    return ["prlimit", "--nofile=256:256"]


def few_processes(world: Any) -> list[str]:
    if world.uid == 0:
        pytest.skip("this machine cannot: no limit of processes holds for root")
    most = tasks_of(world.uid) + 60
    return ["prlimit", f"--nproc={most}:{most}"]


def few_keys(world: Any) -> list[str]:
    most = int(Path(f"/proc/sys/kernel/keys/{'root_' if world.uid == 0 else ''}maxkeys").read_text())
    if most > 250:
        pytest.skip(f"this machine cannot: this user may have {most} keys")
    return [world.python, "-c", JOIN_KEYRING]  # as after a login: what follows counts


@pytest.mark.parametrize(
    ("scarcity", "count", "name"),
    [(few_files, 260, "ulimit -n"), (few_processes, 80, "ulimit -u"), (few_keys, 210, "kernel.keys.maxkeys")],
    ids=["files", "processes", "keys"],
)  # fmt: skip
def test_who_comes_too_late_is_told_which_limit_it_was_and_the_others_live_on(
    canary: Any, another_world: Any, figure: Any, scarcity: Callable[[Any], list[str]], count: int, name: str
) -> None:
    scarce, crowd = another_world, {"count": count, "connections": 4}
    others = [canary.world.agent_pid(), canary.world.launcher_pid()]
    keys = "APART" not in os.environ  # see Canary.census
    before = census(run_id=run_id(str(scarce.run_dir)), ignore=others, keys=keys)
    agent = begin_agent(scarce, scarcity(scarce))

    errors = scarce.script("crowd.py", json.dumps({"verb": "launch", **crowd}), timeout=300)["errors"]

    assert errors
    for error in errors:
        assert error["code"] == "launch_failed"
        assert re.fullmatch(r"\d+ of \d+ .+", error["have"]), error
        assert error["need"] == f"room for one more: {name}"
    late = {error["of"] for error in errors}
    alive = {found for found, line in scarce.ps().items() if line["state"] == "RUNNING"}
    assert alive == {f"crowd{number}" for number in range(count)} - late
    # Once some have ended there is room again.
    assert scarce.script("crowd.py", json.dumps({"verb": "end", "count": 20, "connections": 4}))["errors"] == []
    assert scarce.meso("run", "--name", "again", "--", "sh", "-c", "exit 7").code == 7
    assert scarce.meso("agent", "--stop").code == 0
    agent.communicate(timeout=60)
    assert left_over(before) == []
    canary.assert_untouched()
    figure(limit=name, alive=len(alive), late=len(late))


def begin_agent(world: Any, words: list[str]) -> subprocess.Popen[str]:
    """Starts the world's agent by a command that begins with those words; returns when it serves."""
    agent = subprocess.Popen(
        world.as_user(*words, *world.command("agent")),
        env=dict(world.environment), cwd="/", text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    world.children.append(agent)
    assert agent.stderr is not None
    while "serves" not in (line := agent.stderr.readline()):
        assert line, "the agent did not start"
    return agent
