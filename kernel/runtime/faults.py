"""Failures on request, for tests of roll-back and recovery: MESOCOSM_FAULT, only in an agent run with --allow-faults.

``effect:N`` fails the N-th effect of the next launch, ``member:N`` its N-th staging, ``kill-agent:N`` kills this process
at its N-th point (before every effect, staging, and transaction). ``step:TASK:N`` fails the N-th setup step of the task
(or pod) of that name, ``row:TASK:N`` the N-th system call of its table. Counting starts at 1, and each fault happens once.
"""

from __future__ import annotations

import os
import signal

from mesocosm.kernel.core.errors import LaunchError, SpecError


class Faults:
    """Counts, and strikes when the number is reached."""

    def __init__(self, text: str = "") -> None:
        kind, _, rest = text.partition(":")
        self._kind = kind
        self._left = 0
        self._task = ""
        try:
            if kind in ("step", "row"):
                self._task, _, number = rest.rpartition(":")
                self._left = int(number)
            elif kind in ("effect", "member", "kill-agent"):
                self._left = int(rest)
            elif kind:
                raise ValueError
        except ValueError:
            raise SpecError(
                f"{text[:80]!r} is not a fault",
                path="MESOCOSM_FAULT",
                hint="effect:N, step:TASK:N, row:TASK:N, member:N or kill-agent:N",
            ) from None
        self.armed = bool(kind)

    def strike(self, kind: str, what: str) -> None:
        """Called before `what` happens; LaunchError if it is to fail, the end of this process if it is to die."""
        if not self.armed:
            return
        if self._kind == "kill-agent":
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
        elif self._kind == kind:
            self._left -= 1
            if not self._left:
                self.armed = False
                raise LaunchError(f"{what} fails because MESOCOSM_FAULT says so", hint="unset MESOCOSM_FAULT")

    def inside(self, name: str) -> tuple[str, int] | None:
        """What is to fail in the container of the task `name`, as a StageRequest has it, once; None: nothing."""
        if self.armed and self._kind in ("step", "row") and name == self._task:
            self.armed = False
            return self._kind, self._left
        return None
