"""The real launcher, as root and as an ordinary user: each scenario of scenarios.py is a test, in a process of its own kind."""

from __future__ import annotations

import ast
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

import mesocosm

HERE = Path(__file__).parent
SCRIPT = HERE / "scenarios.py"
NAMES = [node.name for node in ast.parse(SCRIPT.read_text()).body if isinstance(node, ast.AsyncFunctionDef)]
WITH_PYTHON = (
    "a_program_runs_and_its_exit_status_is_told", "a_nested_container_stands_in_its_parents_namespaces",
    "an_abort_leaves_nothing", "an_exec_that_fails_after_the_barrier_is_told_and_ends_with_126",
)  # fmt: skip
USER = 4321
DEADLINE = 90.0


class Runner:
    """A process that runs scenarios, one after the other."""

    def __init__(self, mode: str) -> None:
        packages = [str(Path(next(iter(mesocosm.__path__))).parent), str(Path(msgpack.__file__).parents[1])]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(packages), "PYTHONDONTWRITEBYTECODE": "1"}
        self.user = USER if mode == "ordinary" and os.geteuid() == 0 else os.geteuid()
        python = find_python(self.user, environment)
        command = [python, "-W", "error", str(SCRIPT), mode]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process: subprocess.Popen[bytes] = subprocess.Popen(command, env=environment, cwd="/", **pipes, **becoming(self.user))

    def run(self, name: str, walker: str) -> None:
        """Fails as the scenario fails."""
        place = tempfile.mkdtemp(prefix="meso-test-")
        try:
            os.chown(place, self.user, -1)
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(f"{name} {place} {walker}\n".encode())
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], DEADLINE)[0]:
                self.close()
                pytest.fail(f"no answer within {DEADLINE:.0f} s")
            answer = self.process.stdout.readline()
            assert answer, "the process that runs the scenarios has ended"
            if (problem := json.loads(answer)) is not None:
                pytest.fail(problem, pytrace=False)
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def becoming(user: int) -> dict[str, Any]:
    """Arguments for subprocess: as this user, who may be us."""
    return {"user": user, "group": user, "extra_groups": []} if user != os.geteuid() else {}


def find_python(user: int, environment: dict[str, str]) -> str:
    """An interpreter that this user may execute and that can load what we need."""
    problem = ""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            command = [python, "-c", "import mesocosm.kernel.launcher.client"]
            subprocess.run(command, env=environment, cwd="/", capture_output=True, check=True, **becoming(user))
        except OSError as error:
            problem += f"{python}: {error.strerror}; "
        except subprocess.CalledProcessError as error:
            problem += f"{python}: {(error.stderr.decode().splitlines() or [''])[-1]}; "
        else:
            return python
    pytest.skip(f"this machine cannot run our packages as uid {user}: {problem}")


@pytest.fixture(scope="session")
def runners() -> Iterator[dict[str, Runner]]:
    """One for each mode, started when first needed."""
    found: dict[str, Runner] = {}
    yield found
    for runner in found.values():
        runner.close()


def carry_out(runners: dict[str, Runner], mode: str, name: str, walker: str) -> None:
    """Runs a scenario in a mode."""
    if mode not in runners:
        runners[mode] = Runner(mode)
    if runners[mode].process.poll() is not None:
        del runners[mode]
        return carry_out(runners, mode, name, walker)
    return runners[mode].run(name, walker)


@pytest.mark.system
@pytest.mark.needs_root
@pytest.mark.parametrize("name", NAMES)
def test_as_root(name: str, runners: dict[str, Runner]) -> None:
    carry_out(runners, "root", name, "-")


@pytest.mark.system
@pytest.mark.parametrize("name", NAMES)
def test_as_an_ordinary_user(name: str, runners: dict[str, Runner]) -> None:
    carry_out(runners, "ordinary", name, "-")


@pytest.mark.system
@pytest.mark.needs_root
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_with_the_walker_in_python(name: str, runners: dict[str, Runner]) -> None:
    carry_out(runners, "root", name, "python")
