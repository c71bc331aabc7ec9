"""The example `app-and-metrics`: what the adapter says can be read by a strict reader, and is what the application did."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

EXAMPLE = Path(__file__).resolve().parents[2] / "contrib/examples/app-and-metrics/pod.toml"
NAME = "app-and-metrics"
APP, METRICS = f"{NAME}.app", f"{NAME}.metrics"
SCRAPE = """
import time, urllib.error, urllib.request
while True:
    try:
        page = urllib.request.urlopen("http://127.0.0.1:9121/metrics", timeout=30)
        break
    except urllib.error.URLError:
        time.sleep(0.05)
print(page.headers["Content-Type"])
print(page.read().decode(), end="")
"""
NEST = """
import sys
from mesocosm.kernel.client import connect
inside, name, *command = sys.argv[1:]
with connect() as client:
    client.launch_nested_group(inside, [{"name": name, "command": command}])
    sys.exit(client.wait(f"{inside}.{name}")["exit"])
"""
_numbers = itertools.count(1)

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not shutil.which("redis-server", path="/usr/bin"), reason="no redis: apt-get install redis-server"),
]

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> tuple[Samples, dict[str, str]]:
    """Samples by name and labels, and the type of each family, of a page in Prometheus' text format 0.0.4; strictly.

    AssertionError for anything that the format does not allow: a line that is neither sample nor comment, a type told
    twice or after its samples, a family in two places, a series twice, no line feed at the end.
    """
    assert text.endswith("\n")
    samples: Samples = {}
    types: dict[str, str] = {}
    order: list[str] = []
    for line in text[:-1].split("\n"):
        if line.startswith("#"):
            match = re.fullmatch(r"# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) (counter|gauge|histogram|summary|untyped)", line)
            assert match, line
            assert match[1] not in types, line
            assert match[1] not in order, line
            types[match[1]] = match[2]
            continue
        match = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?|NaN|[-+]Inf)", line)
        assert match, line
        name, inside, value = match.groups()
        if not order or order[-1] != name:
            assert name not in order, line
            order.append(name)
        label = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\[\\"n])*)"'
        assert inside is None or re.fullmatch(f"{label}(,{label})*", inside), line
        series = (name, tuple(sorted(re.findall(label, inside or ""))))
        assert series not in samples, line
        samples[series] = float(value)
    return samples, types


@pytest.mark.parametrize(
    "text",
    ["a 1", "a one\n", "a{b=c} 1\n", 'a{b="c} 1\n', 'a{b="\\c"} 1\n', "a 1\na 2\n", "a 1\nb 1\na{c=\"d\"} 1\n", "1a 1\n", "\n",
     "# TYPE a number\na 1\n", "a 1\n# TYPE a gauge\n", "# TYPE a gauge\n# TYPE a gauge\na 1\n", "a 1 \n", "a  1\n"],
)  # fmt: skip
def test_the_reader_is_strict(text: str) -> None:
    with pytest.raises(AssertionError):
        parse(text)


def test_the_reader_reads_what_is_right() -> None:
    assert parse('# TYPE a gauge\na{b="c\\"d",e="f"} 1e3\na -1.5\n') == (
        {("a", (("b", 'c\\"d'), ("e", "f"))): 1000.0, ("a", ()): -1.5},
        {"a": "gauge"},
    )


class Running:
    """The example, without its own visitor: what the application does is what a test asks of it."""

    def __init__(self, canary: Any) -> None:
        self.world = canary.world
        pod = tomllib.loads(EXAMPLE.read_text())
        pod["tasks"] = [task for task in pod["tasks"] if task["name"] in ("app", "metrics")]
        assert self.world.run(pod, "-d").code == 0
        while self.scrape()[0]["redis_up", ()] != 1:
            pass

    def inside(self, *command: str) -> str:
        """What a command printed that was run in a container launched into the pod, in its network."""
        name = f"guest-{next(_numbers)}"
        words = self.world.as_user(self.world.python, "-B", "-c", NEST, NAME, name, *command)
        subprocess.run(words, env=dict(self.world.environment), cwd="/", timeout=60, check=True)
        return (self.world.run_dir / "containers" / f"{NAME}.{name}" / "stdout").read_text()

    def scrape(self) -> tuple[Samples, dict[str, str]]:
        """The adapter's page, read strictly."""
        kind, _, page = self.inside("python3", "-c", SCRAPE).partition("\n")
        assert kind == "text/plain; version=0.0.4; charset=utf-8"
        return parse(page)

    def pid(self, container_id: str) -> int:
        """The process of a container that runs."""
        line = self.world.ps()[container_id]
        assert line["state"] == "RUNNING"
        pid: int = line["pid"]
        return pid


@pytest.fixture
def running(canary: Any) -> Iterator[Running]:
    """The pod, and afterwards nothing that was not there before."""
    before = canary.census()
    try:
        yield Running(canary)
    finally:
        canary.world.meso("kill", NAME)
        canary.world.meso("wait", NAME)
        removed = canary.world.meso("rm", NAME)
    assert removed.code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_its_page_has_numbers_of_every_kind_each_with_its_type(running: Running) -> None:
    samples, types = running.scrape()

    assert {name for name, _ in samples} == set(types)
    assert types["redis_used_memory"] == types["redis_connected_clients"] == "gauge"
    assert types["redis_command_calls"] == types["redis_total_commands_processed"] == "counter"
    assert samples["redis_used_memory", ()] > 100_000
    assert samples["redis_command_calls", (("command", "info"),)] >= 1


def test_its_numbers_change_by_what_the_application_did(running: Running) -> None:
    first, types = running.scrape()

    running.inside("sh", "-c", "for each in 1 2 3 4 5 6 7; do redis-cli incr visits; done; redis-cli set a 1; redis-cli set b 2")

    second, _ = running.scrape()
    incr, of_set, keys = (("command", "incr"),), (("command", "set"),), (("db", "0"),)
    assert ("redis_command_calls", incr) not in first
    assert second["redis_command_calls", incr] == 7
    assert second["redis_command_calls", of_set] == 2
    assert ("redis_db_keys", keys) not in first
    assert second["redis_db_keys", keys] == 3
    assert second["redis_total_connections_received", ()] == first["redis_total_connections_received", ()] + 9 + 1  # and INFO's
    falling = [series for series in first if types[series[0]] == "counter" and second[series] < first[series]]
    assert falling == []


def test_an_application_that_does_not_answer_is_told_as_down_until_it_does(running: Running) -> None:
    app = running.pid(APP)
    os.kill(app, signal.SIGSTOP)
    try:
        samples, _ = running.scrape()
    finally:
        os.kill(app, signal.SIGCONT)

    assert samples == {("redis_up", ()): 0}
    assert running.scrape()[0]["redis_up", ()] == 1


def test_without_its_adapter_the_application_goes_on(running: Running) -> None:
    app = running.pid(APP)

    os.kill(running.pid(METRICS), signal.SIGKILL)

    assert running.world.meso("wait", METRICS).code == 128 + signal.SIGKILL
    assert running.inside("redis-cli", "ping") == "PONG\n"
    assert running.pid(APP) == app


def test_when_the_application_ends_its_adapter_goes_too_and_the_code_is_the_applications(running: Running) -> None:
    os.kill(running.pid(APP), signal.SIGTERM)  # it then ends well

    assert running.world.meso("wait", NAME).code == 0
    ended = {name: line["wait"] for name, line in running.world.ps().items() if name in (APP, METRICS)}
    assert {name: (wait["exit"], wait["reason"]) for name, wait in ended.items()} == {APP: (0, "exited"), METRICS: (0, "group")}
