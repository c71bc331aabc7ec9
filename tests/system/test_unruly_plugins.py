"""A plug-in that raises, hangs or talks nonsense in a real agent: its own launch is refused, it is named, nobody notices."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

# An ordinary user's: root's set files are the machine's own, and a test leaves those alone.
pytestmark = [pytest.mark.system, pytest.mark.parametrize("world", ["user"], indirect=True, scope="module")]

ISOLATORS = ["namespaces", "sandbox", "rootfs", "cgroups", "volumes", "unruly", "hardening", "seccomp", "rlimits", "program"]
HELD_UP = 30_000  # ms: ten times what a hook has, and more
AT_ONCE = {  # what is said besides whose it is
    "raises": "plan() of the plug-in unruly: ValueError: no idea",
    "leaves": "plan() of the plug-in unruly: SystemExit: 3",
    "answers text": "plan() of the plug-in unruly: TypeError",
    "refers to itself": "plan() of the plug-in unruly: RecursionError",
    "is huge": "its plan cannot be written down",
    "wants what nobody makes": "no such kind",
    "is undone in no way": "explode",
    "has half a step": "not a step that can be done",
}


@pytest.fixture(scope="module", autouse=True)
def unruly(world: Any) -> Iterator[None]:
    """The plug-in as a distribution in the world's environment, in a set of its own; before the world's agent is started."""
    place, config = world.directory / "target", world.directory / "config" / "mesocosm" / "sets.d"
    info = place / "unruly-0.1.dist-info"
    info.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("unruly.py"), place)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unruly\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[mesocosm.isolators]\nunruly = unruly\n\n[mesocosm.executors]\nunruly = unruly\n")
    config.mkdir(parents=True)
    (config / "unruly.toml").write_text(
        f'[set.wild]\nisolators = {ISOLATORS}\nexecutors = ["default", "command", "unruly"]\nfrontends = ["mesos"]\n'
    )
    before = world.environment
    path = f"{before['PYTHONPATH']}:{place}"
    world.environment = {**before, "PYTHONPATH": path, "XDG_CONFIG_HOME": str(config.parents[1]), "MESOCOSM_SET": "wild"}
    yield
    world.environment = before


def pod(how: str, **more: Any) -> dict[str, Any]:
    """A pod with a well-behaved task on either side of the one with the label."""
    quiet = {"command": "echo ran; sleep 60"}
    return {
        "name": "wild",
        "tasks": [{"name": "a", **quiet}, {"name": "b", **quiet, "labels": {"unruly": how}}, {"name": "c", **quiet}],
        **more,
    }


def assert_refused(canary: Any, answer: Any, before: Any, said: str) -> None:
    """Nothing ran, nothing is left, others have not noticed, and the next launch of the same id is served."""
    error = answer.error
    assert (error["plugin"], error["id"]) == ("unruly", "wild.b"), error
    assert said in json.dumps(error), error
    assert answer.code != 0
    assert not [line for line in answer.lines if line.get("type") in ("committed", "started", "output")]
    world = canary.world
    world.meso("rm", "wild")  # of one that was refused outright there is nothing to forget
    assert left_over(before) == []
    canary.assert_untouched()
    assert world.run({"name": "wild", "tasks": [{"name": "a", "command": "true"}]}).code == 0
    assert world.meso("rm", "wild").code == 0


@pytest.mark.parametrize(("way", "said"), AT_ONCE.items(), ids=AT_ONCE)
def test_a_planner_that_does_not_plan_refuses_its_own_launch(canary: Any, pulse: Any, way: str, said: str) -> None:
    before = canary.census()
    with pulse() as seen:
        answer = canary.world.run(pod(f"plan: {way}"))

    assert_refused(
        canary,
        answer,
        before,
        {"has half a step": '"tmpfs"'}.get(way, "plan" if "what" not in way and "way" not in way else "effect"),
    )
    assert seen.max_ms < HELD_UP


@pytest.mark.parametrize("way", ["sleeps", "spins"])
def test_a_planner_that_holds_up_the_agent_is_stopped_and_named(
    canary: Any, pulse: Any, figure: Callable[..., None], way: str
) -> None:
    before = canary.census()
    with pulse() as seen:
        answer = canary.world.run(pod(f"plan: {way}"))

    assert_refused(canary, answer, before, "plan() of the plug-in unruly: no answer within")
    figure(way=way, max_ms=seen.max_ms)
    assert 1000 < seen.max_ms < HELD_UP, "the agent has one thread: it stood still as long as the plug-in was given"


def test_a_planner_that_hangs_in_the_client_is_the_clients_own_trouble(
    canary: Any, pulse: Any, figure: Callable[..., None]
) -> None:
    world = canary.world
    before = canary.census()
    with pulse() as seen:
        answer = world.meso("plan", "--json", "-", given=json.dumps(pod("plan: sleeps")))

    assert answer.error["plugin"] == "unruly"
    assert "plan()" in answer.error["message"]
    figure(max_ms=seen.max_ms)
    assert left_over(before) == []
    canary.assert_untouched()


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("unruly: hangs", "unknown_outcome", "no answer within 1 s"),
        ("unruly: hangs shielded", "unknown_outcome", "no answer within 1 s"),
        ("unruly: answers text", "internal", "not str"),
        ("unruly: dies", "internal", "ValueError"),
    ],
)
def test_an_effect_that_is_none_rolls_its_own_launch_back(canary: Any, pulse: Any, how: str, code: str, said: str) -> None:
    before = canary.census()
    with pulse() as seen:
        answer = canary.world.run(pod(how))

    assert answer.lines[-1]["state"] == "ROLLED_BACK"
    assert answer.error["code"] == code
    assert (answer.error["step"]["stage"], answer.error["step"]["kind"]) == ("effect", "unruly")
    if "shielded" in how:
        let_go(canary.world)
    assert_refused(canary, answer, before, said)
    assert seen.max_ms < HELD_UP


@pytest.mark.parametrize("how", ["patient: hangs", "patient: hangs shielded"])
def test_a_kill_wins_over_a_launch_that_hangs_in_a_plug_in(canary: Any, how: str) -> None:
    world = canary.world
    before = canary.census()
    client = world.start("run", "--json", "-", stdin=-1)
    client.stdin.write(json.dumps(pod(how)))
    client.stdin.close()
    with client.stdout, client.stderr:
        lines = [json.loads(client.stdout.readline())]
        while lines[-1]["type"] != "admitted":
            lines.append(json.loads(client.stdout.readline()))

        began = time.monotonic()
        kills = [world.meso("kill", victim).code for victim in ("wild.c", "wild", "wild.b")]
        lines += [json.loads(line) for line in client.stdout.read().splitlines()]

    assert kills[0] == 0
    assert set(kills) <= {0, 4}, "taken, or over already"
    assert time.monotonic() - began < 30
    assert (lines[-1]["state"], lines[-1]["error"]["message"]) == ("ROLLED_BACK", "killed during the launch")
    assert client.wait(timeout=30) == 125
    if "shielded" in how:
        let_go(world)
    assert world.meso("rm", "wild").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_an_executor_that_talks_nonsense_ends_nobody(canary: Any) -> None:
    world = canary.world
    before = canary.census()

    ran = world.run({"name": "wild", "executor": "unruly", "tasks": [{"name": "a", "command": "exit 3"}]})
    assert (ran.code, ran.lines[-1]["state"]) == (3, "DEAD"), ran
    assert world.meso("rm", "wild").code == 0

    refused = world.run(
        {"name": "wild", "executor": "unruly", "tasks": [{"name": "a", "command": "true", "labels": {"arrange": "1"}}]}
    )
    assert refused.error["plugin"] == "unruly"
    assert "arrange()" in refused.error["message"]
    assert left_over(before) == []
    canary.assert_untouched()


def let_go(world: Any) -> None:
    """The plug-in is still at it, and its container's id is nobody's until it has been let go."""
    again = {"name": "wild", "tasks": [{"name": "b", "command": "true"}]}
    busy = world.run(again)
    assert (busy.code, busy.error["plugin"]) == (4, "unruly"), busy
    go = world.directory / "state" / "go"
    go.touch()
    deadline = time.monotonic() + 30
    while world.run(again).code != 0:
        assert time.monotonic() < deadline
    go.unlink()


def test_a_directory_of_somebody_elses_outlives_agents_killed_on_their_way_to_it(
    canary: Any, rounds: Callable[[int, int], int]
) -> None:
    """Wherever the agent is killed: what was there before the launch is there after the next agent's recovery."""
    world = canary.world
    place = world.directory / "volume"
    document = {
        "name": "wild", "executor": "command",
        "tasks": [{"name": "wild", "command": "true", "labels": {"unruly": f"claim: {place}"}}],
    }  # fmt: skip
    planned = world.meso("plan", "--json", "-", given=json.dumps(document)).lines[0]["containers"][0]["effects"]
    meets = [effect["kind"] for effect in planned].index("claim")
    place.mkdir()
    (place / "data").write_text("somebody's")

    for moment in range(rounds(meets + 2, 2), meets + 3):  # between the intent (moment 1) and the effect
        assert world.launch_by_one_who_dies(document, moment).code != 0
        assert world.ps()["wild"]["state"] == "DEAD"
        assert (place / "data").read_text() == "somebody's"
        assert world.meso("rm", "wild").code == 0

    assert world.run(document).error["code"] == "conflict"
    assert (place / "data").read_text() == "somebody's"
    shutil.rmtree(place)
    assert world.launch_by_one_who_dies(document, meets + 3).code != 0  # the control: what it has made itself goes
    assert world.ps()["wild"]["state"] == "DEAD"
    assert not place.exists()
    assert world.meso("rm", "wild").code == 0
    canary.assert_untouched()
