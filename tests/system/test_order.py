"""Who starts before whom, who ends before whom, and kills that meet launches: under load, and from several clients at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system


@contextmanager
def load(world: Any, lives: int) -> Iterator[None]:
    """Others launch and end meanwhile; what they do has to be right as well."""
    told: dict[str, Any] = {"findings": ["the load did not end"]}

    def live() -> None:
        told.update(world.script("lives.py", json.dumps({"lives": lives, "size": 10, "connections": 4}), timeout=60 + lives))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert told["findings"] == []


def task(name: str, command: str, *tasks: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "command": command, "kill": {"signal": "TERM", "grace": "60s"}, "tasks": list(tasks)}


# Says when it began and when it was told to end, in nanoseconds, and takes its time for that.
POLITE = "trap 'date +%s%N; sleep 0.1; date +%s%N; exit 0' TERM; date +%s%N; while :; do sleep 0.01; done"


def times(world: Any, name: str, count: int) -> list[int]:
    """The times that a container has printed, once there are so many."""
    deadline = time.monotonic() + 60
    path = world.run_dir / "containers" / name / "stdout"
    while len(lines := path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"{name} has said only {lines}"
        time.sleep(0.01)
    return [int(line) for line in lines]


def test_parents_start_first_and_end_last_while_others_launch_and_end(
    canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int]
) -> None:
    world, deep = canary.world, ["deep", "deep.a", "deep.a.b", "deep.a.b.c"]
    before = canary.census()
    pod = {"name": "deep", "tasks": [task("a", POLITE, task("b", POLITE, task("c", POLITE)))]}
    with pulse() as seen, load(world, rounds(200, 4_000)):
        for _ in range(rounds(2, 40)):
            following = world.start("run", "--json", "-", stdin=-1)
            following.stdin.write(json.dumps(pod))
            following.stdin.close()
            following.stdin = None
            lines = []
            while not lines or lines[-1]["type"] != "committed":
                lines.append(json.loads(following.stdout.readline()))
            for name in deep[1:]:
                times(world, name, 1)

            assert world.meso("kill", "deep").code == 0

            lines += map(json.loads, following.stdout)
            assert following.communicate(timeout=90) == ("", "")
            assert following.returncode == 0
            told = {kind: [line["id"] for line in lines if line["type"] == kind] for kind in ("staged", "exited", "dead")}
            assert told == {"staged": deep, "exited": deep[::-1], "dead": deep[::-1]}
            kinds = [line["type"] for line in lines]
            assert max(at for at, kind in enumerate(kinds) if kind == "staged") < kinds.index("committed")
            assert min(at for at, kind in enumerate(kinds) if kind == "started") > kinds.index("committed")
            a, b, c = (times(world, name, 3) for name in deep[1:])
            # Nobody is told to end before all that is in it has ended; and nobody has begun before the decision.
            assert c[2] < b[1] < b[2] < a[1]
            committed = next(line["time"] for line in lines if line["type"] == "committed")
            assert min(a[0], b[0], c[0]) / 1e9 > committed
            assert world.meso("rm", "deep").code == 0
    assert left_over(before) == []
    canary.assert_untouched()
    figure(rounds=rounds(2, 40), **vars(seen))


def test_a_pod_that_several_clients_kill_on_its_way_up_either_never_was_or_is_gone(
    canary: Any, pulse: Any, figure: Any, rounds: Callable[[int, int], int]
) -> None:
    world = canary.world
    before = canary.census()

    with pulse() as seen, load(world, rounds(100, 2_000)):
        told = world.script("kills.py", json.dumps({"pods": rounds(30, 1_000), "members": 5, "killers": 4}), timeout=600)

    assert told.pop("findings") == []
    assert told["rolled_back"] > 0
    assert left_over(before) == []
    canary.assert_untouched()
    figure(pods=rounds(30, 1_000), **told, **vars(seen))


DEAF = "trap '' TERM; echo ready; while :; do sleep 0.01; done"


def deaf_pod(world: Any) -> None:
    """A pod of three that ignore SIGTERM, with a minute of grace each, all of them up."""
    pod = {"name": "deaf", "tasks": [task(name, DEAF) for name in ("a", "b", "c")]}
    assert world.run(pod, "-d").code == 0
    deadline = time.monotonic() + 60
    while any((world.run_dir / f"containers/deaf.{name}/stdout").stat().st_size == 0 for name in "abc"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_kill_after_a_kill_is_never_ignored(canary: Any) -> None:
    """While the first is being patient: one by force ends one member, by force on the pod all."""
    world = canary.world
    before = canary.census()
    deaf_pod(world)
    began = time.monotonic()
    for _ in range(3):
        assert world.meso("kill", "deaf").code == 0

    assert world.meso("kill", "-s", "KILL", "deaf.b").code == 0
    assert world.meso("wait", "deaf.b").code == 137
    states = {name: line["state"] for name, line in world.ps().items() if name.startswith("deaf.")}
    assert states == {"deaf.a": "STOPPING", "deaf.b": "DEAD", "deaf.c": "STOPPING"}

    assert world.meso("kill", "-s", "KILL", "deaf").code == 0
    world.meso("wait", "deaf")
    assert time.monotonic() - began < 50  # a minute's grace is not over
    waits = {name: line["wait"]["signal"] for name, line in world.ps().items() if name.startswith("deaf")}
    assert waits == dict.fromkeys(["deaf", "deaf.a", "deaf.b", "deaf.c"], 9)
    assert world.meso("rm", "deaf").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_every_signal_of_every_client_arrives(canary: Any, rounds: Callable[[int, int], int]) -> None:
    """Asked one after the other, each is seen by the program before the next is sent: the kernel would merge equal ones."""
    world, count = canary.world, rounds(6, 100)
    before = canary.census()
    counting = "trap 'echo hit' USR1; trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    assert world.meso("run", "-d", "--name", "target", "--", "sh", "-c", counting).code == 0
    path = world.run_dir / "containers/target/stdout"
    deadline = time.monotonic() + 120

    for number in range(count):
        while path.read_text().count("\n") < number + 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert world.meso("kill", "-s", "USR1", "target").code == 0
    while path.read_text().count("hit") < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)

    assert world.meso("kill", "target").code == 0
    assert world.meso("wait", "target").code == 5
    assert path.read_text() == "ready\n" + "hit\n" * count + "bye\n"
    assert world.meso("rm", "target").code == 0
    assert left_over(before) == []
    canary.assert_untouched()
