"""ruff and mypy as tests, so that `make test` says what `make lint` would."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("tool", "arguments"), [("ruff", ["check", "--no-cache", "."]), ("mypy", ["--no-error-summary"])], ids=["ruff", "mypy"]
)
def test_a_linter_finds_nothing(tool: str, arguments: list[str]) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (pip install -e .[dev])")

    told = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)

    assert told.returncode == 0, told.stdout + told.stderr
