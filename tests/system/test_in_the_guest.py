"""The whole system ring again in a guest that has cgroup v2 and nothing else, as root and as an ordinary user with a
delegated subtree; on a kernel four years older than most."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.guest, pytest.mark.slow]
REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_guest_has_cgroup_v2_only(guest: Any) -> None:
    mounts = guest.run(["cat", "/proc/mounts"]).check()

    assert " cgroup2 " in mounts
    assert " cgroup " not in mounts


# What does not depend on the kernel is tested once, outside: a guest takes three times as long for everything.
ELSEWHERE = ("test_bad_input.py", "test_hostile_clients.py", "test_mesos_group.py", "test_plugin_template.py")


def test_the_system_ring_passes_in_the_guest(guest: Any) -> None:
    """Output is shown when it fails; a skip in there must name what the guest lacks, as everywhere."""
    command = [
        sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "system and not guest", "tests/system",
        "-rs", "--durations=10", *(f"--ignore=tests/system/{name}" for name in ELSEWHERE),
    ]  # fmt: skip

    answer = guest.run(command, cwd=str(REPOSITORY), timeout=900)

    out = answer.check()
    print(out[-3000:])
    assert " passed" in out
    assert " failed" not in out
    reasons = [line for line in out.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in reasons if "this machine cannot" not in line] == []
