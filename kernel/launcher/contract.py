"""What the runtime knows of a launcher: requests, answers, notices, and the Protocol that both the real one and
the simulated one keep. No behaviour.

Theory: a container is *staged* (built up to the instruction before its execve, waiting at a barrier) and later
*released*, together with all others at the same barrier, by one write. What happens afterwards is told by
notices, in the order in which the launcher saw it, each once; an `Ended` is told again to every new client
until it has been acknowledged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import trio

from mesocosm.kernel.core.plan import Step


class StageRequest(msgspec.Struct, frozen=True):
    """One container to build. `steps` are resolved: no Fact, no Grant; Descriptors are open here and become the child's.

    `barrier` names the barrier (one per launch transaction). `note` is kept for whoever asks for the inventory. `fault`, for
    tests, is what is to fail: ("step", N), the first system call of the N-th step, or ("row", N), the N-th of the table.
    """

    container_id: str
    barrier: str
    steps: tuple[Step, ...]
    parent: str | None = None
    note: bytes = b""
    fault: tuple[str, int] | None = None


class Staged(msgspec.Struct, frozen=True):
    """A container that stands at its barrier. `pid` as this process sees it; `pidfd` belongs to the caller."""

    container_id: str
    pid: int
    pidfd: int


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The program has replaced the launcher's copy: execve succeeded."""

    container_id: str
    time: float


class ExecFailed(msgspec.Struct, frozen=True, tag="exec_failed"):
    """A staged container could not go on: an error object with step, syscall and errno. An Ended follows.

    With code `exec_failed` the barrier had opened; with `launch_failed` it could not even wait there. `failed`, of one that
    was staged for an earlier client: as in an inventory.
    """

    container_id: str
    error: dict[str, Any]
    failed: dict[str, Any] | None = None


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The container's first process has been reaped. `status` as wait4(2) gives it; `time` is CLOCK_REALTIME.

    No status: whoever reaped it cannot tell any more; `why` says so in words.
    """

    container_id: str
    status: int | None
    user_us: int
    system_us: int
    max_rss_kib: int
    time: float
    why: str | None = None


class LauncherGone(msgspec.Struct, frozen=True, tag="launcher_gone"):
    """The connection broke. Containers go on; nothing more will be told by this client."""


class NotReleased(msgspec.Struct, frozen=True, tag="not_released"):
    """A barrier that was to be opened without an answer could not be."""

    barrier: str
    message: str


Notice = Started | ExecFailed | Ended | NotReleased | LauncherGone


class Launched(msgspec.Struct, frozen=True):
    """One line of the inventory. `phase`: staging, staged, running or ended; `pidfd` (living ones) belongs to the caller.

    `failed`: what an ExecFailed told once, after the barrier had opened, or was to tell: {row, errno}. Kept until the end of
    it is acknowledged, and explained by `diagnosis.explain_late`.
    """

    container_id: str
    barrier: str
    pid: int
    phase: str
    note: bytes = b""
    ended: Ended | None = None
    pidfd: int | None = None
    failed: dict[str, Any] | None = None


class Orphan(msgspec.Struct, frozen=True):
    """A container whose launcher was killed. `birth`: its process's identity (linux.pidfds); `pidfd` stays the caller's."""

    container_id: str
    pid: int
    pidfd: int
    birth: str
    barrier: str
    note: bytes = b""


class Launcher(Protocol):
    """The launcher as the runtime uses it. Every method may raise AgentGone-like LaunchError when the process is gone."""

    notices: trio.MemoryReceiveChannel[Notice]

    async def view(self, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        """Builds the mount tree `name` unless it is there already. Entries: see `runtime.kinds.ViewKind`."""
        ...

    async def stage(self, request: StageRequest) -> Staged:
        """Builds one container up to its barrier; LaunchError (with step, syscall, errno, target) when it cannot be.

        After an error nothing of it is left. Cancelling the call kills what was built.
        """
        ...

    async def release(self, barrier: str, *, wait: bool = True) -> None:
        """Opens a barrier: one write, and every container staged at it executes its program.

        Without `wait` it returns once the launcher has been told: an answer would come in the middle of all that the
        programs then do. If it cannot be opened, a NotReleased says so.
        """
        ...

    async def abort(self, barrier: str) -> None:
        """Ends everything that stands at a barrier; returns when all of it has been reaped."""
        ...

    async def acknowledge(self, container_ids: Sequence[str]) -> None:
        """The exit records of these have been written down elsewhere: the launcher may forget them."""
        ...

    async def inventory(self) -> list[Launched]:
        """All that the launcher has: living ones and exit records not acknowledged."""
        ...

    async def renew(self) -> None:
        """After a LauncherGone: finds the launcher that serves, or starts one; MesoError if there can be none now."""
        ...

    async def adopt(self, orphans: Sequence[Orphan]) -> None:
        """From now on this launcher knows these, watches them, and tells how they ended; one that it knows stays as it is."""
        ...

    @property
    def is_outdated(self) -> bool:
        """Whether it is of another build than this agent."""
        ...

    async def upgrade(self) -> bool:
        """Makes it one of this agent's build, in place; False if it cannot be now. Afterwards its inventory is to be asked."""
        ...

    async def stop(self) -> None:
        """Ends the launcher, which must have no container left."""
        ...
