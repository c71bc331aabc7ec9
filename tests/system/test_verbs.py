"""The verbs of somebody who watches over containers: logs, events, wait, rm, interrupting a run, asking twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system


@pytest.fixture
def sleeper(world: Any) -> Any:
    """The id of a container that sleeps until it is told not to."""
    assert world.meso("run", "-d", "--name", "sleeper", "--", "sleep", "60").code == 0
    yield "sleeper"
    world.meso("kill", "-s", "KILL", "sleeper")
    world.meso("wait", "sleeper")
    world.meso("rm", "sleeper")


def until(condition: Any, what: str) -> None:
    """Waits for what another process is about to do."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_logs_follow_to_the_end_and_no_further(world: Any) -> None:
    talk = "for word in one two three; do echo $word; sleep 0.2; done; echo last >&2"
    world.meso("run", "-d", "--name", "talker", "--", "sh", "-c", talk)

    answer = world.meso("logs", "-f", "talker")

    assert answer.code == 0
    assert answer.out == "one\ntwo\nthree\n"
    assert answer.err == "last\n"
    assert world.meso("rm", "talker").code == 0


def test_logs_that_follow_show_a_line_while_its_writer_lives(world: Any) -> None:
    world.meso("run", "-d", "--name", "talker", "--", "sh", "-c", "echo early; sleep 60")
    following = world.start("logs", "-f", "talker")

    assert following.stdout.readline() == "early\n"

    world.meso("kill", "-s", "KILL", "talker")
    assert following.communicate(timeout=30)[0] == ""
    assert following.returncode == 0
    world.meso("wait", "talker")
    world.meso("rm", "talker")


def test_events_since_a_number_begin_behind_it(world: Any) -> None:
    lines = world.meso("run", "--json", "--name", "one", "--", "true").lines
    middle = lines[len(lines) // 2]["seq"]
    watching = world.start("events", "--json", "--since", str(middle))

    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(iter(watching.stdout.readline, "")))
    reader.start()
    until(lambda: any('"end"' in line for line in seen), "the event lines of the run")
    watching.terminate()
    reader.join()
    watching.communicate(timeout=30)

    told = [json.loads(line) for line in seen]
    assert [line["seq"] for line in told] == list(range(middle + 1, told[-1]["seq"] + 1))
    assert told[: len(lines) - len(lines) // 2 - 1] == [line for line in lines if line["seq"] > middle and line["type"] != "output"]
    world.meso("rm", "one")


def test_waiting_no_longer_than_its_timeout_ends_with_124_and_ends_nothing(world: Any, sleeper: str) -> None:
    started = time.monotonic()

    assert world.meso("wait", "--timeout", "300ms", sleeper).code == 124

    assert 0.3 <= time.monotonic() - started < 20
    assert world.ps()[sleeper]["state"] == "RUNNING"


def test_what_runs_cannot_be_removed(world: Any, sleeper: str) -> None:
    answer = world.meso("rm", "--json", sleeper)

    assert answer.code == 4
    assert answer.error["code"] == "conflict"
    assert answer.error["id"] == sleeper
    assert world.ps()[sleeper]["state"] == "RUNNING"


def test_a_name_that_is_taken_is_refused_and_the_one_that_has_it_goes_on(world: Any, sleeper: str) -> None:
    pid = world.ps()[sleeper]["pid"]

    answer = world.meso("run", "--json", "--name", sleeper, "--", "true")

    assert answer.code == 4
    assert answer.error["code"] == "conflict"
    assert world.ps()[sleeper]["pid"] == pid


def test_of_two_launches_at_once_with_one_name_one_wins(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    both = [world.start("run", "--json", "-d", "--name", "same", "--", "sleep", "60") for _ in range(2)]

    for child in both:
        child.communicate(timeout=60)

    assert sorted(child.returncode for child in both) == [0, 4]
    assert world.ps()["same"]["state"] == "RUNNING"
    world.meso("kill", "-s", "KILL", "same")
    world.meso("wait", "same")
    assert world.meso("rm", "same").code == 0
    assert left_over(before) == []


def test_an_unknown_id_is_not_found(world: Any) -> None:
    for verb in ("kill", "wait", "rm", "logs", "explain"):
        assert world.meso(verb, "nobody").code == 3, verb


# The time that a program takes to end well after it was asked to.
POLITE = "trap 'sleep 0.3; echo bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done"


def read_until(running: Any, *, ready: int) -> None:
    """Reads event lines until that many members have said that they are ready."""
    while ready:
        line = running.stdout.readline()
        assert line, "the run ended early"
        event = json.loads(line)
        ready -= event["type"] == "output" and event["data"] == "ready\n"


def test_interrupting_a_run_ends_the_group_by_its_policy_and_leaves_nothing(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    pod = Path(world.directory) / "pod.toml"
    tasks = [f'[[tasks]]\nname = "{name}"\ncommand = """{POLITE}"""\n' for name in ("a", "b")]
    pod.write_text('name = "pod"\n' + "".join(tasks))
    running = world.start("run", "--json", str(pod))
    read_until(running, ready=2)

    running.send_signal(signal.SIGINT)

    out, err = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGINT, err
    outputs = [line for line in map(json.loads, out.splitlines()) if line["type"] == "output"]
    assert sorted((line["id"], line["data"]) for line in outputs) == [("pod.a", "bye\n"), ("pod.b", "bye\n")]
    states = {name: line["state"] for name, line in world.ps().items() if name.startswith("pod")}
    assert states == dict.fromkeys(["pod", "pod.a", "pod.b"], "DEAD")
    assert world.meso("rm", "pod").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_a_run_that_is_interrupted_twice_does_not_wait_for_the_stubborn(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    running = world.start("run", "--json", "--name", "deaf", "--", "sh", "-c", "trap '' TERM; echo ready; sleep 60; sleep 60")
    read_until(running, ready=1)

    started = time.monotonic()
    running.send_signal(signal.SIGINT)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)

    assert time.monotonic() - started < 3  # by its policy it would have had longer
    assert running.returncode == 128 + signal.SIGKILL  # the program's own
    assert world.meso("rm", "deaf").code == 0
    assert left_over(before) == []


@pytest.fixture
def house(world: Any) -> Any:
    """The id of a pod that runs until it is told not to, and the pid of its member."""
    pod = {"name": "house", "tasks": [{"name": "host", "command": "sleep 600"}]}
    assert world.run(pod, "-d").code == 0
    yield "house", world.ps()["house.host"]["pid"]
    world.meso("kill", "house")
    world.meso("wait", "house")
    world.meso("rm", "house")


def test_a_guest_in_a_running_pod_is_shown_to_its_end_and_hands_on_its_code(world: Any, house: tuple[str, int]) -> None:
    answer = world.meso("run", "--in", "house", "--name", "guest", "--", "sh", "-c", "echo here; echo there >&2; exit 3")

    assert (answer.code, answer.out, answer.err) == (3, "here\n", "there\n")
    lines = world.ps()
    assert (lines["house.guest"]["parent"], lines["house.guest"]["state"]) == ("house", "DEAD")
    assert (lines["house.host"]["state"], lines["house.host"]["pid"]) == ("RUNNING", house[1])


def test_guests_of_one_file_start_together_and_the_events_are_of_nobody_else(world: Any, house: tuple[str, int]) -> None:
    tasks = [{"name": "one", "command": "exit 4"}, {"name": "two", "command": "sleep 600"}]
    answer = world.run({"name": "unused", "tasks": tasks}, "--in", "house")

    end = answer.lines[-1]
    assert (answer.code, end["type"], end["exit"], set(end["containers"])) == (4, "end", 4, {"house.one", "house.two"})
    assert {line["id"] for line in answer.lines if line.get("group") is None} == {"house.one", "house.two"}
    assert {line["group"] for line in answer.lines if line["id"] == "house"} == {end["group"]}
    assert world.ps()["house.host"]["pid"] == house[1]


def test_interrupting_a_guest_ends_it_and_not_the_house(world: Any, house: tuple[str, int]) -> None:
    running = world.start("run", "--json", "--in", "house", "--name", "guest", "--", "sh", "-c", POLITE)
    read_until(running, ready=1)

    running.send_signal(signal.SIGINT)

    out, err = running.communicate(timeout=30)
    assert running.returncode == 0, err  # the program's own
    assert "bye" in out
    assert (world.ps()["house.host"]["state"], world.ps()["house.host"]["pid"]) == ("RUNNING", house[1])


@pytest.mark.parametrize(
    ("words", "path"), [(["--hostname", "h", "--", "true"], "$.hostname"), (["--name", "n", "-"], "--name"), (["-"], "$.network")]
)
def test_what_a_running_pod_has_said_of_itself_a_guest_cannot_say_again(
    world: Any, house: tuple[str, int], words: list[str], path: str
) -> None:
    pod = {"name": "unused", "network": "host", "tasks": [{"name": "one", "command": "true"}]}
    answer = world.meso("run", "--json", "--in", house[0], *words, given=json.dumps(pod))

    assert (answer.code, answer.error["code"], answer.error["path"]) == (2, "bad_input", path)
    assert {name for name in world.ps() if name.startswith("house.")} == {"house.host"}


def test_the_code_of_the_member_that_failed_is_the_groups_with_another_nested_in_it(world: Any) -> None:
    nested = {"name": "child", "command": "sleep 60"}
    pod = {"name": "blamed", "tasks": [{"name": "parent", "command": "sleep 0.2; exit 7", "tasks": [nested]}]}

    codes = []
    for _ in range(5):
        codes.append(world.run(pod).code)

    assert codes == [7] * 5
    assert world.meso("rm", "blamed").code == 0


@pytest.mark.skipif(not os.path.exists("/usr/bin/python3"), reason="no /usr/bin/python3 to dig with: a shell stops at PATH_MAX")
def test_a_tree_of_directories_without_end_is_removed_with_its_container(world: Any) -> None:
    dig = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')"

    dug = world.meso("run", "--name", "digger", "--", "/usr/bin/python3", "-c", dig)

    assert (dug.code, world.meso("rm", "digger").code) == (0, 0), dug.err
    assert not (world.run_dir / "containers" / "digger").exists()


def test_a_set_that_the_running_agent_does_not_have_is_refused_and_nothing_starts(canary: Any) -> None:
    world = canary.world
    before = canary.census()

    answer = world.meso("--set", "another", "run", "--json", "--", "true")

    assert answer.code == 4
    assert (answer.error["have"], answer.error["need"]) == ("default", "another")
    assert left_over(before) == []
    assert world.meso("--set", "default", "run", "--", "true").code == 0
    canary.assert_untouched()


def test_standard_streams_that_are_closed_are_no_reason_to_fail(world: Any) -> None:
    given = world.directory / "closed"
    given.mkdir()
    given.chmod(0o777)
    words = world.command("run", "--volume", f"{given}:/given", "--", "touch", "/given/done")
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words]

    child = subprocess.run(world.as_user(*closing), env=dict(world.environment), cwd="/", timeout=60, check=False)

    assert child.returncode == 0
    assert [path.name for path in given.iterdir()] == ["done"]


def test_output_that_cannot_be_written_is_said_and_ends_the_group(world: Any) -> None:
    with open("/dev/full", "w") as full:
        running = world.start("run", "--name", "spill", "--", "sh", "-c", "echo out; sleep 60", stdout=full)
        _, err = running.communicate(timeout=30)

    assert running.returncode == 1
    assert "standard output" in err
    assert "bug" not in err
    assert world.ps()["spill"]["state"] == "DEAD"
    assert world.meso("rm", "spill").code == 0
