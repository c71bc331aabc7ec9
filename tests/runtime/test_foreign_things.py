"""Somebody else's thing in a place that a launch wants: it stays, whoever is killed and whenever.

A launch is carried out once. At each of its moments (before and after every transaction of the ledger and every effect, made,
refused or undone) a copy of all that outlives an agent is taken, as if everybody had been killed then; in each copy a new
agent recovers. The control: without a foreign thing nothing is left in any copy, and with it, nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trio.testing import MockClock

from mesocosm.kernel.core.errors import ConflictError, LaunchError
from mesocosm.kernel.runtime.ledger import HOST, Ledger
from mesocosm.kernel.testing.simulated import FOREIGN, SimulatedMachine
from mesocosm.kernel.testing.simulation import Simulation

POD: dict[str, Any] = {
    "name": "web",
    "labels": {"slow": "1"},
    "tasks": [{"name": "a", "command": ["sleep", "9"], "labels": {"slow": "2"}}, {"name": "b", "command": ["sleep", "9"]}],
}
PLACES = [
    f"{kind}/{found}" for found in ("web", "web.a", "web.b") for kind in ("dir", "cgroup")
] + ["slow/web/0", "slow/web.a/0", "slow/web.a/1"]  # fmt: skip


class Moments:
    """Copies of what there is, each in a directory of its own."""

    def __init__(self, simulation: Simulation, directory: Path) -> None:
        self._simulation, self._directory = simulation, directory
        self.late = self.trigger = ""  # what somebody else makes, and in which moment
        self.copies: list[Simulation] = []
        self.names: list[str] = []

    def take(self, name: str) -> None:
        if name == self.trigger:
            self._simulation.machine.things[self.late] = FOREIGN
        directory = self._directory / str(len(self.copies))
        directory.mkdir()
        copy = Simulation(directory)
        copy.machine.things = dict(self._simulation.machine.things)
        for path in Path(self._simulation.ledger).parent.glob("ledger.db*"):
            shutil.copy(path, directory)
        self.copies.append(copy)
        self.names.append(name)


@pytest.fixture
def moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Simulation, Moments]]:
    """A simulated host whose moments are copied from when `begin` is called."""
    (tmp_path / "copies").mkdir()
    simulation = Simulation(tmp_path)
    found = Moments(simulation, tmp_path / "copies")

    def begin() -> tuple[Simulation, Moments]:
        def around(what: type[Any], name: str) -> None:
            plain = getattr(what, name)

            def watched(this: Any, *args: Any) -> Any:
                if this is not simulation.machine and getattr(this, "path", None) != simulation.ledger:
                    return plain(this, *args)
                found.take(f"before {name} {args}")
                try:
                    return plain(this, *args)
                finally:
                    found.take(f"after {name} {args}")

            monkeypatch.setattr(what, name, watched)

        around(SimulatedMachine, "make")
        around(SimulatedMachine, "undo")
        around(Ledger, "__exit__")
        return simulation, found

    return begin


async def left_of(copy: Simulation) -> dict[str, str]:
    """What there is when the next agent has recovered and all of its own is ended."""
    async with copy.agent() as agent:
        assert {line["state"] for line in agent.get_containers(include_dead=True)} <= {"DEAD"}
        assert agent.world.ledger.parked() == []
        await agent.stop_agent()
        assert {found for found in agent.world.ledger.entries() if found == HOST} == set()
    return copy.machine.things


@pytest.mark.parametrize("place", ["", "host/shared", *PLACES])
async def test_what_was_there_before_a_launch_is_there_after_it_whenever_everybody_was_killed(
    moments: Any, place: str, autojump_clock: MockClock
) -> None:
    simulation, found = moments()
    foreign = {place: FOREIGN} if place else {}
    simulation.machine.things.update(foreign)
    async with simulation.agent() as agent:
        if place:
            with pytest.raises(ConflictError):
                await agent.launch_group(POD)
        else:  # it has to be rolled back, too
            with pytest.raises(LaunchError):
                await agent.launch_group({**POD, "tasks": [*POD["tasks"], {"name": "c", "command": ["missing"]}]})
    for name, copy in zip(found.names, found.copies, strict=True):
        assert await left_of(copy) == foreign, name
    assert len(found.copies) > (7 if place else 40)


@pytest.mark.parametrize("moment", ["dir/web", ""])
@pytest.mark.parametrize("place", [found for found in PLACES if not found.startswith("slow")])
async def test_who_comes_between_the_intent_and_an_effect_is_known_by_what_its_kind_says(
    moments: Any, place: str, moment: str, autojump_clock: MockClock
) -> None:
    """Right after the intent, or right before the effect; and an agent that was killed before they have met has a successor."""
    simulation, found = moments()
    found.late, found.trigger = place, f"before make ('thing', '{moment or place}')"
    async with simulation.agent() as agent:
        with pytest.raises(ConflictError):
            await agent.launch_group(POD)
    since = found.names.index(found.trigger)
    for name, copy in list(zip(found.names, found.copies, strict=True))[since:]:
        assert await left_of(copy) == {place: FOREIGN}, name
    assert len(found.copies) > since + 2
