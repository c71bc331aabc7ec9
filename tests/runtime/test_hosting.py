"""What all containers of an agent share is there for each of them, whichever launcher dies while it is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio
from trio.testing import MockClock

from mesocosm.kernel.contracts import ContainerSpec, EffectContext, HostFacts, Plan
from mesocosm.kernel.core.plan import Effect, Undo
from mesocosm.kernel.hookspecs import hookimpl
from mesocosm.kernel.testing.simulation import Simulation


def one(name: str, *command: str) -> dict[str, Any]:
    return {"container_id": name, "command": list(command)}


class Views:
    """Two things that every container needs and that are in the launcher, and one between them that takes a second."""

    name = "view_like"

    def __init__(self) -> None:
        self.made: list[str] = []

    @hookimpl
    def effect_kinds(self) -> list[Any]:
        return [self]

    def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        self.made.append(args["path"])
        return {}

    @hookimpl
    def host_effects(self, host: HostFacts) -> list[Effect]:
        slow = Effect("slow_thing", {"path": "host/slow", "seconds": 1.0}, (Undo("unlink", "host/slow"),))
        return [Effect("view_like", {"path": "one"}), slow, Effect("view_like", {"path": "two"})]

    @hookimpl
    def plan(self, container: ContainerSpec) -> Plan:
        return Plan()


async def test_what_a_launcher_that_dies_had_for_all_is_made_again_also_if_it_was_just_being_made(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    views = Views()
    simulation = Simulation(tmp_path, views)
    async with simulation.agent() as agent:
        await agent.launch_container(one("a", "sleep", "9999"))
    async with simulation.agent() as agent, trio.open_nursery() as nursery:
        views.made.clear()
        nursery.start_soon(agent.launch_container, one("b", "sleep", "9999"))
        await trio.sleep(0.5)
        assert views.made == ["one"]
        views.made.clear()  # with the launcher that had it
        simulation.launcher.die()
        await trio.sleep(10)
        assert simulation.launcher.deaths == 1
        assert set(views.made) == {"one", "two"}
        assert {line["id"] for line in agent.get_containers()} == {"a", "b"}
