"""Launches on their way, and how long each of their states has lasted: PLANNED to STAGED have deadlines, too.

Theory: a launch takes milliseconds, so its states are looked at once a second, and only of those that are still there then.
That costs a launch an entry in a dictionary and no timer; a state may last up to a second longer than its deadline says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import trio

from mesocosm.kernel.core import states
from mesocosm.kernel.core.errors import DeadlineError
from mesocosm.kernel.core.states import State

if TYPE_CHECKING:
    from mesocosm.kernel.runtime.launch import Launch

_LOOK = 1.0  # seconds


class Launching:
    """By launch: since when its group and each of its members have been seen in the state in which they are."""

    def __init__(self) -> None:
        self._seen: dict[Launch, dict[str, tuple[State, float]]] = {}
        self._idle = trio.lowlevel.ParkingLot()

    def begin(self, launch: Launch) -> None:
        """It is admitted: from now on it is looked at."""
        self._seen[launch] = {}
        self._idle.unpark_all()

    def over(self, launch: Launch) -> None:
        """It runs, or nothing of it is left."""
        self._seen.pop(launch, None)

    async def watch(self, run: Callable[[Launch], None]) -> NoReturn:
        """Gives up each launch of which something is overdue; `run` is to see one to its end that nobody runs.

        Runs as long as the agent.
        """
        while True:
            if not self._seen:
                await self._idle.park()
            before = trio.current_time()
            await trio.sleep(_LOOK)
            now = trio.current_time()
            late = now - before - _LOOK  # more than a moment: this process stood still, and did nothing for anybody meanwhile
            for launch, seen in list(self._seen.items()):
                for name, state in [("the group", launch.transaction.state), *launch.transaction.states()]:
                    last, since = seen.get(name, (None, now))
                    since = since + late if last is state else now
                    seen[name] = (state, since)
                    if state in states.DEADLINES and now - since >= states.DEADLINES[state][0]:
                        _give_up(launch, name, state)
                        if not launch.begun:
                            run(launch)
                        break


def _give_up(launch: Launch, name: str, state: State) -> None:
    """The event of the table. A launch that is being undone already has parked what is left when its time is over."""
    seconds, event = states.DEADLINES[state]
    what = f"the launch took too long and was undone: {name} was {state} for all of its time"
    late = DeadlineError(what, id=launch.group.event_id, have=f"{seconds:g} s")
    if event == "kill":
        launch.cancel(late)
    elif event == "failed":
        launch.member_ended(launch.group.event_id, late)
