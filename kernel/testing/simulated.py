"""A machine that does not exist: the same kernel, with a launcher and effects in memory, on any clock.

What lives here: SimulatedMachine (what has been made, undo verbs, signals). `simulated_launcher` has SimulatedLauncher
(containers that are entries in a dict), `simulated_plugins` has isolators whose plans use them, `simulation` puts it
together. Theory: everything that the runtime does to the world goes through three seams (effect kinds, launcher, machine);
put something predictable behind them and a whole life, with every failure and every crash, runs in milliseconds and the
same way each time.

A program is what its command says: ["sleep", "5"], ["exit", "3"], ["ignore", "TERM"], ["oom"], ["missing"] (refused when
staged), ["exec-fails"]. An agent "dies" by cancelling its nursery; the machine and the launcher stay for the next.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Mapping
from typing import Any

import trio

from mesocosm.kernel.contracts import HostFacts
from mesocosm.kernel.core.errors import ConflictError
from mesocosm.kernel.launcher.contract import Ended
from mesocosm.kernel.runtime.undo import Attempt
from mesocosm.kernel.testing.simulated_launcher import SimulatedLauncher

FOREIGN = "somebody else's"  # the kind of things that no agent made


class SimulatedMachine:
    """Things by path. `broken` holds targets that cannot be undone, `busy` how often a target is busy first."""

    def __init__(self) -> None:
        self.things: dict[str, str] = {}  # path → kind, in the order of making
        self.history: list[tuple[str, str]] = []  # ("do" | "undo", path)
        self.open: set[int] = set()
        self.broken: set[str] = set()
        self.busy: dict[str, int] = {}
        self.silent: dict[str, trio.Event] = {}  # targets on a file system that answers when the event is set
        self.holder = "pid 1 (simulated)"  # of whatever is busy
        self.ooms: dict[str, int] = {}
        self.launcher: SimulatedLauncher | None = None
        self._fd = 1000

    def make(self, kind: str, path: str) -> None:
        """Makes a thing; making it again finds it. ConflictError for one of somebody else's, whose kind is FOREIGN."""
        if self.things.get(path) == FOREIGN:
            raise ConflictError("somebody else's thing is there", target=path)
        self.things[path] = kind
        self.history.append(("do", path))

    def descriptor(self) -> int:
        """A new open descriptor."""
        self._fd += 1
        self.open.add(self._fd)
        return self._fd

    def undo(self, verb: str, target: str) -> Attempt:
        """See runtime.machine.Machine."""
        if target in self.broken:
            raise OSError(errno.EBUSY, "busy", target)
        if self.busy.get(target, 0):
            self.busy[target] -= 1
            return Attempt.BUSY
        if verb == "kill_cgroup":
            return Attempt.BUSY if self.launcher is not None and not self.launcher.end_in(target) else Attempt.GONE
        for path in [
            found for found in self.things if found == target or (verb == "remove_tree" and found.startswith(target + "/"))
        ]:
            del self.things[path]
            self.ooms.pop(path, None)  # the counter is a file in it
        self.history.append(("undo", target))
        return Attempt.GONE

    def may_wait(self, target: str) -> bool:
        """See runtime.machine.Machine."""
        return target in self.silent

    def is_there(self, verb: str, target: str) -> bool:
        """See runtime.machine.Machine."""
        return verb != "close" and (target in self.silent or target in self.things)

    async def undo_outside(self, verb: str, target: str) -> Attempt:
        """See runtime.machine.Machine."""
        with trio.move_on_after(5):
            await self.silent[target].wait()
            return self.undo(verb, target)
        raise OSError(errno.ETIMEDOUT, "no answer", target)

    async def holders(self, _verb: str, _target: str) -> str:
        """See runtime.machine.Machine."""
        await trio.lowlevel.checkpoint()
        return self.holder

    async def why_alive(self, pid: int) -> str:
        """See runtime.machine.Machine."""
        await trio.lowlevel.checkpoint()
        return f"pid {pid} (simulated), unkillable in fuse (D)"

    def signal(self, pidfd: int, number: int) -> None:
        """See runtime.machine.Machine."""
        if pidfd not in self.open:
            raise OSError(errno.EBADF, "not open")
        assert self.launcher is not None
        self.launcher.signal(pidfd, number)

    def is_dying(self, pidfd: int, pid: int) -> bool:
        """See runtime.machine.Machine."""
        assert self.launcher is not None
        return self.launcher.process_of(pidfd).phase in ("dying", "ended")

    def identity(self, pidfd: int, pid: int) -> str:
        """See runtime.machine.Machine."""
        assert self.launcher is not None
        return self.launcher.process_of(pidfd).birth

    def reopen(self, pid: int, birth: str) -> int | None:
        """See runtime.machine.Machine."""
        assert self.launcher is not None
        return self.launcher.reopen(pid, birth)

    async def how_it_ended(self, container_id: str, pidfd: int | None, pid: int, birth: str) -> Ended:
        """See runtime.machine.Machine."""
        assert self.launcher is not None
        return await self.launcher.how_it_ended(container_id, pidfd, birth)

    def forget_ends(self) -> None:
        """See runtime.machine.Machine."""
        assert self.launcher is not None
        self.launcher.forget_ends()

    def close(self, fd: int) -> None:
        """See runtime.machine.Machine; closing twice is an error, as it should be."""
        self.open.remove(fd)

    def oom_kills(self, watch: Mapping[str, Any]) -> int:
        """See runtime.machine.Machine."""
        return self.ooms.get(str(watch["file"]), 0)

    def limit(self, _errno: str | None, _kind: str) -> None:
        """See runtime.machine.Machine: nothing here has a limit."""

    def time(self) -> float:
        """See runtime.machine.Machine."""
        return trio.current_time()

    def gone(self, pidfd: int) -> Awaitable[None]:
        """See runtime.machine.Machine."""
        assert self.launcher is not None
        return self.launcher.process_of(pidfd).over.wait()

    def looks(self) -> tuple[()]:
        """See runtime.machine.Machine: there is nothing here that effect kinds do not find."""
        return ()


def simulated_host(**changed: Any) -> HostFacts:
    """A host with a pool of eight id ranges."""
    facts: dict[str, Any] = {
        "boot_id": "first",
        "run_id": "5111a7",
        "uid_ranges": 8,
        "uid_count": 65536,
        "run_dir": "/nowhere",
        **changed,
    }
    return HostFacts(**facts)
