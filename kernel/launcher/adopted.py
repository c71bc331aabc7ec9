"""Containers of an earlier launcher, which was killed: not this one's children, but known to it like them.

What lives here: watching their pidfds, and finding out how they ended (`fate`). What must not: telling it (zygote.py).
They can be nested into, are in the inventory for every agent to come, and their ends are kept until acknowledged.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Iterator
from typing import Any

from mesocosm.kernel.launcher.births import Birth, Births
from mesocosm.kernel.launcher.fate import AGAIN, inquire
from mesocosm.kernel.launcher.reaped import Reaped
from mesocosm.kernel.linux.pidfds import is_of


class Adopted:
    """Those of them that have not ended, by the number of their pidfd."""

    def __init__(self, poll: select.epoll, births: Births, run_dir: int) -> None:
        self._poll = poll
        self._births = births
        self._reaped = Reaped(run_dir)
        self._by_pidfd: dict[int, tuple[Birth, str]] = {}
        self._ending: dict[int, float] = {}  # since when (monotonic) it has not been alive

    def owns(self, fd: int) -> bool:
        """Whether an event on `fd` is for `wake`."""
        return fd in self._by_pidfd

    def adopt(self, line: dict[str, Any], pidfd: int) -> bool:
        """Takes a container {id, barrier, pid, birth, note} over, with its pidfd; False if it was known already."""
        before = self._births.by_id.get(line["id"])
        if before is not None and not before.ended:
            if before.pid == line["pid"]:
                return False
            raise FileExistsError(errno.EEXIST, f"there is another container {line['id']}", line["id"])
        if not is_of(pidfd, line["pid"], line["birth"]):  # it was closed before it was sent, and its number another file's by then
            raise ProcessLookupError(errno.ESRCH, f"the descriptor is not that of {line['id']}", line["id"])
        if before is not None:
            self._births.forget(before)
        birth = Birth(line["id"], line["barrier"], 0, None, line["note"], None)
        birth.phase, birth.pid = "running", line["pid"]
        # Edges, not levels: between its death and its being reaped there is nothing to do but to look again from time to time.
        self._poll.register(pidfd, select.EPOLLIN | select.EPOLLET)  # fails, if at all, before anybody has its number
        self._births.foster(birth, pidfd)
        self._by_pidfd[pidfd] = birth, line["birth"]
        return True

    def as_lines(self) -> list[tuple[dict[str, Any], int]]:
        """What `adopt` takes, for the program that this process becomes."""
        return [
            ({"id": birth.id, "barrier": birth.barrier, "pid": birth.pid, "birth": identity, "note": birth.note}, pidfd)
            for pidfd, (birth, identity) in self._by_pidfd.items()
        ]

    def wake(self, pidfd: int) -> None:
        """It has ended, or has been reaped."""
        self._ending.setdefault(pidfd, time.monotonic())

    @property
    def again(self) -> float | None:
        """In how many seconds `ended` should be asked again; None: when something happens."""
        return AGAIN if self._ending else None

    def ended(self) -> Iterator[Birth]:
        """Those of which the end is known by now, with `ended` filled in."""
        now = time.monotonic()
        for pidfd, since in list(self._ending.items()):
            birth, identity = self._by_pidfd[pidfd]
            found = inquire(birth.id, pidfd, birth.pid, identity, self._reaped, now - since)
            if found is not None:
                self._poll.unregister(pidfd)  # the agent has this open file as well, so closing our number would not do
                del self._ending[pidfd], self._by_pidfd[pidfd]
                birth.ended = found
                yield birth
