"""What every ring of the tests shares: markers that stand for a right or a capability, and what a skip means in CI.

Rule: with CI=true a skip is a failure, since the machine that CI runs on can do everything the tests ask for.
Two skips stay skips: `needs_root` for somebody who is not root, and a reason that begins with "this machine
cannot", which a test may only say after having asked the machine.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import hypothesis
import pytest

SHARED = os.environ.get("MESOCOSM_TESTS_SHARED", "")  # a directory in which the modules that are taken have one of their own
_taken: dict[Path, bool] = {}
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")

hypothesis.settings.register_profile("calm", deadline=None)  # other rings run beside this one: a slow example is no finding
hypothesis.settings.load_profile("calm")


def pytest_configure() -> None:
    """Whoever started us in the background may have had us ignore these; what the tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where the modules are shared out the slow ones go first, so that nobody is left with one at the end."""
    if SHARED:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Leaves the modules that another pytest has taken to it: each is run by whoever comes to it first (tests/rings)."""
    if SHARED and item.path not in _taken:
        try:
            Path(SHARED, item.path.name).mkdir()
            _taken[item.path] = True
        except FileExistsError:
            _taken[item.path] = False
    if not SHARED or _taken[item.path]:
        return None
    item.session._setupstate.teardown_exact(nextitem)  # as after a test: what the last one that ran has in common with this one
    return True


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``figure(asked=100, lost=0)``: numbers worth keeping, as a line of JSON to the file that MESOCOSM_FIGURES names, if any."""

    def keep(**numbers: object) -> None:
        if path := os.environ.get("MESOCOSM_FIGURES"):
            with open(path, "a") as file:
                file.write(json.dumps({"test": request.node.name, **numbers}) + "\n")

    return keep


@pytest.fixture
def rounds() -> Callable[[int, int], int]:
    """``rounds(few, many)``: how often to do something: `few` times in `make test`, `many` in `make long` (MESOCOSM_SOAK=1)."""
    return lambda few, many: many if os.environ.get("MESOCOSM_SOAK") == "1" else few


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Honours `needs_root`."""
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns a skip that CI must not have into a failure."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        allowed = reason.startswith("this machine cannot") or (reason == "needs root" and os.geteuid() != 0)
        if not allowed:
            report.outcome = "failed"
            report.longrepr = f"skipped although CI can do it: {reason}"
    return report
