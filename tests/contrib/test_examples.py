"""The examples are valid pod files, and say what their pages say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mesocosm.kernel.core.spec import parse_pod

EXAMPLES = Path(__file__).resolve().parents[2] / "contrib" / "examples"
POD_FILES = sorted(EXAMPLES.rglob("*.toml"))


@pytest.mark.parametrize("path", POD_FILES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_an_example_is_a_pod_file_and_has_a_page_beside_it(path: Path) -> None:
    pod = parse_pod(tomllib.loads(path.read_text()))

    assert pod.tasks
    assert (path.parent / "README.md").exists()
