"""One simulated host per test, on a clock that jumps over waiting; something that happens at the n-th step; what is left then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from mesocosm.kernel.core.names import is_within
from mesocosm.kernel.core.states import ENDED, State
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.world import Group
from mesocosm.kernel.testing.simulation import Simulation

LONG = 300.0  # seconds, more than any deadline and all of them together


@pytest.fixture
def simulation(tmp_path: Path) -> Simulation:
    """An empty simulated host."""
    return Simulation(tmp_path)


@pytest.fixture
def autojump_clock() -> trio.testing.MockClock:
    """pytest-trio runs the test on this clock when the fixture is asked for."""
    return trio.testing.MockClock(autojump_threshold=0)


class AtStep(trio.abc.Instrument):
    """Calls `act` after the `number`-th step that any task of this loop makes; `struck` tells whether it came to that."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self._left, self._act, self.struck = number, act, False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Trio's own hook: between two steps nobody runs, so what is done here comes from outside."""
        self._left -= 1
        if not self._left:
            self.struck = True
            self._act()


@pytest.fixture
def at_step() -> Callable[[int, Callable[[], object]], object]:
    """``with at_step(3, scope.cancel) as step:`` does it after the third step of the block; ``step.struck`` if there was one."""

    @contextmanager
    def watching(number: int, act: Callable[[], object]) -> Iterator[AtStep]:
        instrument = AtStep(number, act)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield instrument
        finally:
            trio.lowlevel.remove_instrument(instrument)

    return watching


class Aftermath:
    """What there is on a simulated host once nothing moves any more, and whether all parts agree on it.

    Made before whatever is tried; `of` looks afterwards. It knows the insides of an agent on purpose: what is forgotten
    there is found here, and not by the next launch that stumbles over it.
    """

    def __init__(self, simulation: Simulation, agent: Agent, *, doomed: str = "", stray: str = "") -> None:
        """`doomed`: a group that is not to go on, beside the one that is looked at. `stray`: what is undone once more, later."""
        self._simulation, self._agent, self._doomed, self._stray = simulation, agent, doomed, stray
        world = agent.world
        world.ledger.flush()
        self._left = set(simulation.leftovers)
        living = [cell for cell in world.cells.values() if world.tree.state(cell.id) is not State.DEAD]
        self._others = {cell.id: cell.pid for cell in living if not is_within(cell.id, doomed)}
        self._over = {group for group in world.groups.values() if group.over.is_set()}
        self._since = world.ledger.seq
        self._done = len(simulation.machine.history)

    async def of(self, group_id: str, roots: tuple[str, ...]) -> State | None:
        """The state of the group whose first containers are `roots`, None if nobody knows it; fails unless it is whole or gone."""
        await trio.sleep(LONG)
        world, launcher = self._agent.world, self._simulation.launcher
        world.ledger.flush()
        group = world.groups.get(group_id)
        state = None if group is None else group.state

        def is_mine(container_id: str) -> bool:
            return any(is_within(container_id, root) for root in roots)

        def of_others(paths: Iterable[str]) -> set[str]:
            found = {path: path.split("/")[1] for path in paths}
            return {path for path, owner in found.items() if not is_mine(owner) and not is_within(owner, self._doomed)}

        self._nobody_works_on_anything()
        self._books_agree()
        mine = [found for found in world.tree if is_mine(found)]
        left = {path for path in self._simulation.leftovers if is_mine(path.split("/")[1])}
        assert of_others(self._simulation.leftovers) == of_others(self._left)
        living = {found for found in launcher.living if is_mine(found)}
        assert {
            found for found in launcher.living if found not in living and not is_within(found, self._doomed)
        } == self._others.keys()
        if state is State.RUNNING:
            assert {world.tree.state(found) for found in mine} == {State.RUNNING}
            assert living == set(mine) <= set(launcher.started)
        else:
            assert {world.tree.state(found) for found in mine} <= {State.DEAD}
            assert living == set()
            assert all(path.startswith("dir/") for path in left), left  # what is kept of those that ran
        if state in (None, State.ROLLED_BACK):
            assert left == set()
        if state is None:
            assert mine == []
        if state is State.ROLLED_BACK:
            assert group is not None
            self._undone_in_reverse(group)
        self._told_once(group_id, state if group not in self._over else None)
        assert {found: world.cells[found].pid for found in self._others} == self._others
        assert {world.tree.state(found) for found in self._others} <= {State.RUNNING}
        return state

    def _nobody_works_on_anything(self) -> None:
        world = self._agent.world
        assert [group.id for group in world.groups.values() if group.launch is not None] == []
        assert [cell.id for cell in world.cells.values() if cell.launches] == []
        assert (world.removing, world.pruning, self._agent._hosting._lock.locked()) == (set(), False, False)

    def _books_agree(self) -> None:
        """Tree, cells, counts, ids, descriptors and the ledger's rows tell of the same containers."""
        world = self._agent.world
        alive = {cell.id for cell in world.cells.values() if world.tree.state(cell.id) is not State.DEAD}
        assert set(world.tree) == set(world.cells) == {member for group in world.groups.values() for member in group.members}
        assert world.living == len(alive)
        assert len(world.ids._used) == sum(1 for found in alive if world.cells[found].base is not None)
        assert self._simulation.machine.open == {cell.pidfd for cell in world.cells.values() if cell.pidfd is not None}
        rows = {row.id: row.state for row in world.ledger.containers()}
        assert rows.keys() == world.cells.keys()
        assert {found for found, state in rows.items() if state != State.DEAD.value} == alive
        assert {row[0]: State(row[3]) in ENDED for row in world.ledger.groups()} == {
            group.id: group.state in ENDED for group in world.groups.values()
        }
        assert {found for found in world.ledger.entries() if found} <= rows.keys()
        assert world.ledger.parked() == []

    def _undone_in_reverse(self, group: Group) -> None:
        """What was made of what was meant to be, once, in exactly the reverse order; nothing that was never begun."""
        cells = [self._agent.world.cells[member] for member in group.members]
        meant = [
            undo.target for cell in cells for effect in cell.plan.effects for undo in effect.undo if undo.verb != "kill_cgroup"
        ]
        history = self._simulation.machine.history[self._done :]
        undone = [path for what, path in history if what == "undo" and not path.startswith("host/")]
        undone = [path for path in undone if not path.endswith(f"/{self._doomed}") and path not in self._left - set(meant)]
        if undone.count(self._stray) == 2:
            assert undone.pop() == self._stray
        made = {path for what, path in history if what == "do"}
        own: list[str] = []  # as much of the end as is in the reverse order: one that failed may have made something all the same
        while undone and undone[-1] in meant[meant.index(own[-1]) + 1 if own else 0 :]:
            own.append(undone.pop())
        assert made.intersection(meant) <= set(own)
        assert set(undone) <= self._left, "what is more was in the way before"

    def _told_once(self, group_id: str, state: State | None) -> None:
        """One `end`, the last word, of a group that began and ended since; no gaps and nobody dead twice."""
        since, lines = self._since, []
        while since < self._agent.world.ledger.seq:
            since, more = self._agent.world.journal.read(since)
            lines += more
        assert [line["seq"] for line in lines] == list(range(self._since + 1, since + 1))
        ends = [line["state"] for line in lines if line["type"] == "end" and line.get("group", line["id"]) == group_id]
        assert ends == ([state] if state in ENDED else [])
        assert max(Counter(line["id"] for line in lines if line["type"] == "dead").values(), default=1) == 1


@pytest.fixture
def aftermath() -> type[Aftermath]:
    """``after = aftermath(simulation, agent)`` before, ``state = await after.of("web", ("web",))`` afterwards."""
    return Aftermath
