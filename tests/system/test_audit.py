"""An audit of a real machine: nothing to say of what is in order, everything that is planted is found, and only what is proven ours
and dead is ever touched."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.linux import devices, procfs
from mesocosm.kernel.linux.probe import run_id
from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system
CLASSES = ("leftover", "missing", "strangers")


def audit(world: Any, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the answer."""
    said = world.meso("audit", "--json", *words)
    [line] = said.lines
    assert "error" not in line, line
    return said.code, line


def findings(answer: Mapping[str, Any]) -> list[str]:
    """All findings of an answer, in words."""
    return [f"{name}: {each['kind']} {each['target']} ({each['note']})" for name in CLASSES for each in answer[name]]


def run_dead(world: Any, name: str) -> None:
    """A container of that name that has ended and is kept."""
    assert world.meso("run", "--name", name, "--", "true").code == 0


def groups(world: Any) -> list[Path]:
    """The directories of this agent's control groups, one in each hierarchy that it uses; none without groups."""
    return [path for point in devices.hierarchies() for path in Path(point).rglob(f"mesocosm-{run_id(str(world.run_dir))}")]


def test_a_world_in_order_has_no_findings(canary: Any) -> None:
    """Pods, what is nested in them, those with a root, volumes and limits, and the dead whose output is kept."""
    world = canary.world
    volume = [{"source": "shared:v", "target": "/v"}, {"source": "tmpfs:1MiB", "target": "/data"}]
    tasks = [
        {"name": "a", "command": "sleep 1000", "volumes": volume, "tasks": [{"name": "deep", "command": "sleep 1000"}]},
        {"name": "b", "command": "sleep 1000", "namespaces": {"pid": "parent"}},
    ]
    if world.uid == 0:
        tasks.append({"name": "c", "command": "sleep 1000", "rootfs": "/", "network": "host"} | {"rootfs": "/"})
        del tasks[-1]["network"]
    assert world.run({"name": "pod", "tasks": tasks}, "-d").code == 0
    assert world.meso("run", "--in", "pod.a", "--name", "more", "-d", "--", "sleep", "1000").code == 0
    run_dead(world, "dead")

    code, answer = audit(world)

    assert findings(answer) == []
    assert code == 0
    words = world.meso("audit")
    assert words.out == "Nothing is left over, nothing is missing, nobody is a stranger.\n"
    for name in ("pod", "dead"):
        world.meso("kill", "-s", "KILL", name)
        world.meso("kill", name)
        world.meso("wait", name)
        assert world.meso("rm", name).code == 0
    assert audit(world)[0] == 0


@pytest.mark.one_world
def test_what_a_dead_launcher_has_left_to_its_keeper_is_in_order(another_world: Any) -> None:
    """Its containers stay below the old keeper, and are the next launcher's by name only."""
    world = another_world
    assert world.meso("run", "-d", "--name", "one", "--", "sleep", "1000").code == 0
    launcher = world.launcher_pid()
    os.kill(launcher, signal.SIGKILL)
    assert world.meso("run", "--", "true").code == 0  # with the next one
    assert world.launcher_pid() != launcher

    code, answer = audit(world)

    assert findings(answer) == []
    assert code == 0
    assert world.ps()["one"]["state"] == "RUNNING"


def test_strangers_are_reported_and_never_touched(canary: Any, garden: Any) -> None:
    """K06. Whatever is called as ours is, or lies where ours lies, and nothing proves it; before and after are equal."""
    world = canary.world
    run_dead(world, "dead")
    containers = world.run_dir / "containers"
    garden.entry(containers / "alien" / "data")
    garden.entry(containers / "not a name")
    garden.entry(containers / "canary.bird" / "planted")
    garden.entry(containers / "dead" / "planted")
    garden.entry(world.run_dir / "mine.txt")
    shutil.copy("/bin/sleep", garden.directory / "meso-keeper")
    garden.process(str(garden.directory / "meso-keeper"), "1000")
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        path = world.run_dir / "planted.sock"
        listener.bind(str(path))
        garden.plant(str(path), lambda: path.stat().st_ino, path.unlink)
        if os.geteuid() == 0:
            for top in groups(world):
                garden.group(top.with_name(f"{top.name}x"))
                ghost = garden.group(top / "ghost")
                garden.process("sleep", "1000", into=ghost)
                if (top / "canary").is_dir() and not (top / "canary" / "cgroup.type").exists():
                    garden.process("sleep", "1000", into=top / "canary" / "bird")  # v1: any group may hold processes
        before = garden.snapshot()

        code, answer = audit(world)
        assert code == 6
        found = {each["target"] for each in answer["strangers"]}
        assert garden.targets <= found, garden.targets - found
        assert [line for line in findings(answer) if not line.startswith("strangers")] == []
        assert garden.snapshot() == before

        code, answer = audit(world, "--repair")
        assert code == 6
        assert garden.targets <= {each["target"] for each in answer["strangers"]}
        assert answer["repaired"] == []
        assert garden.snapshot() == before
        garden.clear()
    assert findings(audit(world)[1]) == []
    assert world.meso("rm", "dead").code == 0
    canary.assert_untouched()


@pytest.mark.needs_root
def test_mounts_and_loop_devices_of_strangers_are_reported_and_never_touched(canary: Any, garden: Any) -> None:
    """Below the run directory, in this mount namespace and in another; a container's directory that is shown from elsewhere."""
    world = canary.world
    containers = world.run_dir / "containers"
    garden.entry(containers / "alien" / "data")
    (containers / "alien" / "mounted").mkdir()
    garden.mount(containers / "alien" / "mounted")
    shown = garden.directory / "shown"
    shown.mkdir()
    subprocess.run(["mount", "--bind", str(containers / "canary.bird" / "sandbox"), str(shown)], check=True)
    garden.plant(str(shown), lambda: shown.is_mount(), lambda: subprocess.run(["umount", str(shown)], check=True))
    hidden = containers / "alien" / "hidden"
    hidden.mkdir()
    script = f"mount -t tmpfs somebody {hidden} && echo mounted && exec sleep 1000"
    child = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "mounted\n"
        before = garden.snapshot()
        there = [mount for mount in procfs.mounts_of(child.pid) if mount.point == str(hidden)]

        code, answer = audit(world, "--repair")

        found = {each["target"] for each in answer["strangers"]}
        assert code == 6
        assert garden.targets <= found, garden.targets - found
        assert [target for target in found if target.startswith(f"{hidden} in mount namespace")] != []
        assert garden.snapshot() == before
        assert [mount for mount in procfs.mounts_of(child.pid) if mount.point == str(hidden)] == there
        assert len(there) == 1
    finally:
        child.kill()
        child.communicate()
    garden.clear()
    assert findings(audit(world)[1]) == []


@pytest.mark.needs_root
def test_a_loop_device_on_a_file_of_ours_is_reported_and_never_touched(canary: Any, garden: Any) -> None:
    world = canary.world
    image = world.run_dir / "containers" / "alien" / "image"
    garden.entry(image, "\0" * 2**20)
    done = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine cannot make loop devices: {done.stderr.strip()}")
    device = done.stdout.strip()
    garden.plant(
        device,
        lambda: [pair for pair in devices.loops() if pair[0] == device],
        lambda: subprocess.run(["losetup", "--detach", device], check=True),
    )
    before = garden.snapshot()

    code, answer = audit(world, "--repair")

    assert code == 6
    assert garden.targets <= {each["target"] for each in answer["strangers"]}
    assert garden.snapshot() == before


@pytest.mark.needs_root
@pytest.mark.one_world
def test_links_and_addresses_that_are_called_as_ours_are_reported(canary: Any, garden: Any) -> None:
    for kind in ("dummy", "ifb", "bridge", "veth"):
        done = subprocess.run(["ip", "link", "add", "mesoplant", "type", kind], capture_output=True, text=True, check=False)
        if not done.returncode:
            break
    else:
        pytest.skip(f"this machine cannot make network devices: {done.stderr.strip()}")
    garden.plant(
        "mesoplant", lambda: "mesoplant" in devices.links(), lambda: subprocess.run(["ip", "link", "del", "mesoplant"], check=True)
    )
    subprocess.run(["ip", "address", "add", "10.254.253.1/30", "dev", "mesoplant"], check=True)
    garden.targets.add("10.254.253.1")
    before = garden.snapshot()

    code, answer = audit(canary.world, "--repair")

    assert code == 6
    assert garden.targets <= {each["target"] for each in answer["strangers"]}
    assert garden.snapshot() == before


ADD_KEY = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
key = libc.syscall(ctypes.c_long(248), b"user", b"mesocosm-planted", b"x", ctypes.c_size_t(1), ctypes.c_int(-4))
print(key, ctypes.get_errno(), flush=True)
sys.stdin.readline()
libc.syscall(ctypes.c_long(250), ctypes.c_int(9), ctypes.c_int(key), ctypes.c_int(-4))  # KEYCTL_UNLINK from the user's keyring
"""


def test_a_key_that_is_called_as_ours_is_reported(canary: Any) -> None:
    world = canary.world
    child = subprocess.Popen(
        world.as_user(world.python, "-c", ADD_KEY), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=world.environment
    )
    try:
        assert child.stdout is not None
        key, errno = map(int, child.stdout.readline().split())
        if key < 0:
            pytest.skip(f"this machine cannot keep keys: {os.strerror(errno)}")

        code, answer = audit(world, "--repair")

        assert code == 6
        keys = [each["target"] for each in answer["strangers"] if each["kind"] == "key"]
        assert keys == [f"{key:08x} (user mesocosm-planted)"]
        assert audit(world)[1]["strangers"] == answer["strangers"]
    finally:
        child.communicate("done\n", timeout=30)
    assert findings(audit(world)[1]) == []


@pytest.mark.needs_root
def test_what_is_proven_ours_and_dead_is_repaired_and_nothing_else(canary: Any, garden: Any) -> None:
    """The positive control: groups of a container that is dead; an empty directory of no container. Somebody who went into one of
    the groups is no less a stranger for that, and his group stays as long as he does."""
    world = canary.world
    run_dead(world, "dead")
    tops = groups(world)
    if not tops:
        pytest.skip("this machine cannot: no control group is delegated to this user")
    (world.run_dir / "containers" / "nobody").mkdir()
    left = []
    for top in tops:
        (top / "dead").mkdir()
        (top / "nobody").mkdir()
        left += [str(top / "dead"), str(top / "nobody")]
    garden.process("sleep", "1000", into=tops[0] / "dead")
    [leaver] = garden.targets
    garden.entry(world.run_dir / "containers" / "alien" / "data")

    code, answer = audit(world)
    assert code == 6
    wanted = {*left, str(world.run_dir / "containers" / "nobody")}
    assert {each["target"] for each in answer["leftover"]} == wanted
    assert {each["ledger"] for each in answer["leftover"]} == {"dead", "nobody"}
    assert all(Path(path).is_dir() for path in left)

    before = garden.snapshot()
    code, answer = audit(world, "--repair")
    stays = str(tops[0] / "dead")
    assert [each["target"] for each in answer["leftover"]] == [stays]
    assert {each["target"] for each in answer["repaired"]} == wanted - {stays}
    assert [path for path in left if os.path.exists(path)] == [stays]
    assert {each["target"] for each in answer["strangers"]} == {leaver, str(world.run_dir / "containers" / "alien")}
    assert code == 6
    assert garden.snapshot() == before
    garden.clear()

    assert audit(world, "--repair")[0] == 0
    assert world.meso("rm", "dead").code == 0
    canary.assert_untouched()


@pytest.mark.needs_root
def test_what_is_parked_is_left_over_until_nothing_is_in_the_way_any_more(canary: Any) -> None:
    world = canary.world
    run_dead(world, "dead")
    directory = world.run_dir / "containers" / "dead"
    (directory / "sandbox" / "held").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "somebody", str(directory / "sandbox" / "held")], check=True)
    try:
        assert world.meso("rm", "dead").code == 0
        _, answer = audit(world, "--repair")
        [found] = answer["leftover"]
        assert (found["target"], found["ledger"]) == (str(directory), "dead")
        assert "EBUSY" in found["note"]
        assert [each["kind"] for each in answer["strangers"]] == ["mount"]
    finally:
        subprocess.run(["umount", str(directory / "sandbox" / "held")], check=True)

    code, answer = audit(world, "--repair")

    assert (code, findings(answer)) == (0, [])
    assert not directory.exists()


def test_what_has_been_taken_from_a_living_container_is_missing(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    task = {"name": "one", "command": "sleep 1000", "kill": {"signal": "KILL"}}
    assert world.run({"name": "one", "executor": "command", "tasks": [task]}, "-d").code == 0
    shutil.rmtree(world.run_dir / "containers" / "one")

    code, answer = audit(world, "--repair")

    assert code == 6
    assert findings(answer) == [f"missing: directory {world.run_dir}/containers/one (one is RUNNING)"]
    assert world.ps()["one"]["state"] == "RUNNING"
    world.meso("kill", "one")
    world.meso("wait", "one")
    assert world.meso("rm", "one").code == 0
    assert left_over(before) == []


@pytest.mark.needs_root
def test_who_enters_a_containers_namespaces_is_a_stranger_there(canary: Any, garden: Any) -> None:
    """A debugger, say. It is told from the container's own processes by its descent."""
    world = canary.world
    pid = canary.pids["canary.bird"]
    words = ["nsenter", "--target", str(pid), *(["--user"] if world.uid else []), "--net", "--uts", "sleep", "1000"]
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 30
        while procfs.namespace_of(child.pid, "uts") != procfs.namespace_of(pid, "uts"):
            assert child.poll() is None, child.stderr.read() if child.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.01)

        code, answer = audit(world, "--repair")

        assert code == 6
        assert [each["target"].partition(" ")[0] for each in answer["strangers"]] == [str(child.pid)]
        assert "and not of its descent" in answer["strangers"][0]["note"]
        assert child.poll() is None
    finally:
        child.kill()
        child.communicate()


def test_an_audit_while_others_launch_and_die_has_no_findings(canary: Any, rounds: Callable[[int, int], int]) -> None:
    world = canary.world
    before = canary.census()
    launching = [world.start("run", "--name", f"busy{number}", "--", "sh", "-c", "sleep 0.05") for number in range(rounds(4, 60))]
    seen = []
    while any(child.poll() is None for child in launching):
        seen += findings(audit(world, "--repair")[1])
    said = [child.communicate()[1] for child in launching]
    assert [words for child, words in zip(launching, said, strict=True) if child.returncode] == []
    assert seen == []
    for number in range(len(launching)):
        assert world.meso("rm", f"busy{number}").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


@pytest.mark.one_world
def test_nobody_waits_for_an_audit_of_many(canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int]) -> None:
    world, count = canary.world, rounds(20, 1_000)
    tasks = [{"name": f"t{number}", "command": "sleep 1000", "kill": {"signal": "KILL"}} for number in range(100)]
    pods = [f"many{number}" for number in range(max(1, count // 100))]
    for name in pods:
        answer = world.meso("run", "-d", "-", given=json.dumps({"name": name, "tasks": tasks[:count]}), timeout=300)
        assert answer.code == 0, answer.err
    audit(world)  # once: what an agent imports for its first one is another matter
    with pulse() as idle:
        time.sleep(1)
    began = time.monotonic()
    with pulse() as seen:
        code, answer = audit(world)
    took = time.monotonic() - began
    figure(
        user=world.user, containers=count, audit_s=round(took, 2), asked=seen.asked,
        p99_ms=seen.p99_ms, max_ms=seen.max_ms, idle_p99_ms=idle.p99_ms, idle_max_ms=idle.max_ms,
    )  # fmt: skip
    for name in pods:
        world.meso("kill", name, timeout=300)
        world.meso("wait", name, timeout=300)
        assert world.meso("rm", name, timeout=300).code == 0
    assert findings(answer) == []
    assert code == 0
    canary.assert_untouched()


def test_what_cannot_be_seen_is_said(canary: Any) -> None:
    """An ordinary user is shown little of others' processes, and the answer says so; root sees them all."""
    world = canary.world
    child = subprocess.Popen(["sleep", "1000"])
    try:
        _, answer = audit(world)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()

    hidden = [note for note in answer["notes"] if "not for this user to see" in note]

    assert bool(hidden) == (world.uid != os.geteuid()), answer["notes"]
