"""The seam between the runtime and the operating system: signals, attempts to undo, descriptors, clocks, counters.

What lives here: the Protocol and its Linux side. Effects and the launcher are seams of their own (`contracts`,
`launcher.contract`). A simulated machine (kernel.testing) stands behind the same Protocol.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from mesocosm.kernel.launcher import fate, reaped
from mesocosm.kernel.launcher.connecting import ended_of
from mesocosm.kernel.launcher.contract import Ended
from mesocosm.kernel.launcher.reaped import Reaped
from mesocosm.kernel.linux import limits, pidfds, served
from mesocosm.kernel.linux.limits import Limit
from mesocosm.kernel.linux.processes import is_exiting
from mesocosm.kernel.runtime import holders, outside, undo
from mesocosm.kernel.runtime.outside import Outside
from mesocosm.kernel.runtime.undo import Attempt

if TYPE_CHECKING:
    from mesocosm.kernel.runtime.sightings import Look


class Machine(Protocol):
    """What the runtime asks of the machine."""

    def undo(self, verb: str, target: str) -> Attempt:
        """One attempt at one verb; OSError if it cannot be. KeyError for a verb that is not in the vocabulary."""
        ...

    def may_wait(self, target: str) -> bool:
        """Whether an attempt there could wait for a file system that does not answer: then it is made by `undo_outside`."""
        ...

    def is_there(self, verb: str, target: str) -> bool:
        """Whether there is, or may be, anything that this verb would take away. Never waits."""
        ...

    async def undo_outside(self, verb: str, target: str) -> Attempt:
        """The same as `undo`, where this process cannot be held up by it. OSError ETIMEDOUT if there is no answer in time."""
        ...

    async def holders(self, verb: str, target: str) -> str:
        """Who is in the way of that, in words; empty if nobody knows."""
        ...

    async def why_alive(self, pid: int) -> str:
        """Why a process does not die, in words; empty if nobody knows."""
        ...

    def signal(self, pidfd: int, number: int) -> None:
        """To one process; ProcessLookupError if it has gone."""
        ...

    def is_dying(self, pidfd: int, pid: int) -> bool:
        """Whether a process that the launcher has not reaped yet, as far as we know, is on its way out, or is dead."""
        ...

    def identity(self, pidfd: int, pid: int) -> str:
        """Which process that is, in a word that no other process of this boot ever has; empty if it has gone."""
        ...

    def reopen(self, pid: int, birth: str) -> int | None:
        """A pidfd of the process that had this pid and this identity; None if it is gone, whoever has the number now."""
        ...

    def how_it_ended(self, container_id: str, pidfd: int | None, pid: int, birth: str) -> Awaitable[Ended]:
        """To be awaited until a process that no launcher watches has ended; takes no descriptor of its own while it waits.

        Without a descriptor it has ended already. Who can be asked is asked (`launcher.fate`); else `why` says why not. One task
        at a time; `close` on the descriptor ends the wait with trio.ClosedResourceError.
        """
        ...

    def forget_ends(self) -> None:
        """Nothing lives: what has been written down about ends (RUN_DIR/reaped) is about nobody any more."""
        ...

    def close(self, fd: int) -> None:
        """Closes a descriptor."""
        ...

    def oom_kills(self, watch: Mapping[str, Any]) -> int:
        """How often a limit has killed, from the `file` and `key` of a watch; 0 if that cannot be read."""
        ...

    def limit(self, errno: str | None, kind: str) -> Limit | None:
        """The limit that explains this errno of a step or effect of that kind, if one does."""
        ...

    def time(self) -> float:
        """CLOCK_REALTIME, for people. Deadlines use trio's clock."""
        ...

    def gone(self, pidfd: int) -> Awaitable[None]:
        """To be awaited until the process has ended; takes no descriptor. This one stays open meanwhile."""
        ...

    def looks(self) -> Sequence[Look]:
        """How an audit looks at what no effect kind finds."""
        ...


class LinuxMachine:
    """The real one. `run_dir`: of the agent, where keepers leave word."""

    def __init__(self, run_dir: str = "/nonexistent") -> None:
        self._run_dir = run_dir
        self._reaped: Reaped | None = None
        self._awaited: dict[int, trio.CancelScope] = {}  # pidfds; a copy of each might be more than this process may have open
        self._served = served.ours()
        self._outside = Outside()

    def identity(self, pidfd: int, pid: int) -> str:
        """See Machine."""
        return pidfds.identity(pidfd, pid)

    def reopen(self, pid: int, birth: str) -> int | None:
        """See Machine."""
        return pidfds.reopen(pid, birth)

    def how_it_ended(self, container_id: str, pidfd: int | None, pid: int, birth: str) -> Awaitable[Ended]:
        """See Machine."""
        return self._inquire(container_id, pidfd, pid, birth)

    async def _inquire(self, container_id: str, pidfd: int | None, pid: int, birth: str) -> Ended:
        if pidfd is None:
            return ended_of(fate.recorded(container_id, pid, birth, self._records()) or fate.unknown(container_id, fate.UNSEEN))
        with trio.CancelScope() as self._awaited[pidfd]:
            try:
                await trio.lowlevel.wait_readable(pidfd)
                since = trio.current_time()
                while True:
                    found = fate.inquire(container_id, pidfd, pid, birth, self._records(), trio.current_time() - since)
                    if found is not None:
                        return ended_of(found)
                    await trio.sleep(fate.AGAIN)
            finally:
                self._awaited.pop(pidfd, None)
        raise trio.ClosedResourceError

    def _records(self) -> Reaped:
        if self._reaped is None:
            try:
                self._reaped = Reaped(os.open(self._run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            except OSError:
                return Reaped(-1)  # nothing is known from there, now
        return self._reaped

    def forget_ends(self) -> None:
        """See Machine."""
        reaped.empty(self._run_dir)

    def undo(self, verb: str, target: str) -> Attempt:
        """See Machine."""
        return undo.VERBS[verb](target)

    def may_wait(self, target: str) -> bool:
        """See Machine: a microsecond."""
        return self._served.touches(target)

    def is_there(self, verb: str, target: str) -> bool:
        """See Machine: two microseconds; a mount, as long as reading the table of mounts takes."""
        return self.may_wait(target) or undo.is_there(verb, target)

    async def undo_outside(self, verb: str, target: str) -> Attempt:
        """See Machine."""
        return await outside.undo(self._outside, verb, target)

    async def holders(self, verb: str, target: str) -> str:
        """See Machine."""
        return await holders.of(self._outside, verb, target)

    async def why_alive(self, pid: int) -> str:
        """See Machine."""
        return await holders.of_process(self._outside, pid)

    def signal(self, pidfd: int, number: int) -> None:
        """See Machine."""
        signal.pidfd_send_signal(pidfd, number)

    def is_dying(self, pidfd: int, pid: int) -> bool:
        """See Machine."""
        try:
            exiting = is_exiting(Path(f"/proc/{pid}/stat").read_text(errors="replace"))
        except OSError:
            return True
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return exiting or bool(poll.poll(0))  # if it has ended, the number may be somebody else's by now

    def close(self, fd: int) -> None:
        """See Machine."""
        if (awaited := self._awaited.pop(fd, None)) is not None:
            awaited.cancel()  # before its number can be another file's
        os.close(fd)

    def oom_kills(self, watch: Mapping[str, Any]) -> int:
        """See Machine. `file` holds lines "KEY NUMBER": memory.events of v2, memory.oom_control of v1 (Linux 4.13)."""
        try:
            with open(watch["file"], "rb", buffering=0) as opened:
                for line in opened.read().splitlines():
                    key, _, number = line.partition(b" ")
                    if key == str(watch["key"]).encode():
                        return int(number)
        except (OSError, KeyError, ValueError):
            return 0
        return 0

    def limit(self, errno: str | None, kind: str) -> Limit | None:
        """See Machine."""
        return limits.reached(errno, kind)

    def time(self) -> float:
        """See Machine."""
        return time.time()

    def gone(self, pidfd: int) -> Awaitable[None]:
        """See Machine."""
        return _ended(pidfd)

    def looks(self) -> Sequence[Look]:
        """See Machine."""
        from mesocosm.kernel.runtime import sight_groups, sight_mounts, sight_processes, sightings  # nobody else needs them

        return (
            sight_processes.processes, sight_groups.groups, sight_mounts.mounts, sightings.files, sightings.sockets,
            sightings.links, sightings.loops, sightings.keys,
        )  # fmt: skip


async def _ended(pidfd: int) -> None:
    await trio.lowlevel.checkpoint()
    while not pidfds.has_ended(pidfd):
        await trio.sleep(fate.AGAIN)  # rarely needed, and a task may wait for the same descriptor
