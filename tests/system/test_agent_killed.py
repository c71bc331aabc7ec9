"""The agent is killed with -9: containers do not notice, and the next verb finds everything again."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system


def kill_agent(world: Any, number: signal.Signals = signal.SIGKILL) -> None:
    pid = world.agent_pid()
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, number)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_pod_goes_on_and_the_next_verb_sees_it(world: Any, number: signal.Signals) -> None:
    world.run({"name": "pod", "tasks": [{"name": "t", "command": "sleep 60"}]}, "-d")
    pids = {name: line["pid"] for name, line in world.ps().items() if name.partition(".")[0] == "pod"}

    kill_agent(world, number)

    for pid in pids.values():
        os.kill(pid, 0)
    after = world.ps()
    assert {name: after[name]["pid"] for name in pids} == pids
    assert {after[name]["state"] for name in pids} == {"RUNNING"}
    assert world.meso("kill", "-s", "KILL", "pod.t").code == 0
    assert world.meso("wait", "pod").code == 137


def test_the_exit_status_of_one_that_ended_in_between_is_delivered(world: Any) -> None:
    given = world.directory / "given"
    given.mkdir()
    given.chmod(0o755)
    until_go = "until test -e /given/go; do sleep 0.05; done; echo done; exit 7"
    world.meso("run", "-d", "--name", "brief", "--volume", f"{given}:/given", "--", "sh", "-c", until_go)
    pid = world.ps()["brief"]["pid"]
    pidfd = os.pidfd_open(pid)

    kill_agent(world)
    (given / "go").touch()
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)

    assert world.meso("wait", "brief").code == 7
    assert world.meso("logs", "brief").out == "done\n"


def test_logs_events_and_kill_work_with_the_new_agent(world: Any) -> None:
    world.meso("run", "-d", "--name", "talker", "--", "sh", "-c", "trap 'echo bye; exit 3' TERM; while :; do sleep 0.05; done")
    last = max(line["seq"] for line in until_quiet(world))

    kill_agent(world)

    assert world.meso("kill", "talker").code == 0
    assert world.meso("wait", "talker").code == 3
    assert world.meso("logs", "talker").out == "bye\n"
    seen = [line["seq"] for line in until_quiet(world)]
    assert seen == sorted(set(seen))
    assert max(seen) > last


def until_quiet(world: Any) -> list[dict[str, Any]]:
    """All events so far: `events` is cut off once nothing comes any more."""
    import json
    import subprocess

    child = world.start("events", "--json", "--since", "0")
    try:
        out, _ = child.communicate(timeout=2)
    except subprocess.TimeoutExpired:
        child.terminate()
        out, _ = child.communicate(timeout=30)
    return [json.loads(line) for line in out.splitlines()]


def test_nothing_is_left_when_all_of_it_has_ended(canary: Any) -> None:
    world = canary.world
    before = canary.census(agent=False)
    world.run({"name": "pod", "tasks": [{"name": "t", "command": "sleep 60"}]}, "-d")

    kill_agent(world)
    world.meso("kill", "pod")
    world.meso("wait", "pod")

    assert world.meso("rm", "pod").code == 0
    # The same but for the agent, which is another process now.
    assert left_over(dataclasses.replace(before, ignore=before.ignore | {world.agent_pid()})) == []
    canary.assert_untouched()
