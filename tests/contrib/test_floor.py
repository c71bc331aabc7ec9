"""The C floor of the benchmark: it compiles without a warning, launches, and leaves nothing on the machine."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mesocosm.kernel.testing.census import census, left_over

SOURCE = Path(__file__).resolve().parents[2] / "contrib" / "bench" / "floor.c"

pytestmark = pytest.mark.system


@pytest.fixture
def floor(tmp_path: Path) -> Path:
    """The compiled program."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(tmp_path / "floor"), str(SOURCE)], check=True)
    return tmp_path / "floor"


def test_the_floor_launches_one_ten_and_many_and_says_how_long_it_took(floor: Path) -> None:
    before = census()

    told = subprocess.run([str(floor)], input="1\n10\nx 8 4\n", capture_output=True, text=True, check=False, timeout=60)

    if "unshare(NEWUSER)" in told.stderr:
        pytest.skip("this machine cannot make user namespaces as this user")
    about, *times = [json.loads(line) for line in told.stdout.splitlines()]
    assert told.returncode == 0, told.stderr
    assert set(about) == {"cgroups", "rootless"}
    assert len(times) == 3
    assert [line for line in left_over(before) if "mesofloor" in line or "meso-floor" in line] == []


def test_a_program_that_fails_fails_the_floor_and_its_cgroups_go_all_the_same(floor: Path) -> None:
    before = census()

    told = subprocess.run([str(floor), "/usr/bin/false"], input="1\n", capture_output=True, text=True, check=False, timeout=60)

    assert told.returncode == 1
    assert [line for line in left_over(before) if "mesofloor" in line] == []
