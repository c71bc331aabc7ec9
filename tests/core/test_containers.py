"""Units and names of the pod file that become numbers: nothing but a number or an error that names the field."""

from __future__ import annotations

import signal

import pytest

from mesocosm.kernel.core.containers import signal_number
from mesocosm.kernel.core.errors import LONGEST, SpecError
from mesocosm.kernel.core.spec import parse_tasks


@pytest.mark.parametrize(
    ("given", "number"), [("TERM", 15), ("SIGTERM", 15), ("kill", 9), (1, 1), ("64", 64), ("rtmin", signal.SIGRTMIN)]
)
def test_a_signal_is_a_name_or_a_number(given: str | int, number: int) -> None:
    assert signal_number(given, "$.signal") == number


@pytest.mark.parametrize(
    "given", ["", "NOPE", "SIG", "SIG_BLOCK", "0", "65", 0, 65, -9, 2**64, "-9", "9 ", "²", "١", "9" * 5000, "x" * 100_000, "9\0"]
)
def test_what_is_no_signal_is_refused_with_its_path(given: str | int) -> None:
    with pytest.raises(SpecError) as caught:
        signal_number(given, "$.signal")

    assert caught.value.fields["path"] == "$.signal"


def test_an_error_quotes_its_cause_only_so_far() -> None:
    error = SpecError("x" * 10_000, path="$." + "y" * 10_000, have="short")

    assert len(error.message) == LONGEST + 1
    assert len(error.fields["path"]) == LONGEST + 1
    assert error.fields["have"] == "short"
    assert len(str(error)) < 3 * LONGEST


@pytest.mark.parametrize("depth", [1, 14, 31])
def test_the_thirty_second_level_is_the_last(depth: int) -> None:
    """Counted are containers: a task without tasks of its own does not ask for a level below it."""
    parent = ".".join("t" * depth)
    leaf = {"name": "t", "command": "true"}

    assert parse_tasks([leaf], parent)[0].tasks == []
    with pytest.raises(SpecError) as caught:
        parse_tasks([leaf], ".".join("t" * 32))

    assert (caught.value.fields["have"], caught.value.fields["need"]) == ("33", "≤ 32 levels")
