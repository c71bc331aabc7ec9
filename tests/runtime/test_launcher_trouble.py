"""A launcher that falls silent, says nonsense, fails or is gone, at each of the requests of a launch, one after the other.

Whatever it does, the agent goes on, the group is whole or gone within its deadlines, and a launcher that has come to its
senses serves the next launch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import LaunchError, MesoError
from mesocosm.kernel.core.states import State
from mesocosm.kernel.launcher.contract import Ended, ExecFailed, NotReleased, Started
from mesocosm.kernel.testing.simulated_launcher import SimulatedLauncher
from mesocosm.kernel.testing.simulation import Simulation

POD = {"name": "web", "tasks": [{"name": "a", "command": ["sleep", "9999"]}, {"name": "b", "command": ["sleep", "9999"]}]}
BROKEN = {**POD, "tasks": [*POD["tasks"], {"name": "c", "command": ["missing"]}]}
REQUESTS = ("view", "stage", "release", "abort", "acknowledge")


async def falls_silent() -> None:
    await trio.sleep_forever()


async def fails() -> None:
    raise LaunchError("the launcher could not", errno="EIO")


async def is_broken() -> None:
    raise ValueError("not even an error of ours")


async def says_nonsense() -> Any:
    return None


class Trouble:
    """What becomes of the `at`-th request to a launcher."""

    def __init__(self, launcher: SimulatedLauncher, at: int, trouble: Callable[[], Any]) -> None:
        self.left, self._trouble, self.hit = at, trouble, ""
        for name in REQUESTS:
            setattr(launcher, name, self._around(name, getattr(launcher, name)))

    def _around(self, name: str, request: Callable[..., Any]) -> Callable[..., Any]:
        async def asked(*args: Any, **more: Any) -> Any:
            self.left -= 1
            if not self.left:
                self.hit = name
                return await self._trouble()
            return await request(*args, **more)

        return asked


@pytest.mark.parametrize("trouble", [falls_silent, fails, is_broken, says_nonsense])
@pytest.mark.parametrize("pod", [POD, BROKEN], ids=["one that could start", "one that could not"])
async def test_trouble_at_any_request_of_a_launch_leaves_a_whole_group_or_none(
    tmp_path: Path, aftermath: Any, autojump_clock: MockClock, pod: dict[str, Any], trouble: Callable[[], Any]
) -> None:
    hit = set()
    for number in range(1, 100):
        (tmp_path / str(number)).mkdir()
        simulation = Simulation(tmp_path / str(number))
        async with simulation.agent() as agent:
            await agent.launch_group({"name": "other", "tasks": [{"name": "a", "command": ["sleep", "99999"]}]})
            after = aftermath(simulation, agent)
            found = Trouble(simulation.launcher, number, trouble)
            error: MesoError | None = None
            began = trio.current_time()
            try:
                await agent.launch_group(pod)
            except MesoError as caught:
                error = caught
            took = trio.current_time() - began
            state = await after.of("web", ("web",))
            found.left = 0  # what comes later has no trouble

            if found.hit in ("", "acknowledge", "abort"):
                assert state is (State.RUNNING if pod is POD else State.ROLLED_BACK)
            elif found.hit == "stage":
                assert state is State.ROLLED_BACK
                assert error is not None
                assert error.fields["id"].startswith("web")
            elif trouble is not says_nonsense:  # a release whose answer nobody waits for: had it been opened, it would have started
                assert state is State.DEAD
                assert "web" not in simulation.launcher.started
            assert took <= 60 + 10, "no longer than PREPARING and an abort may take"
            hit.add(found.hit)
            if state is not State.ROLLED_BACK:
                if state is State.RUNNING:
                    await agent.kill_container("web")
                await agent.wait_container("web")
            await agent.launch_group({"name": "web", "tasks": [{"name": "a", "command": ["exit", "0"]}]})
            assert (await agent.wait_container("web"))["group"]["exit"] == 0
        if not found.hit:
            break
    assert {"stage", "release" if pod is POD else "abort", ""} <= hit


@pytest.mark.parametrize("trouble", [falls_silent, fails])
async def test_an_acknowledgement_that_could_not_be_told_is_told_later_and_nobody_waits_for_it_for_ever(
    simulation: Simulation, autojump_clock: MockClock, trouble: Callable[[], Any]
) -> None:
    async with simulation.agent() as agent:
        original = simulation.launcher.acknowledge
        simulation.launcher.acknowledge = lambda _: trouble()  # type: ignore[method-assign]
        await agent.launch_group({**POD, "tasks": [{"name": "a", "command": ["exit", "0"]}]})
        await agent.wait_container("web")
        with trio.fail_after(60), pytest.raises(LaunchError):
            await agent.launch_group(POD)

        simulation.launcher.acknowledge = original  # type: ignore[method-assign]
        await trio.sleep(60)

        assert (await agent.launch_group(POD))["state"] == "RUNNING"


@pytest.mark.parametrize(
    "notice",
    [
        Started("nobody", 1.0),
        Started("other", -1.0),
        Ended("nobody", 0, 0, 0, 0, 0.0),
        ExecFailed("nobody", {}),
        NotReleased("no such barrier", ""),
    ],
    ids=str,
)
async def test_a_notice_about_nobody_changes_nothing(
    simulation: Simulation, aftermath: Any, autojump_clock: MockClock, notice: Any
) -> None:
    async with simulation.agent() as agent:
        await agent.launch_group({"name": "other", "tasks": [{"name": "a", "command": ["sleep", "99999"]}]})
        after = aftermath(simulation, agent)
        simulation.launcher.send.send_nowait(notice)
        await agent.launch_group(POD)
        assert await after.of("web", ("web",)) is State.RUNNING
