"""What a program leaves behind: orphans by the thousand, zombies, and those who forked twice and hold its output open."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system


def leaving(count: int, what: str) -> str:
    """A program that forks twice, `count` times over: what it leaves has no parent but a process 1. It ends with 3 when told to."""
    forks = f"i=0; while [ $i -lt {count} ]; do (setsid {what} &); i=$((i + 1)); done; echo left"
    return f"trap 'exit 3' USR1; {forks}; while :; do sleep 0.01; done"


def below(top: int) -> dict[int, str]:
    """The processes that descend from one, and the state of each; Z is a zombie."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                table[int(entry.name)] = state, int(parent)
    found, grown = {top}, True
    while grown:
        more = {pid for pid, (_, parent) in table.items() if parent in found} - found
        grown = bool(more)
        found |= more
    return {pid: table[pid][0] for pid in found if pid != top}


def until_left(world: Any, name: str) -> None:
    """Waits until a container of `leaving` has left them all."""
    deadline = time.monotonic() + 90
    while "left" not in (world.run_dir / f"containers/{name}/stdout").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_groups(world: Any) -> bool:
    """Whether `doctor` says that containers have control groups here."""
    return any(line["check"] == "cgroups" and line["ok"] for line in world.meso("doctor", "--json").lines)


def among(namespace: str) -> dict[str, str]:
    """Where the processes are. An ordinary user cannot show the host's in a mount tree of its own."""
    return {"pid": "host", "mount": "host"} if namespace == "host" else {"pid": namespace}


def family(namespace: str, count: int) -> dict[str, Any]:
    """A pod of one that leaves orphans among the processes of `namespace`, and one that goes on."""
    mother = {"name": "mother", "command": leaving(count, "sleep 1000"), "namespaces": among(namespace), "essential": False}
    return {"name": "pod", "tasks": [mother, {"name": "other", "command": "sleep 1000", "kill": {"signal": "KILL"}}]}


@pytest.mark.parametrize("namespace", ["own", "parent", "host"])
def test_a_thousand_orphans_end_with_the_member_that_left_them_while_the_others_go_on(
    canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int], namespace: str
) -> None:
    """With processes of its own the kernel kills them with process 1; else they are found by its control group."""
    world, count = canary.world, rounds(150, 1_000)
    if namespace != "own" and not has_groups(world):
        pytest.skip("this machine cannot: no control group is delegated to this user")
    before = canary.census()
    with pulse() as seen:
        assert world.run(family(namespace, count), "-d").code == 0
        until_left(world, "pod.mother")
        alive = len(below(world.launcher_pid()))
        began = time.monotonic()
        assert world.meso("kill", "-s", "USR1", "pod.mother").code == 0

        assert world.meso("wait", "pod.mother").code == 3

        took, after = time.monotonic() - began, len(below(world.launcher_pid()))
    assert alive > count  # the control: all of them were there
    assert after < 50
    assert world.ps()["pod.other"]["state"] == "RUNNING"
    world.meso("kill", "pod")
    world.meso("wait", "pod")
    assert world.meso("rm", "pod").code == 0
    assert left_over(before) == []
    canary.assert_untouched()
    figure(namespace=namespace, orphans=count, end_s=round(took, 2), **vars(seen))


def test_without_groups_orphans_among_a_pods_processes_end_with_the_pod(canary: Any, rounds: Callable[[int, int], int]) -> None:
    world = canary.world
    if has_groups(world):
        pytest.skip("this machine cannot show it: this user has control groups")
    before = canary.census()
    assert world.run(family("parent", rounds(150, 1_000)), "-d").code == 0
    until_left(world, "pod.mother")

    world.meso("kill", "pod")
    world.meso("wait", "pod")

    assert world.meso("rm", "pod").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_without_groups_nobody_is_among_the_hosts_processes(canary: Any) -> None:
    world = canary.world
    if has_groups(world):
        pytest.skip("this machine cannot show it: this user has control groups")
    before = canary.census()

    answer = world.run(family("host", 2))

    assert answer.code == 2
    assert answer.error["path"] == "$.tasks[0].namespaces.pid"
    assert left_over(before) == []
    canary.assert_untouched()


@pytest.mark.parametrize("namespace", ["own", "host"])
def test_who_forks_twice_and_keeps_the_output_open_says_no_more_after_the_end(canary: Any, namespace: str) -> None:
    """Its output is complete when it is dead: a follower gets an end, and nothing comes later."""
    world = canary.world
    if namespace == "host" and not has_groups(world):
        pytest.skip("this machine cannot: no control group is delegated to this user")
    before = canary.census()
    stubborn = "trap '' HUP INT TERM; while :; do echo late; sleep 0.01; done"
    task = {"name": "one", "command": f"(setsid sh -c '{stubborn.replace(chr(39), chr(34))}' &); sleep 0.3; exit 3"}
    pod = {"name": "one", "executor": "command", "tasks": [task | {"namespaces": among(namespace)}]}
    assert world.run(pod, "-d").code == 0
    following = world.start("logs", "-f", "one")

    assert world.meso("wait", "one").code == 3

    log = world.run_dir / "containers/one/stdout"
    size = log.stat().st_size
    out, err = following.communicate(timeout=60)
    assert (following.returncode, err) == (0, "")
    assert size > 0  # the control: it was writing
    assert out == log.read_text()
    assert log.stat().st_size == size
    assert world.meso("rm", "one").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_zombies_that_a_program_never_reaps_are_gone_with_it(
    canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int]
) -> None:
    """Their parent is process 1 of their container, which has become a program that waits for nobody."""
    world, count = canary.world, rounds(150, 1_000)
    before = canary.census()
    command = f"i=0; while [ $i -lt {count} ]; do (sleep 1000 &); i=$((i + 1)); done; echo left; exec sleep 1000"
    with pulse() as seen:
        task = {"name": "one", "command": command, "kill": {"signal": "KILL"}}
        assert world.run({"name": "one", "executor": "command", "tasks": [task]}, "-d").code == 0
        until_left(world, "one")
        first = world.ps()["one"]["pid"]
        orphans = below(first)
        for pid in orphans:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while set(below(first).values()) != {"Z"}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        zombies = len(below(first))
        assert world.meso("kill", "one").code == 0
        assert world.meso("wait", "one").code == 137
    assert zombies == len(orphans) == count
    assert world.meso("rm", "one").code == 0
    assert left_over(before) == []
    canary.assert_untouched()
    figure(zombies=count, **vars(seen))
