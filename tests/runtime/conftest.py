"""One simulated host per test, on a clock that jumps over waiting."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio.testing

from mesocosm.kernel.testing.simulation import Simulation


@pytest.fixture
def simulation(tmp_path: Path) -> Simulation:
    """An empty simulated host."""
    return Simulation(tmp_path)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """pytest-trio runs the test on this clock when the fixture is asked for."""
    return trio.testing.MockClock(autojump_threshold=0)
