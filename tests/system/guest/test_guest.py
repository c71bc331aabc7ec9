"""The test bed itself: a guest boots, has what tests of cgroup v2 and of ordinary users need, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.guest, pytest.mark.xdist_group("guest")]

UML = Path(__file__).parent / "uml.py"
IMPORT_ROOT = Path(__file__).resolve().parents[3] / "contrib" / "import-root"


def test_the_guest_has_pure_cgroup_v2_with_the_controllers_that_limits_need(guest: Any) -> None:
    present = guest.run(["cat", "/sys/fs/cgroup/cgroup.controllers"]).check().split()
    mounts = guest.run(["cat", "/proc/self/mounts"]).check()

    assert {"cpu", "memory", "pids"} <= set(present)
    assert " cgroup2 " in mounts
    assert " cgroup " not in mounts


def test_this_interpreter_and_its_packages_run_in_the_guest_for_an_ordinary_user(guest: Any) -> None:
    program = "import trio, msgspec, msgpack, pluggy, mesocosm.kernel.contracts, os; print(os.getuid())"

    finished = guest.run([guest.python, "-c", program], user=1000, env={"PYTHONPATH": str(IMPORT_ROOT)})

    assert finished.check() == "1000\n"


def test_an_ordinary_user_can_limit_and_kill_in_the_delegated_subtree(guest: Any) -> None:
    base = "/sys/fs/cgroup/user-1000"
    script = f"""
        grep -qx 0::/user-1000/shell /proc/self/cgroup && mkdir {base}/probe && echo 20 > {base}/probe/pids.max &&
        cat {base}/probe/pids.max && echo 1 > {base}/probe/cgroup.kill && rmdir {base}/probe"""

    assert guest.run(["sh", "-c", script], user=1000).check() == "20\n"


def test_an_ordinary_user_cannot_make_cgroups_outside_the_delegated_subtree(guest: Any) -> None:
    refused = guest.run(["mkdir", "/sys/fs/cgroup/mine"], user=1000)

    assert refused.status == 1
    assert "Permission denied" in refused.err


def test_a_command_that_takes_too_long_is_killed_and_says_so(guest: Any) -> None:
    finished = guest.run(["sleep", "60"], timeout=0.5)

    assert finished.status is None
    assert "killed after 0.5 s" in finished.err


def test_a_command_that_leaves_a_daemon_behind_is_answered_at_once(guest: Any) -> None:
    finished = guest.run(["sh", "-c", "sleep 5 & echo $!"], timeout=30)

    assert finished.seconds < 4
    guest.run(["kill", finished.check().strip()]).check()


def test_the_guest_cannot_write_to_this_machine(guest: Any, tmp_path: Path) -> None:
    target = IMPORT_ROOT.parent / "written-by-a-guest"

    guest.run(["touch", str(target)]).check()

    assert not target.exists()


@pytest.mark.slow
def test_a_guest_ends_when_the_process_that_booted_it_is_killed(guest: Any, tmp_path: Path) -> None:
    program = f"import sys, time; sys.path.insert(0, {str(UML.parent)!r}); import uml; g = uml.Guest(memory=256)\n"
    program += "print(g._process.pid, flush=True); time.sleep(60)"
    leftovers = {**os.environ, "TMPDIR": str(tmp_path)}  # nobody is left to remove its directory
    booter = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=leftovers)
    assert booter.stdout is not None
    kernel = int(booter.stdout.readline())

    os.kill(booter.pid, signal.SIGKILL)
    booter.communicate()

    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and members_of_session(kernel):
        time.sleep(0.1)
    assert members_of_session(kernel) == []


def members_of_session(session: int) -> list[int]:
    """The living processes of a session: a guest is one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found
