"""contrib/manual/errors.md is what this machine says when each of its cases is made to happen."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.needs_root]
MANUAL = Path(__file__).resolve().parents[2] / "contrib" / "manual"
PAGE = (MANUAL / "errors.md").read_text()
NAMES = runpy.run_path(str(MANUAL / "make_errors.py"))


@pytest.fixture
def meso(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command, with an agent of its own."""
    place = tmp_path_factory.mktemp("errors")
    for directory in (place, *place.parents[:2]):
        directory.chmod(0o755)  # containers that are nobody's look at what lies below
    meso = NAMES["Meso"](place)
    yield meso
    meso("agent", "--stop")


def test_every_mistake_is_told_as_the_page_says(meso: Any) -> None:
    for row in NAMES["cases"](meso):
        assert f"| {' | '.join(row)} |" in PAGE, row


def test_every_refusal_of_the_kernel_is_told_as_the_page_says(meso: Any) -> None:
    for row in NAMES["faults"](meso):
        assert f"| {' | '.join(row)} |" in PAGE, row
