"""Staying reachable: an agent whose socket, or whole run directory, has been removed under it.

What lives here: noticing it, and what is done then. What must not: serving. Theory: whoever removes files of a run directory
means to tidy up, and what runs must not be lost by that. A socket's name that is gone is bound anew, at once, before a verb
could find none and start another agent. A directory that is gone is made again, with a lock and a socket in it. But where the
ledger or the launcher's socket has gone, no agent after this one could find what runs: this one is *adrift*. It shows, waits
for and ends what runs, starts nothing new (the ledger refuses), and does not go before that has ended: SIGTERM ends it first.
Where another agent has the new directory already, this one has no name any more, and its log says how to end it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import trio

from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.linux.watching import drain, watch_removals
from mesocosm.kernel.runtime.locking import Lock, lock
from mesocosm.kernel.wire.listening import Listener, Place, bind

log = logging.getLogger("mesocosm.agent")
LOOK_SECONDS = 0.5  # between two looks, where nobody tells us of removals
SERVES = b"serves\n"  # in the lock's file, once there is a socket: who finds the lock held and no socket need not wait for one


class Berth:
    """Where an agent is to be found: its run directory, its lock, its listener.

    `is_removed`: whether the ledger's directory has been. The locks are held until the process ends.
    """

    def __init__(self, run_dir: str, held: Lock, listener: Listener, is_removed: Callable[[], bool]) -> None:
        self._run_dir = run_dir
        self._listener = listener
        self._is_removed = is_removed
        self._launcher = os.path.join(run_dir, "launcher.sock")
        self._mode = os.stat(run_dir).st_mode & 0o777
        self._said = ""
        self._held = [held]
        held.note(SERVES)

    @property
    def is_adrift(self) -> bool:
        """Whether an agent after this one could not find what runs."""
        return self._is_removed() or not os.path.lexists(self._launcher)

    async def keep(self) -> NoReturn:
        """Looks, and puts right what can be, for as long as the agent serves."""
        while True:
            fd = self._watch()
            try:
                while self._is_in_place():  # after the watch began: what was removed before it is seen now
                    if fd is None:
                        await trio.sleep(LOOK_SECONDS)
                        continue
                    await trio.lowlevel.wait_readable(fd)
                    drain(fd)
                self._return()
            except (MesoError, OSError) as error:
                gone = f"{self._listener.path} cannot be bound anew ({self._listener.place.value}): {error}"
                self._say(f"{gone}; kill -TERM {os.getpid()} ends this agent")
                await trio.sleep(LOOK_SECONDS)
            finally:
                if fd is not None:
                    os.close(fd)

    def _watch(self) -> int | None:
        try:
            return watch_removals({self._run_dir, str(self._listener.path.parent)})
        except OSError:
            return None

    def _is_in_place(self) -> bool:
        return self._listener.place is Place.NAMED

    def _return(self) -> None:
        path, place = self._listener.path, self._listener.place
        if place is not Place.NAMELESS and path.parent == Path(self._run_dir):
            if place is Place.NOWHERE:
                os.mkdir(self._run_dir, self._mode)
            self._held.append(lock(self._run_dir))  # never closed: who has it is the agent
            self._held[-1].note(SERVES)
        self._listener.take_over(bind(path))
        self._said = ""
        self._say(f"{path} had been removed: bound anew" + (f". {_ADRIFT}" if self.is_adrift else ""))

    def _say(self, words: str) -> None:
        if words != self._said:
            log.warning("%s", words)
        self._said = words


_ADRIFT = (
    "Ledger or launcher.sock had been, too: what runs can be seen, waited for and ended, nothing new starts, and meso agent --stop"
    " (or SIGTERM) ends it all"
)
