"""What cannot be ended or undone now: it is shown with who holds it, in nobody's way, and ends by itself when it is let go of."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system
SERVER = Path(__file__).with_name("fuse_server.py")
TELLS_SERVERS = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 18)  # fdinfo of /dev/fuse names the connection
TRACER = """
import ctypes, os, signal, sys
libc, pid = ctypes.CDLL(None, use_errno=True), int(sys.argv[1])
assert libc.ptrace(16, pid, None, None) == 0, os.strerror(ctypes.get_errno())
os.waitpid(pid, 0x40000000)
print("ready", flush=True)
signal.pause()
"""


def until(done: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `done` answers once that is something."""
    deadline = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
    return found


class Served:
    """A directory with a file system that does not answer for the file `stuck`, until it is told to."""

    def __init__(self, point: Path) -> None:
        self.point = point
        point.mkdir()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.child = subprocess.Popen(
            [sys.executable, "-B", str(SERVER), str(point)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.child.stdout is not None
        assert self.child.stdout.readline() == "ready\n"

    def wait_until_asked(self) -> None:
        """Returns when somebody waits for an answer."""
        assert self.child.stdout is not None
        assert select.select([self.child.stdout], [], [], 30)[0], "nobody has asked"
        assert self.child.stdout.readline() == "asked\n"

    def speak(self) -> None:
        """Answers all that is owed, and everything from now on."""
        self.child.send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """Whoever waits gets an error."""
        if not self.point.exists():
            return
        subprocess.run(["umount", "-l", str(self.point)], check=False, capture_output=True)
        self.child.kill()
        self.child.communicate()
        self.point.rmdir()


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Served]]:
    """``serve(point)`` mounts such a file system there."""
    if os.geteuid() or not os.path.exists("/dev/fuse"):
        pytest.skip("this machine cannot serve a file system: that needs root and /dev/fuse")
    with contextlib.ExitStack() as stack:

        def mount(point: Path) -> Served:
            served = Served(point)
            stack.callback(served.close)
            return served

        yield mount


def reader(served: Served) -> dict[str, Any]:
    """A pod with a member that reads what is not answered for, and another that does not."""
    volume = {"source": f"host:{served.point}", "target": "/mnt"}
    return {
        "name": "deep",
        "tasks": [
            {"name": "reader", "command": ["/bin/cat", "/mnt/stuck"], "volumes": [volume]},
            {"name": "other", "command": ["/bin/sleep", "1000"]},
        ],
    }


def note_of(world: Any, container_id: str) -> str:
    """What `ps` says of what is left of a container, or keeps it from ending."""
    return " ".join(world.ps().get(container_id, {}).get("parked", ()))


def killed_and_stuck(world: Any, container_id: str = "deep.reader") -> str:
    """The words of `ps`, once it has been killed in vain."""
    assert world.meso("kill", "-s", "KILL", container_id).code == 0
    assert world.meso("kill", container_id.partition(".")[0]).code == 0
    return str(until(lambda: note_of(world, container_id)))


@pytest.mark.needs_root  # to mount it where the agent sees it
def test_a_program_that_waits_for_a_silent_file_system_is_named_and_holds_up_nobody_else(
    world: Any, canary: Any, pulse: Any, serve: Any, figure: Any
) -> None:
    before = canary.census()
    served = serve(world.directory / "served")
    assert world.run(reader(served), "-d").code == 0
    pid = world.ps()["deep.reader"]["pid"]
    served.wait_until_asked()

    with pulse() as seen:
        note = killed_and_stuck(world)
        lines = world.ps()
        assert f"pid {pid} (cat), unkillable in" in note
        assert "(D) on /mnt" in note
        assert lines["deep.reader"]["state"] == "DESTROYING"
        assert lines["deep.other"]["state"] == "DEAD"
        assert "unkillable in" in world.meso("ps").out
        assert note in world.meso("explain", "--json", "deep.reader").lines[0]["parked"]
        assert world.meso("wait", "--timeout", "1", "deep.reader").code == 124
        assert world.meso("kill", "deep").code == 0, "again"
        assert world.run({"name": "late", "tasks": [{"name": "a", "command": ["/bin/true"]}]}).code == 0
        assert world.meso("rm", "late").code == 0
    canary.assert_untouched()
    figure(user=world.user, p99_ms=seen.p99_ms, max_ms=seen.max_ms)
    assert seen.max_ms < 5000

    served.speak()
    wait = world.meso("wait", "--json", "deep.reader").lines[0]
    assert (wait["signal"], wait["reason"]) == (9, "killed")
    until(lambda: world.ps()["deep"]["state"] == "DEAD")
    assert note_of(world, "deep.reader") == ""
    assert world.meso("rm", "deep").code == 0
    served.close()
    assert left_over(before) == []


@pytest.mark.needs_root  # to mount it where the agent sees it
def test_a_volume_on_a_silent_file_system_refuses_its_own_launch_and_names_who_serves_it(
    world: Any, canary: Any, pulse: Any, serve: Any
) -> None:
    served = serve(world.directory / "served")
    volume = {"source": f"host:{served.point}/stuck", "target": "/mnt"}
    pod = {"name": "dumb", "tasks": [{"name": "a", "command": ["/bin/true"], "volumes": [volume]}]}
    before = canary.census()

    with pulse() as seen:
        answer = world.run(pod)
    assert answer.code == 125
    assert (answer.error["errno"], answer.error["target"]) == ("ETIMEDOUT", f"{served.point}/stuck")
    assert f"pid {served.child.pid} (python" in answer.error["have"] or not TELLS_SERVERS
    assert f"fuse is mounted at {served.point}" in answer.error["have"]
    assert seen.max_ms < 5000
    canary.assert_untouched()

    served.speak()
    answer = world.run(pod)
    assert "does not answer" not in answer.out, "a control: it is waited for, and is what it is"
    assert answer.code in (0, 125)
    assert world.meso("rm", "dumb").code == 0
    assert left_over(before) == []


@pytest.mark.needs_root  # to mount it where the agent sees it
def test_a_program_on_a_silent_file_system_refuses_its_own_launch_and_keeps_no_agent_from_dying(
    world: Any, canary: Any, pulse: Any, serve: Any, kill_agent: Any
) -> None:
    """It could be found and asked about; that it is not read is found out before anybody's program runs."""
    served = serve(world.directory / "served")
    volume = {"source": f"host:{served.point}", "target": "/mnt"}
    pod = {"name": "mute", "tasks": [{"name": "a", "command": ["/mnt/mute"], "volumes": [volume]}]}

    with pulse() as seen:
        launching = world.start("run", "--json", "-", stdin=subprocess.PIPE)
        launching.stdin.write(json.dumps(pod))
        launching.stdin.close()
        served.wait_until_asked()
        assert world.run({"name": "late", "tasks": [{"name": "a", "command": ["/bin/true"]}]}).code == 0, "nobody else waits"
        assert world.meso("rm", "late").code == 0
        assert launching.wait(60) == 126, "nothing ran"
    said = json.loads(launching.stdout.read().splitlines()[-1])["error"]
    assert (said["code"], said["target"], said["id"]) == ("launch_failed", "/mnt/mute", "mute.a")
    assert "does not answer" in said["hint"]
    assert seen.max_ms < 5000

    kill_agent(world)  # whatever still tries to read it, has nothing of the agent's
    assert world.ps()["mute"]["state"] == "DEAD"
    canary.assert_untouched()
    before = canary.census()
    served.speak()
    answer = world.run(pod)
    assert "could not be read" not in answer.out, "a control"
    assert world.meso("rm", "mute").code == 0
    served.close()
    assert [line for line in left_over(before) if line.startswith("+")] == []


@pytest.mark.needs_root  # to mount it where the agent sees it
def test_what_a_silent_file_system_is_mounted_on_is_parked_retried_and_in_nobodys_way(
    world: Any, canary: Any, pulse: Any, serve: Any
) -> None:
    before = canary.census()
    pod = {"name": "below", "tasks": [{"name": "a", "command": ["/bin/true"]}, {"name": "b", "command": ["/bin/true"]}]}
    assert world.run(pod).code == 0
    sandbox = world.run_dir / "containers/below.a/sandbox"
    served = serve(sandbox / "served")
    served.child.send_signal(signal.SIGSTOP)

    with pulse() as seen:
        assert world.meso("rm", "below").code == 0
        note = note_of(world, "below.a")
        assert f"fuse is mounted at {served.point}" in note
        assert not TELLS_SERVERS or f"pid {served.child.pid} (python" in note
        assert not TELLS_SERVERS or "stopped (T)" in note
        assert not (world.run_dir / "containers/below.b").exists(), "what is beside it has gone"
        refused = world.run(pod)
        assert refused.code == 4
        assert f"fuse is mounted at {served.point}" in refused.error["have"]
        alone = {"name": "below", "tasks": [{"name": "b", "command": ["/bin/true"]}]}
        assert world.run(alone).code == 0, "the same name, without the very thing that is in the way"
        assert world.meso("rm", "below").code == 0
    assert seen.max_ms < 5000
    canary.assert_untouched()

    subprocess.run(["umount", "-l", str(served.point)], check=True)
    until(lambda: not note_of(world, "below.a"))
    assert not sandbox.exists()
    served.child.send_signal(signal.SIGCONT)
    served.child.kill()
    served.child.communicate()
    assert left_over(before) == []


def sleeper(world: Any) -> int:
    """The pid of a container that sleeps."""
    assert world.run({"name": "deep", "tasks": [{"name": "reader", "command": ["/bin/sleep", "1000"]}]}, "-d").code == 0
    return int(world.ps()["deep.reader"]["pid"])


def test_a_stopped_container_is_killed_like_any_other(world: Any, canary: Any) -> None:
    before = canary.census()
    os.kill(sleeper(world), signal.SIGSTOP)
    assert world.meso("kill", "deep").code == 0
    assert world.meso("wait", "--timeout", "60", "deep").code != 124
    assert note_of(world, "deep.reader") == ""
    assert world.meso("rm", "deep").code == 0
    assert left_over(before) == []


def test_a_container_that_somebody_has_frozen_says_which_group_did_it(world: Any, canary: Any) -> None:
    freezer = Path("/sys/fs/cgroup/freezer")
    if os.geteuid() or not freezer.is_mount():
        pytest.skip("this machine cannot freeze: that needs root and the freezer of cgroup v1 (of v2's a kill takes no notice)")
    before = canary.census()
    group = freezer / "strangers"
    group.mkdir()
    try:
        pid = sleeper(world)
        (group / "cgroup.procs").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        note = killed_and_stuck(world)
        assert f"frozen by {group}" in note
        assert (group / "freezer.state").read_text().strip() != "THAWED", "a stranger's group is named and left alone"
        (group / "freezer.state").write_text("THAWED")
        assert world.meso("wait", "--timeout", "60", "deep").code != 124
        assert world.meso("rm", "deep").code == 0
    finally:
        (group / "freezer.state").write_text("THAWED")
        group.rmdir()
    assert left_over(before) == []


@pytest.mark.one_world
def test_a_container_whose_tracer_does_not_let_go_of_it_names_the_tracer(world: Any, canary: Any) -> None:
    if os.geteuid():
        pytest.skip("this machine cannot trace an unreadable process as an ordinary user")
    before = canary.census()
    pid = sleeper(world)
    tracer = subprocess.Popen([sys.executable, "-c", TRACER, str(pid)], stdout=subprocess.PIPE, text=True)
    try:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "ready\n"
        tracer.send_signal(signal.SIGSTOP)
        note = killed_and_stuck(world)
        if world.uid == 0:
            assert f"its tracer, pid {tracer.pid} (python" in note
    finally:
        tracer.kill()
        tracer.communicate()
    assert world.meso("wait", "--timeout", "60", "deep").code != 124
    assert world.meso("rm", "deep").code == 0
    assert left_over(before) == []
