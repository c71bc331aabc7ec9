"""Which file systems that somebody serves, and may stop serving, are mounted in this process's view.

Theory: a call on such a file system can wait for ever, in a state that no signal ends. Whether a path is near one is asked
before every undo, so that costs one poll(2): the kernel says by it that the mount table has changed, proc(5).
"""

from __future__ import annotations

import os
import select
from functools import cache

from mesocosm.kernel.linux.holding import is_at_or_below, is_served, mounts_of


class Served:
    """The mount points of such file systems, as they are now."""

    def __init__(self) -> None:
        self._points: list[str] = []
        self._is_read = False
        self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLPRI)

    def touches(self, path: str) -> bool:
        """Whether a path is on such a file system, or one is mounted at or below it. By text: no file system is asked."""
        if not self._is_read or self._poll.poll(0):
            self._read()
        return any(is_at_or_below(path, point) or is_at_or_below(point, path) for point in self._points)

    def leads_to(self, path: str) -> bool:
        """Whether a path ends on such a file system, by way of its links, too; nothing that lies on one is asked for any."""
        if not self.touches("/"):
            return False
        left, at, links = [part for part in path.split("/") if part][::-1], "", 0
        while left and links < 40:
            part = left.pop()
            step = os.path.normpath(f"{at}/{part}")
            if any(is_at_or_below(step, point) for point in self._points):
                return True
            try:
                target = os.readlink(step)
            except OSError:
                at = step
                continue
            links += 1
            left += [each for each in target.split("/") if each][::-1]
            at = "" if target.startswith("/") else at
        return False

    def _read(self) -> None:
        self._is_read = True
        self._points = [mount.point for mount in mounts_of("self") if is_served(mount.type)]

    def close(self) -> None:
        """Gives the descriptor back."""
        os.close(self._fd)


@cache
def ours() -> Served:
    """The one of this process, with a descriptor that stays open."""
    return Served()
