"""contrib/plugin-template, installed as its README says, is seen by `meso plugins`, shown by `meso plan` and does its work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# An ordinary user's: root's set files are the machine's own, and a test leaves those alone.
pytestmark = [pytest.mark.system, pytest.mark.parametrize("world", ["user"], indirect=True, scope="module")]

TEMPLATE = Path(__file__).resolve().parents[2] / "contrib" / "plugin-template"
TASK = {"name": "t", "command": "echo $XDG_CACHE_HOME; df -k /var/cache | tail -n 1", "labels": {"cache": "16MiB"}}
POD = {"name": "cached", "tasks": [TASK]}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as pip installs it, in a directory of its own that everybody may read."""
    pytest.importorskip("hatchling", reason="hatchling is not installed (pip install -e .[dev])")
    place = tmp_path_factory.mktemp("plugin")
    shutil.copytree(TEMPLATE, place / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    told = subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(place / "target"), str(place / "source")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    return place / "target"


@pytest.fixture
def equipped(world: Any, installed: Path) -> Iterator[Any]:
    """The world with the template in its environment and its set file in the user's configuration."""
    target, config = world.directory / "target", world.directory / "config"
    shutil.copytree(installed, target, dirs_exist_ok=True)
    (config / "mesocosm" / "sets.d").mkdir(parents=True, exist_ok=True)
    shutil.copy(TEMPLATE / "sets.toml", config / "mesocosm" / "sets.d")
    before = world.environment
    world.environment = {
        **before,
        "PYTHONPATH": f"{before['PYTHONPATH']}:{target}",
        "XDG_CONFIG_HOME": str(config),
        "MESOCOSM_SET": "with-cache",
    }
    yield world
    world.environment = before


def test_it_is_listed_with_its_distribution(equipped: Any) -> None:
    answer = equipped.meso("plugins", "--json")

    line = next(line for line in answer.lines if line["name"] == "cachedir")
    assert line == {
        "kind": "isolators", "name": "cachedir", "distribution": "mesocosm-cachedir", "version": "0.1.0", "set": "with-cache",
        "loaded": True, "error": None,
    }  # fmt: skip


def test_its_step_is_in_the_plan_under_its_name(equipped: Any) -> None:
    plan = equipped.meso("plan", "--json", "-", given=json.dumps(POD)).lines[0]

    (task,) = [container for container in plan["containers"] if container["id"] == "cached.t"]
    (step,) = [step for step in task["setup"] if step["plugin"] == "cachedir"]
    assert (step["kind"], step["args"]["target"], step["args"]["size"]) == ("tmpfs", "/var/cache", 16 * 2**20)


def with_steps(equipped: Any, count: int) -> None:
    """The template with that many steps of its own, as an author would add them."""
    file = equipped.directory / "target" / "mesocosm_cachedir.py"
    whole = (TEMPLATE / file.name).read_text()
    one = 'setup=[Step("tmpfs", tmpfs)]'
    assert whole.count(one) == 1
    more = 'setup=[Step("tmpfs", {**tmpfs, "target": f"/var/cache{number}"}) for number in range(' + str(count) + ")]"
    file.write_text(whole.replace(one, more))


def test_a_fifteenth_step_of_its_own_is_failed_like_all_others_by_itself(equipped: Any, every_fault: Any) -> None:
    task = {**TASK, "labels": {"cache": "1MiB"}, "command": ["true"]}
    found = []
    for count in (14, 15):
        with_steps(equipped, count)
        found.append(every_fault("step", {**POD, "tasks": [task]}))

    fewer, more = found
    assert len(more) == len(fewer) + 1
    own = [line for line in more if line["error"]["plugin"] == "cachedir"]
    assert [line["error"]["target"] for line in own] == [f"/var/cache{number}" for number in range(15)]
    assert all(line["left"] == [] and line["error"]["errno"] == "ENOSYS" and not line["launched"] for line in own)


def test_its_refusal_names_the_field(equipped: Any) -> None:
    pod = {**POD, "tasks": [{**TASK, "labels": {"cache": "a lot"}}]}

    answer = equipped.meso("plan", "--json", "-", given=json.dumps(pod))

    assert answer.code == 2
    assert answer.error["path"] == "$.tasks[0].labels.cache"
    assert answer.error["plugin"] == "cachedir"


def test_its_directory_is_there_when_the_container_runs(equipped: Any) -> None:
    answer = equipped.run(POD)

    assert answer.code == 0, (answer.out, answer.err)
    variable, usage = "".join(line["data"] for line in answer.lines if line["type"] == "output").splitlines()
    assert variable == "/var/cache"
    assert usage.split()[1] == str(16 * 1024)
    equipped.meso("rm", "cached")
    equipped.meso("agent", "--stop")  # this agent has the other set


def test_without_the_set_it_is_installed_and_not_used(equipped: Any) -> None:
    equipped.environment = {key: value for key, value in equipped.environment.items() if key != "MESOCOSM_SET"}

    assert "cachedir" not in {line["name"] for line in equipped.meso("plugins", "--json").lines}
    plan = equipped.meso("plan", "--json", "-", given=json.dumps(POD)).lines[0]
    assert "cachedir" not in {step["plugin"] for container in plan["containers"] for step in container["setup"]}
