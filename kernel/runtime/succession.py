"""A launcher that died, and the next one: what becomes of launches, and of who lives.

Theory: containers do not need their launcher, but they need somebody who hears of their end. Between two launchers that is
the agent, which has a pidfd of each; then the next launcher is given all of them (`adopt`), knows them like its own, and
later agents find them there. What was being launched is given up: its barrier is gone, so nobody behind it has run or
will. Only of a group whose barrier was to be opened at that very moment nobody can say: its members tell, by the way
they end (`supervisor.tell_ended`), or by going on.

If no launcher can be started, launches are refused with the reason, and each tries again. One that dies again and again is
started again by launches only.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import trio

from mesocosm.kernel.core.errors import LaunchError, MesoError
from mesocosm.kernel.core.states import State
from mesocosm.kernel.core.supervision import SIGKILL
from mesocosm.kernel.launcher.contract import Launched, Orphan
from mesocosm.kernel.runtime import supervisor, unexecuted
from mesocosm.kernel.runtime.endings import LEAVING
from mesocosm.kernel.runtime.world import Cell, World

_FIRST_TRY, _LAST_TRY = 0.05, 60.0  # seconds between attempts at an upgrade
_ANSWER, _LAST_ANSWER = 10.0, 30.0  # seconds; the last one waits for those before it
_AT_ONCE = 100  # containers told of in one message
_OFTEN = 3  # deaths
_SOON = 10.0  # seconds in which so many of them are too many


class Succession:
    """Of the launchers of one agent. `renewed` is called when there is a new one, which has nothing of what all share."""

    def __init__(self, world: World, renewed: Callable[[], None]) -> None:
        self._world = world
        self._renewed = renewed
        self._lock = trio.Lock()
        self._deaths: list[float] = []
        self._watched: dict[Cell, trio.CancelScope] = {}

    def lost(self) -> None:
        """The launcher is gone. Nothing is waited for here."""
        world = self._world
        world.launcher_gone = True
        self._deaths.append(trio.current_time())
        until = trio.current_time() + LEAVING
        for group in list(world.groups.values()):
            if group.launch is not None and not group.launch.finished.is_set():
                if group.launch.transaction.committed:
                    world.unsure[group.id] = until
                elif group.launch.transaction.state is not State.PLANNED:  # else it has not needed one yet
                    hint = "launch it again: a new launcher is started"
                    group.launch.lose_launcher(LaunchError("the launcher died during the launch", id=group.event_id, hint=hint))
        world.unsure.update(dict.fromkeys(world.starting.lost(), until))
        assert world.nursery is not None
        for cell in world.cells.values():
            if cell.pidfd is not None and not cell.gone.is_set() and cell not in self._watched and is_kept(cell):
                self._watched[cell] = trio.CancelScope()
                world.nursery.start_soon(self._watch, cell, self._watched[cell])
        often = len(self._deaths) >= _OFTEN and self._deaths[-1] - self._deaths[-_OFTEN] < _SOON
        if world.living and not often:
            world.nursery.start_soon(self._ensure_quietly)

    async def _watch(self, cell: Cell, scope: trio.CancelScope) -> None:
        with scope, suppress(trio.ClosedResourceError):  # closed: somebody else has told its end
            if not cell.gone.is_set():
                ended = await self._world.machine.how_it_ended(cell.id, cell.pidfd, cell.pid or 0, cell.birth)
                if not cell.gone.is_set():
                    supervisor.tell_ended(self._world, cell, ended)
        if self._watched.get(cell) is scope:
            del self._watched[cell]

    async def _ensure_quietly(self) -> None:
        try:
            await self.ensure()
        except MesoError as error:  # the next launch tries again, and is told
            traceback.print_exception(error)

    async def ensure(self) -> None:
        """A launcher that serves and knows all who live; MesoError if there is none and none can be started."""
        async with self._lock:
            world = self._world
            while world.launcher_gone:
                deaths = len(self._deaths)
                await world.launcher.renew()
                await self._introduce()
                if deaths != len(self._deaths):
                    raise LaunchError("the launcher that was started has died as well", hint="launcher.log may tell why")
                world.launcher_gone = False
                for scope in self._watched.values():  # the launcher watches them now
                    scope.cancel()
                self._watched.clear()

    async def _introduce(self) -> None:
        """To a launcher that has just been found, started or changed."""
        self._renewed()
        with _answering(_ANSWER):
            await adopt(self._world, {line.container_id: line for line in await self._world.launcher.inventory()})

    async def stop(self) -> None:
        """Ends the launcher, also one that is just being started: else it would wait for somebody. MesoError if it refuses, or
        does not answer."""
        with _answering(_LAST_ANSWER):
            async with self._lock:
                if not self._world.launcher_gone:
                    await self._world.launcher.stop()

    async def keep_current(self) -> None:
        """A launcher of another build, which an agent that was replaced has left, becomes one of ours once nothing is starting."""
        wait = _FIRST_TRY
        while True:
            world = self._world
            while not world.launcher_gone and world.launcher.is_outdated:
                async with self._lock:
                    try:
                        with _answering(_LAST_ANSWER):
                            if await self._upgrade():
                                break
                    except MesoError as error:
                        traceback.print_exception(error)
                        await trio.lowlevel.checkpoint()  # if it died, and that was told, this has been heard by now
                        if not world.launcher_gone:
                            self.lost()  # whoever serves now, if anybody, knows nothing of us
                await trio.sleep(wait)
                wait = min(wait * 2, _LAST_TRY)
            await trio.sleep(_LAST_TRY)

    async def _upgrade(self) -> bool:
        world = self._world
        if any(group.launch is not None for group in world.groups.values()) or not await world.launcher.upgrade():
            return False
        await self._introduce()
        return True


@contextmanager
def _answering(seconds: float) -> Iterator[None]:
    """LaunchError if what is inside takes longer. A launcher may have been stopped, and each of its callers waits for it."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        hint = "is it stopped? launcher.log may tell why"
        raise LaunchError(f"the launcher did not answer within {seconds:.0f} s", hint=hint) from None


async def adopt(world: World, inventory: dict[str, Launched]) -> None:
    """Tells a launcher about all who live and are not its own; hears from it about those that are."""
    for line in inventory.values():
        if line.pidfd is not None:
            world.machine.close(line.pidfd)  # we have our own
    barriers = {line.barrier for line in inventory.values() if line.phase in ("staging", "staged")}
    for barrier in barriers:  # the same launcher as before, only its line was cut: what was given up has to go there, too
        group = next((found for found in world.groups.values() if found.barrier == barrier), None)
        if group is not None and group.state in (State.RUNNING, State.COMMITTED):
            await world.launcher.release(barrier, wait=False)
        else:
            await world.launcher.abort(barrier)
    for line in inventory.values():
        cell = world.cells.get(line.container_id)
        if cell is not None and cell.pid == line.pid and line.phase in ("running", "ended"):
            world.starting.heard_of(cell.group.id)  # who would have told of it may be gone
        if cell is not None and not cell.dead.is_set() and unexecuted.find(world, cell, line):
            supervisor.end_group(world, cell.group, "group")
        if line.ended is not None and (cell is None or cell.dead.is_set()):
            world.acknowledge_soon(line.container_id)
        elif line.ended is not None and cell is not None and not cell.gone.is_set() and cell.pid == line.pid:
            supervisor.tell_ended(world, cell, line.ended)
    left = [cell for cell in world.cells.values() if not cell.gone.is_set() and cell.id not in inventory and is_kept(cell)]
    for first in range(0, len(left), _AT_ONCE):
        orphans = [
            Orphan(cell.id, cell.pid, cell.pidfd, cell.birth, cell.group.barrier)
            for cell in left[first : first + _AT_ONCE]
            if cell.pidfd is not None and cell.pid and not cell.gone.is_set()  # it may end while the others are told of
        ]
        if orphans:
            await world.launcher.adopt(orphans)


def is_kept(cell: Cell) -> bool:
    """Whether it is not just being undone with the rest of its launch."""
    launch = cell.group.launch
    return launch is None or launch.finished.is_set() or launch.transaction.committed


async def end_left(world: World, cells: Iterable[Cell]) -> None:
    """Without the launcher that would have reaped them: back when those that it had staged are gone, before their things go."""
    with trio.move_on_after(LEAVING):
        for cell in cells:
            if cell.pidfd is not None:
                with suppress(ProcessLookupError):
                    world.machine.signal(cell.pidfd, SIGKILL)
                await world.machine.gone(cell.pidfd)
