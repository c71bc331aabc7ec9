"""Groups whose barrier has been opened and of which nobody has been seen to run yet: COMMITTED has a deadline, too.

Theory: nobody waits for the launcher to say that it has opened a barrier (an answer would come in the middle of all that
the programs then do); the first thing that is heard of a member confirms it. What is not confirmed in time is ended. One
task looks once a second, so a launch costs an entry in a dictionary and no timer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import trio

from mesocosm.kernel.core import states
from mesocosm.kernel.core.states import State

_LOOK = 1.0  # seconds


class Starting:
    """Ids of groups, and until when a member of each must have been heard of."""

    def __init__(self) -> None:
        self._deadlines: dict[str, float] = {}
        self._idle = trio.lowlevel.ParkingLot()

    def released(self, group_id: str) -> None:
        """The launcher has been told to open this group's barrier."""
        self._deadlines[group_id] = trio.current_time() + states.DEADLINES[State.COMMITTED][0]
        self._idle.unpark_all()

    def heard_of(self, group_id: str) -> None:
        """A member of it runs, or has ended."""
        self._deadlines.pop(group_id, None)

    def lost(self) -> list[str]:
        """The launcher died: nobody will be heard of any more. The groups that were waited for."""
        found = list(self._deadlines)
        self._deadlines.clear()
        return found

    async def watch(self, end: Callable[[str], None]) -> NoReturn:
        """Calls `end` with the id of each group that is late. Runs as long as the agent."""
        while True:
            if not self._deadlines:
                await self._idle.park()
            before = trio.current_time()
            await trio.sleep(_LOOK)
            now = trio.current_time()
            if (late := now - before - _LOOK) > _LOOK:  # this process stood still, and has not read what it was told meanwhile
                self._deadlines = {found: deadline + late for found, deadline in self._deadlines.items()}
            for group_id in [found for found, deadline in self._deadlines.items() if deadline <= now]:
                del self._deadlines[group_id]
                end(group_id)
