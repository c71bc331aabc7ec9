"""The census finds each kind of leak when one is planted, names it, and finds nothing when nothing is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesocosm.kernel.testing.census import census, left_over

# Asked of whatever machine this is: other programs may do what they like while the tests run, so a test looks for the
# line about its own leak and not for an otherwise empty list.
QUICK = 0.2


@contextlib.contextmanager
def running(*argv: str, env: dict[str, str] | None = None) -> Iterator[int]:
    """A program for the length of a with block; its pid."""
    process = subprocess.Popen(argv, env={"PATH": os.environ["PATH"], **(env or {})}, stdin=subprocess.DEVNULL)
    try:
        # Popen returns in the middle of execve, when the program's environment is not in its place yet.
        while not Path(f"/proc/{process.pid}/environ").read_bytes():
            time.sleep(0.001)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def lines_about(kind: str, lines: list[str]) -> list[str]:
    """The lines of one kind."""
    return [line for line in lines if line[2:].startswith(f"{kind}: ")]


def test_nothing_is_left_over_when_nothing_was_done(tmp_path: Path) -> None:
    before = census(roots=[tmp_path])

    assert lines_about("path", left_over(before)) == []
    assert lines_about("mount", left_over(before)) == []


def test_a_process_that_carries_our_environment_is_found_by_pid_and_name() -> None:
    before = census()

    with running("sleep", "60", env={"MESOCOSM_ID": "planted"}) as pid:
        lines = lines_about("process", left_over(before, seconds=QUICK))

    assert f"+ process: {pid} (sleep), child of {os.getpid()}" in lines


def test_a_process_of_somebody_else_is_not_counted() -> None:
    before = census()

    with running("sleep", "60") as pid:
        lines = lines_about("process", left_over(before, seconds=QUICK))

    assert not [line for line in lines if f" {pid} " in line]


def test_a_descendant_of_a_given_process_is_found_whatever_it_carries() -> None:
    before = census()
    with running("sh", "-c", "sleep 60 & wait") as top:
        children = Path(f"/proc/{top}/task/{top}/children")
        while not (child := children.read_text().strip()) or not became("sleep", int(child)):
            time.sleep(0.01)

        lines = before.difference(census(pids=[top]))
        os.kill(int(child), signal.SIGKILL)

    assert f"+ process: {child} (sleep), child of {top}" in lines


def test_a_process_that_should_have_stayed_is_reported_as_gone() -> None:
    with running("sleep", "60", env={"MESOCOSM_ID": "planted"}) as pid:
        before = census()

    assert [line for line in left_over(before, seconds=QUICK) if line.startswith(f"- process: {pid} (sleep)")]


def test_an_ignored_process_and_all_below_it_do_not_count() -> None:
    with running("sleep", "60", env={"MESOCOSM_ID": "planted"}) as pid:
        lines = census(ignore=[pid]).difference(census())

        assert [line for line in lines if f"+ process: {pid} " in line]
        assert not [line for line in census(ignore=[pid]).things["process"] if line.startswith(f"{pid} ")]


def test_a_new_path_below_a_root_is_found(tmp_path: Path) -> None:
    before = census(roots=[tmp_path])

    (tmp_path / "containers" / "a").mkdir(parents=True)

    assert left_over(before, seconds=QUICK).count(f"+ path: {tmp_path}/containers/a") == 1


def test_a_namespace_is_found_with_the_process_that_holds_it() -> None:
    before = census()

    with running("unshare", "--user", "sleep", "60") as pid:
        if not became("sleep", pid):
            pytest.skip("this machine cannot make user namespaces as this user")
        lines = lines_about("namespace", left_over(before, seconds=QUICK))

    assert [line for line in lines if line.startswith("+ namespace: user:[") and f"held by process {pid} (sleep)" in line]


def became(name: str, pid: int) -> bool:
    """Whether a process has executed the program `name` in time."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return True
        time.sleep(0.01)
    return False


def test_a_second_open_file_of_a_given_process_is_found() -> None:
    program = "import os, sys, time; print(flush=True); sys.stdin.readline(); os.pipe(); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdout.readline()
        before = census(pids=[process.pid])

        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        lines = lines_about("open file", left_over(before, seconds=QUICK))
        process.kill()

    assert lines == [f"+ open file: pipe in process {process.pid}"] * 2


def test_a_shared_memory_segment_is_found() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    before = census()

    segment = libc.shmget(0, 4096, 0o1600)
    try:
        lines = lines_about("System V object", left_over(before, seconds=QUICK))
    finally:
        libc.shmctl(segment, 0, None)

    assert [line for line in lines if line.startswith(f"+ System V object: shm {segment},")]


@pytest.mark.needs_root
def test_a_mount_and_a_network_device_are_found(tmp_path: Path) -> None:
    before = census()

    subprocess.run(["mount", "-t", "tmpfs", "planted", str(tmp_path)], check=True)
    made = subprocess.run(["ip", "link", "add", "mesoplant0", "type", "dummy"], check=False, capture_output=True)
    try:
        lines = left_over(before, seconds=QUICK)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
        if made.returncode == 0:
            subprocess.run(["ip", "link", "del", "mesoplant0"], check=True)

    assert f"+ mount: {tmp_path} (tmpfs planted)" in lines
    assert ("+ network device: mesoplant0" in lines) is (made.returncode == 0)


@pytest.mark.needs_root
def test_a_control_group_is_found() -> None:
    found = [path for path in census().things["cgroup"] if path.endswith(("/pids", "/unified", "/cgroup"))]
    if not found:
        pytest.skip("this machine cannot show a control group hierarchy in the usual place")
    planted = Path(found[0]) / f"census-{os.getpid()}"
    before = census()

    planted.mkdir()
    try:
        lines = left_over(before, seconds=QUICK)
    finally:
        planted.rmdir()

    assert f"+ cgroup: {planted}" in lines


def test_what_goes_away_by_itself_within_the_deadline_is_no_leak(tmp_path: Path) -> None:
    before = census(roots=[tmp_path])
    late = tmp_path / "late"
    late.touch()
    remover = threading.Timer(0.3, late.unlink)

    remover.start()
    lines = left_over(before, seconds=5)
    remover.join()

    assert lines_about("path", lines) == []


def test_groups_of_other_runs_are_told_from_ours_by_their_name() -> None:
    module = sys.modules["mesocosm.kernel.testing.census"]
    foreign = module._foreign("0a1b2c")
    assert foreign is not None
    lines = {"1:cpu:/mesocosm-ffffff/web", "0::/user/mesocosm-123456", "/sys/fs/cgroup/cpu/mesocosm-abcdef"}
    assert all(foreign.search(line) for line in lines)
    ours = {"1:cpu:/mesocosm-0a1b2c/web", "/mesocosm-0a1b2c", "/mesocosm-0a1b2c-agent", "/mesocosm-test-meso1x2", "/system.slice"}
    assert not any(foreign.search(line) for line in ours)
    assert module._foreign(None) is None
