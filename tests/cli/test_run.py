"""`meso run` follows a group: what is printed where, how it is ended, and with which code the command ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

POD = {"name": "web", "tasks": [{"name": "a", "command": "x"}, {"name": "server", "command": "y"}]}


@pytest.fixture
def pod_file(tmp_path: Path) -> str:
    (tmp_path / "pod.json").write_text(json.dumps(POD))
    return str(tmp_path / "pod.json")


def until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_a_single_command_prints_what_it_prints_and_nothing_else(meso: Any, fake_agent: Any, kit: Any) -> None:
    output = {("x", "stdout"): "grüße \x1b[31m日本\n\x00".encode(), ("x", "stderr"): b"no newline at the end"}
    fake_agent(kit.Group(output=output, code=3).answers())
    said = meso("run", "--name", "x", "--", "prog")
    assert said == (3, output["x", "stdout"].decode(), output["x", "stderr"].decode())


def test_members_lines_have_their_names_in_front_on_the_side_they_came_from(
    meso: Any, fake_agent: Any, kit: Any, pod_file: str
) -> None:
    output = {("web.a", "stdout"): b"one\ntwo", ("web.server", "stderr"): b"oops\r\n", ("web.server", "stdout"): b"\x1b[2Jraw\n"}
    agent = fake_agent(kit.Group(output=output).answers())
    said = meso("run", pod_file)
    assert said.code == 0
    assert sorted(said.out.splitlines()) == ["a      │ one", "a      │ two", "server │ \x1b[2Jraw"]
    assert "server │ oops\n" in said.err
    assert "meso: web runs\n" in said.err
    assert "meso: web.server: exit 0\n" in said.err
    assert said.err.splitlines()[-1].startswith("meso: web ended after ")
    assert agent.asked[0] == ("LAUNCH_GROUP", {"group": POD, "stream": True})


def test_json_lines_are_the_events_with_output_between_and_the_end_last(
    meso: Any, fake_agent: Any, kit: Any, pod_file: str
) -> None:
    output = {("web.a", "stdout"): "äöü日本語".encode(), ("web.a", "stderr"): b"\xff\xfe"}
    fake_agent(kit.Group(output=output, code=4).answers())
    said = meso("run", "--json", pod_file)
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert said.code == 4
    assert lines[-1]["type"] == "end"
    assert lines[-1]["exit"] == 4
    events = [line for line in lines if line["type"] != "output"]
    assert [line["seq"] for line in events] == list(range(1, len(events) + 1))
    printed = [line for line in lines if line["type"] == "output"]
    assert "".join(line["data"] for line in printed if line["stream"] == "stdout") == "äöü日本語"
    assert [line["base64"] for line in printed if line["stream"] == "stderr"] == ["//4="]
    assert all(line["id"] == "web.a" for line in printed)


def test_a_rolled_back_group_says_why_and_has_the_code_of_the_error(meso: Any, fake_agent: Any, kit: Any, pod_file: str) -> None:
    error = {
        "code": "launch_failed", "message": "no such program", "id": "web.a",
        "step": {"index": 9, "stage": "check", "kind": "check"}, "errno": "ENOENT", "target": "/nope", "hint": "install it",
    }  # fmt: skip

    def launch(group: Any, stream: bool) -> Iterator[dict[str, Any]]:  # noqa: FBT001
        yield {"v": 1, "seq": 1, "time": 1.0, "id": "web", "type": "planned", "containers": ["web", "web.a"]}
        yield {"v": 1, "seq": 2, "time": 1.0, "id": "web", "type": "rolled_back", "error": error}
        yield {
            "v": 1,
            "seq": 3,
            "time": 1.0,
            "type": "end",
            "id": "web",
            "state": "ROLLED_BACK",
            "exit": None,
            "containers": {},
            "error": error,
        }

    fake_agent({"LAUNCH_GROUP": launch})
    said = meso("run", pod_file)
    assert said.code == 127
    assert said.out == ""
    assert "meso: web: rolled back, no program ran\n" in said.err
    assert "no such program" in said.err
    assert "hint:    install it" in said.err


def test_a_refused_group_is_an_error_object(meso: Any, fake_agent: Any, kit: Any, pod_file: str) -> None:
    def launch(group: Any, stream: bool) -> Iterator[dict[str, Any]]:  # noqa: FBT001
        raise kit.Refusal("bad_input", "'cpus' is odd", path="$.tasks[0].resources.cpus")
        yield

    fake_agent({"LAUNCH_GROUP": launch})
    said = meso("run", "--json", pod_file)
    assert said.code == 2
    assert json.loads(said.out) == {"error": {"code": "bad_input", "message": "'cpus' is odd", "path": "$.tasks[0].resources.cpus"}}


def test_ten_thousand_tasks_are_refused_with_the_path_of_the_field(meso: Any, fake_agent: Any, kit: Any, tmp_path: Path) -> None:
    fake_agent(kit.Group().answers())
    (tmp_path / "big.json").write_text(
        json.dumps({"name": "big", "tasks": [{"name": f"t{n}", "command": "true" * 9} for n in range(10_000)]})
    )
    said = meso("run", "--json", str(tmp_path / "big.json"))
    assert said.code == 2
    assert json.loads(said.out)["error"]["path"] == "$.tasks"


def test_detached_prints_the_id_once_it_runs(meso: Any, fake_agent: Any, kit: Any, pod_file: str) -> None:
    fake_agent(kit.Group(hold=True).answers())
    assert meso("run", "-d", pod_file) == (0, "web\n", "")
    assert json.loads(meso("run", "-d", "--json", pod_file).out)["containers"] == ["web", "web.a", "web.server"]


def test_the_deadline_ends_the_group_by_its_kill_policy(meso: Any, fake_agent: Any, kit: Any, pod_file: str) -> None:
    group = kit.Group(hold=True)
    fake_agent(group.answers())
    said = meso("run", "--timeout", "200ms", pod_file)
    assert said.code == 124
    assert group.kills == [None]
    assert "the deadline of 0.2 s has passed" in said.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_group_cleanly(number: int, meso_process: Any, fake_agent: Any, kit: Any, pod_file: str) -> None:
    group = kit.Group(hold=True)
    fake_agent(group.answers())
    process = meso_process("run", pod_file)
    assert process.stderr.readline() == b"meso: web runs\n"
    process.send_signal(number)
    assert process.wait(10) == 143
    assert group.kills == [None]


def test_a_second_interrupt_kills_at_once(meso_process: Any, fake_agent: Any, kit: Any, pod_file: str) -> None:
    group = kit.Group(hold=True)
    fake_agent({**group.answers(), "KILL_CONTAINER": lambda container_id, signal=None: group.kills.append(signal) or {}})
    process = meso_process("run", pod_file)
    assert process.stderr.readline() == b"meso: web runs\n"
    process.send_signal(signal.SIGINT)
    until(lambda: group.kills == [None])
    process.send_signal(signal.SIGINT)
    until(lambda: group.kills == [None, 9])
    group.release.set()
    assert process.wait(10) == 143


def test_a_reader_that_goes_away_ends_the_group_like_sigpipe(meso_process: Any, fake_agent: Any, kit: Any) -> None:
    group = kit.Group(hold=True, output={("x", "stdout"): b"y\n" * 100})
    fake_agent(group.answers())
    reader, writer = os.pipe()
    os.close(reader)
    process = meso_process("run", "--name", "x", "--", "yes", stdout=writer)
    os.close(writer)
    assert process.wait(10) == 141
    assert group.kills == [None]
    assert process.stderr.read() == b""


def test_a_run_that_loses_its_agent_goes_on_with_the_next_one(meso_process: Any, fake_agent: Any, kit: Any, pod_file: str) -> None:
    data = b"".join(b"line %d\n" % number for number in range(50))
    group = kit.Group(hold=True, output={("web.a", "stdout"): data})
    first = fake_agent(group.answers())
    process = meso_process("run", pod_file)
    assert process.stderr.readline() == b"meso: web runs\n"
    lines = [process.stdout.readline() for _ in range(50)]

    def events(since: int, container_id: str) -> Iterator[dict[str, Any]]:
        assert (since, container_id) == (group.seq, "web")
        wait = {"id": "web.a", "exit": 5, "signal": None}
        yield group.line("exited", "web.a", wait=wait)
        yield {**group.line("end", "web"), "state": "DEAD", "exit": 5, "containers": {"web.a": wait}, "error": None}

    # The socket is never absent: the command must not start a real agent here.
    os.rename(first.path, first.path.with_suffix(".old"))
    fake_agent({**group.answers(), "SUBSCRIBE_EVENTS": events})
    first.path = first.path.with_suffix(".old")
    first.close()
    assert process.wait(10) == 5
    assert b"".join(lines) + process.stdout.read() == b"".join(b"a      \xe2\x94\x82 line %d\n" % number for number in range(50))
    assert b"the agent is gone; its containers go on" in process.stderr.read()


def test_on_a_terminal_the_tree_is_live_and_hostile_output_is_escaped(
    fake_agent: Any, kit: Any, pod_file: str, tmp_path: Path
) -> None:
    hostile = b"\x1b]52;c;b3duZWQ=\x07\x1b[2Jhello\n"
    group = kit.Group(output={("web.a", "stdout"): hostile, ("web.server", "stderr"): hostile})
    fake_agent(group.answers())
    shown = on_terminal("run", pod_file)
    assert b"\x1b]" not in shown
    assert b"\x1b[2J" not in shown
    assert b"\\x1b]52;c;b3duZWQ=\\x07\\x1b[2Jhello" in shown
    for text in ("└─ server", "├─ a", "web ended after"):
        assert text.encode() in shown


def test_a_single_command_on_a_terminal_may_colour_its_text_and_no_more(fake_agent: Any, kit: Any) -> None:
    fake_agent(kit.Group(output={("x", "stdout"): b"\x1b[31mred\x1b[0m \x1b]0;title\x07\n"}).answers())
    shown = on_terminal("run", "--name", "x", "--", "prog")
    assert shown == b"\x1b[31mred\x1b[0m \\x1b]0;title\x07\r\n\x1b[0m"


def on_terminal(*words: str) -> bytes:
    """What the command writes to a terminal."""
    import sys

    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mesocosm.kernel.cli.main", *words], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(10) == 0
    return shown
