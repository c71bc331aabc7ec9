"""What the launcher has answered to a request, and the task of the agent's that waits for it."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import trio


class Answer(NamedTuple):
    """What the launcher answered; the descriptors are owned by whoever asked."""

    kind: str
    body: dict[str, Any]
    fds: list[int]


class Pending:
    """A request that has not been answered to its end: what came, and the task that waits for more."""

    __slots__ = ("_task", "answers", "closed")

    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()
        self.closed = False
        self._task: trio.lowlevel.Task | None = None

    def put(self, answer: Answer | None) -> None:
        """The next piece; None: there will be none."""
        if answer is None:
            self.closed = True
        else:
            self.answers.append(answer)
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def next(self) -> Answer | None:
        """The next piece, None if there is no launcher any more."""
        while not self.answers and not self.closed:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._give_up)
        return self.answers.popleft() if self.answers else None

    def _give_up(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
