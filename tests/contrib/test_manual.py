"""The manual says what the code does: generated pages are compared with what would be generated now."""

from __future__ import annotations

import runpy
from pathlib import Path

from mesocosm.kernel.core.plan import STAGES, STEPS

MANUAL = Path(__file__).resolve().parents[2] / "contrib" / "manual"


def test_the_page_of_states_is_what_the_tables_say() -> None:
    made = runpy.run_path(str(MANUAL / "make_states.py"))["page"]()

    assert (MANUAL / "states.md").read_text() == made


def test_the_page_of_errors_has_all_the_advice_there_is() -> None:
    advice = runpy.run_path(str(MANUAL / "make_errors.py"))["advice"]()

    assert (MANUAL / "errors.md").read_text().endswith(advice)


def test_the_page_about_launching_has_every_stage_in_order_and_every_step() -> None:
    text = (MANUAL / "launch.md").read_text()
    rows = [line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")]

    assert [row for row in rows if row in STAGES] == list(STAGES)
    assert [kind for kind in STEPS if f"`{kind}`" not in text] == []
