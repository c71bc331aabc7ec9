"""The launcher is killed with -9: what runs goes on, nothing new starts, and the agent makes room for the next one."""

from __future__ import annotations

import os
import select
import signal
from typing import Any

import pytest

pytestmark = pytest.mark.system


def test_without_its_launcher_an_agent_refuses_launches_and_goes_with_its_last_container(world: Any) -> None:
    assert world.meso("run", "-d", "--name", "last", "--", "sleep", "60").code == 0
    launcher = os.pidfd_open(world.launcher_pid())
    signal.pidfd_send_signal(launcher, signal.SIGKILL)
    assert select.select([launcher], [], [], 30)[0]
    os.close(launcher)

    refused = world.meso("run", "--json", "--", "true")
    assert refused.code in (4, 125)
    assert "the launcher is gone" in refused.error["message"]
    assert world.ps()["last"]["state"] == "RUNNING"

    agent = os.pidfd_open(world.agent_pid())
    assert world.meso("kill", "-s", "KILL", "last").code == 0
    world.meso("wait", "last")
    assert select.select([agent], [], [], 30)[0]
    os.close(agent)
    assert world.meso("run", "--", "true").code == 0
    assert world.meso("rm", "last").code == 0
