"""What the launcher tells without being asked: started, ended, exec_failed. Gathered, so that it wakes the agent rarely.

Theory: each message wakes another process, which costs more than writing it. So what one turn of the launcher's loop finds
out is told in one message, and that a program has started waits for a moment: most short programs end within it, and
then both are told together. Order is kept: what happened to a container is told in the order in which it happened.
"""

from __future__ import annotations

import time
from typing import Any

from mesocosm.kernel.launcher.births import Birth
from mesocosm.kernel.launcher.line import Line

SOON = 0.002  # seconds that "started" may wait
_PIECE = 100  # pieces of news in a message


class News:
    """What has not been told yet."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._news: list[tuple[str, dict[str, Any]]] = []
        self._starting: dict[Birth, tuple[float, float]] = {}  # since when; when to tell it (monotonic)

    @property
    def is_waiting(self) -> bool:
        """Whether something will have to be told SOON."""
        return bool(self._starting)

    def add(self, kind: str, body: dict[str, Any]) -> None:
        """Something to tell at the end of this turn."""
        self._news.append((kind, body))

    def started(self, birth: Birth, since: float) -> None:
        """It runs; told a little later, or right before its end."""
        self._starting[birth] = since, time.monotonic() + SOON

    def ended(self, birth: Birth) -> None:
        """It has ended, as `birth.ended` says."""
        assert birth.ended is not None
        self._tell_started(birth)
        self.add("ended", birth.ended)

    def tell(self) -> None:
        """Says all that may not wait: at the end of a turn, and before every answer."""
        if self._starting:
            now = time.monotonic()
            for birth in [birth for birth, (_, due) in self._starting.items() if due <= now]:
                self._tell_started(birth)
        while self._news:
            self._line.send([0, "news", self._news[:_PIECE]])
            del self._news[:_PIECE]

    def _tell_started(self, birth: Birth) -> None:
        if (found := self._starting.pop(birth, None)) is not None:
            self.add("started", {"id": birth.id, "time": found[0]})
