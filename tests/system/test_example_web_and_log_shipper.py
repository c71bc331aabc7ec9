"""The example `web-and-log-shipper`: what was asked of the server is what was shipped, line for line."""

from __future__ import annotations

import json
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

EXAMPLE = Path(__file__).resolve().parents[2] / "contrib/examples/web-and-log-shipper/pod.toml"
NAME = "web-and-log-shipper"
SHIPPER, WEB, ROTATION = f"{NAME}.shipper", f"{NAME}.shipper.web", f"{NAME}.shipper.web.rotation"
CLIENT = f"{NAME}.client"

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not shutil.which("nginx", path="/usr/sbin:/usr/bin"), reason="no nginx: apt-get install nginx"),
]


def start(world: Any, *, requests: int, per_request: float, per_file: float, per_line: float) -> Any:
    """The example under way with so many requests and so many seconds for each, for each file of the log, for each line shipped."""
    pod = tomllib.loads(EXAMPLE.read_text())
    shipper, client = pod["tasks"]
    shipper["env"] = {"SECONDS_PER_LINE": str(per_line)}
    shipper["tasks"][0]["tasks"][0]["env"] = {"SECONDS_PER_FILE": str(per_file)}
    client["env"] = {"REQUESTS": str(requests), "SECONDS_PER_REQUEST": str(per_request)}
    path = Path(world.directory) / "pod.json"
    path.write_text(json.dumps(pod))
    path.chmod(0o644)
    return world.start("run", "--json", str(path))


def shipped(world: Any) -> list[tuple[int, str]]:
    """(status, request) of all that has been shipped, in its order."""
    lines = (world.run_dir / "containers" / NAME / "volumes/shipped/access.jsonl").read_text().splitlines()
    return [(record["status"], record["request"]) for record in map(json.loads, lines)]


def made(world: Any) -> list[tuple[int, str]]:
    """(status, request) as the client knows them."""
    lines = (world.run_dir / "containers" / CLIENT / "stdout").read_text().splitlines()
    status_and_path = [line.split() for line in lines]
    return [(int(status), f"GET {path} HTTP/1.1") for status, path in status_and_path]


def test_every_request_is_shipped_once_and_in_order_while_the_log_is_rotated(
    canary: Any, rounds: Callable[[int, int], int]
) -> None:
    world, requests = canary.world, rounds(300, 5000)
    before = canary.census()

    running = start(world, requests=requests, per_request=0.005, per_file=0.1, per_line=0)

    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, (out[-2000:], err)
    assert len(made(world)) == requests
    assert {status for status, _ in made(world)} == {200, 404}
    assert shipped(world) == made(world)
    rotated = (world.run_dir / "containers" / ROTATION / "stdout").read_text().splitlines()
    assert len(rotated) > 1
    assert world.meso("rm", NAME).code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_a_shipper_that_is_far_behind_ends_last_and_leaves_nothing_unshipped(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    running = start(world, requests=100, per_request=0, per_file=0.1, per_line=0.04)
    lines = []
    while not any(line["type"] == "exited" and line["id"] == WEB for line in lines):
        text = running.stdout.readline()
        assert text, "the run ended early"
        lines.append(json.loads(text))
    behind = len(made(world)) - len(shipped(world))

    lines += map(json.loads, running.stdout)

    running.communicate(timeout=60)
    assert running.returncode == 0, lines[-1]
    assert behind > 0  # it was asked to end with work to do
    assert shipped(world) == made(world)
    assert len(made(world)) == 100
    waits = lines[-1]["containers"]
    assert (waits[SHIPPER]["exit"], waits[SHIPPER]["reason"]) == (0, "group")  # in its own time
    order = [line["id"] for line in lines if line["type"] == "dead"]
    assert order == [CLIENT, ROTATION, WEB, SHIPPER, NAME]
    assert world.meso("rm", NAME).code == 0
    assert left_over(before) == []


def test_what_was_asked_for_before_the_pod_is_interrupted_is_shipped(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    running = start(world, requests=100_000, per_request=0, per_file=0.1, per_line=0.001)
    answers = (line for line in map(json.loads, running.stdout) if line["type"] == "output" and line["id"] == CLIENT)
    for _ in range(10):
        next(answers)

    running.send_signal(signal.SIGINT)

    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT
    # The client may have been killed when it had its answer and had not yet said so.
    assert shipped(world)[: len(made(world))] == made(world)
    assert len(shipped(world)) - len(made(world)) in (0, 1)
    assert world.meso("rm", NAME).code == 0
    assert left_over(before) == []


def test_a_client_that_fails_ends_the_pod_with_its_code_and_what_it_asked_for_is_shipped_all_the_same(canary: Any) -> None:
    world = canary.world
    before = canary.census()
    running = start(world, requests=20, per_request=-1, per_file=0.1, per_line=0)  # time.sleep(-1) raises, after one request

    out, _ = running.communicate(timeout=60)

    assert running.returncode == 1, out[-2000:]
    assert shipped(world) == made(world) == [(200, "GET /page/1 HTTP/1.1")]
    assert world.meso("rm", NAME).code == 0
    assert left_over(before) == []
