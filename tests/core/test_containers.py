"""Units and names of the pod file that become numbers: nothing but a number or an error that names the field."""

from __future__ import annotations

import signal

import pytest

from mesocosm.kernel.core.containers import signal_number
from mesocosm.kernel.core.errors import LONGEST, SpecError


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
