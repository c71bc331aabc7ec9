"""The whole system ring again in a guest that has cgroup v2 and nothing else, as root and as an ordinary user with a
delegated subtree; on a kernel four years older than most."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
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
ELSEWHERE = {
    "test_bad_input.py", "test_error_page.py", "test_followers.py", "test_full_disk.py", "test_log_budgets.py",
    "test_mesos_group.py", "test_order.py", "test_plugin_template.py", "test_power_cut.py", "test_short_lives.py",
    "test_socket_bytes.py", "test_socket_floods.py", "test_socket_pods.py", "test_socket_races.py", "test_socket_silence.py",
    "test_socket_values.py", "test_staying.py", "test_unruly_plugins.py", "test_write_errors.py", Path(__file__).name,
}  # fmt: skip
# What hardly depends on it, and takes minutes in there: in `make long` only.
LATER = {
    "test_cancelled.py", "test_damaged_state.py", "test_every_call.py", "test_example_app_and_metrics.py",
    "test_example_postgres_dump.py", "test_example_queue_and_workers.py", "test_example_web_and_log_shipper.py",
    "test_history.py", "test_large_numbers.py", "test_launch_descriptors.py", "test_launch_environment.py",
    "test_launch_newborn.py", "test_launch_rootfs.py", "test_launch_swaps.py", "test_launcher_upgraded.py",
    "test_machine_limits.py", "test_orphans.py", "test_socket_ancillary.py", "test_socket_peers.py", "test_verbs.py",
}  # fmt: skip
# Of these not all: the rest is more of the same, or again in soak.
CHOSEN = {
    "test_every_fault.py": "not ten and not abc and not table",
    "test_audit.py": "in_order or strangers_are or proven",
}
IS_LONG = os.environ.get("MESOCOSM_SOAK") == "1"
RING = sorted(
    path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in (ELSEWHERE if IS_LONG else ELSEWHERE | LATER)
)


@pytest.mark.parametrize("name", RING)
def test_the_system_ring_passes_in_the_guest(guests: dict[str, Any], name: str) -> None:
    """Output is shown when it fails; a skip in there must name what the guest lacks, as everywhere."""
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "-m", "system and not guest"]
    if name in CHOSEN and not IS_LONG:
        command += ["-k", CHOSEN[name]]

    def run_as(kind: str) -> Any:
        ring = [*command, f"tests/system/{name}"]
        return guests[kind].run(ring, cwd=str(REPOSITORY), env={"MESOCOSM_TEST_WORLDS": kind}, timeout=900)

    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(run_as, guests))

    out = "".join(answer.check() for answer in answers)
    reasons = [line for line in out.splitlines() if line.startswith("SKIPPED")]
    if lacking := [line for line in reasons if "apt-get install" in line]:
        pytest.skip(lacking[0].partition(": ")[2])  # the guest has the programs of this machine
    assert " passed" in out
    assert [line for line in reasons if "this machine cannot" not in line] == []
