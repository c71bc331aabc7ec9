"""A whole simulated host with agents on it: start one, let it die, start the next on the same ledger.

What lives here: `Simulation`, which holds what survives an agent (machine, launcher, ledger file), and `agent`, which
lives as long as its block. Leaving the block is kill -9 as far as containers are concerned: nothing is ended, nothing
is undone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from mesocosm.kernel.core.host import HostFacts
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.runtime.recording import Recorder
from mesocosm.kernel.testing.simulated import SimulatedMachine, simulated_host
from mesocosm.kernel.testing.simulated_launcher import SimulatedLauncher
from mesocosm.kernel.testing.simulated_plugins import simulated_plugins


class Simulation:
    """A machine, its launcher and a ledger in `directory`; `plugins` are further isolators. With `history`, a durable one, too."""

    def __init__(
        self, directory: Path, *plugins: Any, host: HostFacts | None = None, delay: float = 0.0, history: bool = False
    ) -> None:
        self.machine = SimulatedMachine()
        self.launcher = SimulatedLauncher(self.machine, delay=delay)
        self.ledger = str(directory / "ledger.db")
        self.host = host or simulated_host()
        self._plugins = plugins
        self._history = str(directory / "history.db") if history else None

    @asynccontextmanager
    async def agent(self, fault: str = "") -> AsyncIterator[Agent]:
        """An agent, recovered and running. Programs run and end while there is one."""
        self.launcher.connect()
        self.machine.open.clear()  # whatever an earlier agent had open was closed by its death
        made = Agent(
            host=self.host, plugins=simulated_plugins(self.machine, *self._plugins), launcher=self.launcher, ledger=self.ledger,
            machine=self.machine, precheck=None, fault=fault, history=self._record if self._history else None,
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.launcher.run)
            await nursery.start(made.run)
            try:
                yield made
            finally:
                nursery.cancel_scope.cancel()

    def _record(self, ledger: Ledger) -> Recorder:
        """Without threads, which would be beside a clock that jumps."""
        assert self._history is not None
        return Recorder(self._history, ledger, self.host.boot_id, aside=_at_once, clock=self.machine.time)

    @property
    def leftovers(self) -> list[str]:
        """What is there now that was made for a container (and not for all of them)."""
        return [path for path in self.machine.things if not path.startswith("host/")]


async def _at_once(work: Callable[[], None]) -> None:
    work()
