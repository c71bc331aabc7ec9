"""The command is quick because a verb loads only what it needs."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

HEAVY = ("trio", "msgspec", "pluggy", "asyncio", "subprocess", "json.tool", "importlib.metadata", "dataclasses")


def test_the_entry_point_loads_nothing_heavy() -> None:
    program = "import sys, mesocosm.kernel.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout.split()
    assert not set(HEAVY) & set(loaded)


def test_ps_with_an_agent_up_takes_a_moment(meso_process: Any, fake_agent: Any) -> None:
    """A tenth of a second is what is wanted; a deadline has ten times that, since others may be at work on this machine."""
    fake_agent({"GET_CONTAINERS": lambda **_: {"containers": []}})
    best = 9.0
    for _ in range(7):
        began = time.perf_counter()
        assert meso_process("ps").wait(10) == 0
        best = min(best, time.perf_counter() - began)
    assert best <= 1.0
