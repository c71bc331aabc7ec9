"""A machine that does not exist: the same kernel, with a launcher and effects in memory, on any clock.

What lives here: SimulatedMachine (what has been made, undo verbs, signals) and SimulatedLauncher (containers that are
entries in a dict). `simulated_plugins` has isolators whose plans use them, `simulation` puts it together. Theory: everything
that the runtime does to the world goes through three seams (effect kinds, launcher, machine); put something
predictable behind them and a whole life, with every failure and every crash, runs in milliseconds and the same
way each time.

A program is what its command says: ["sleep", "5"], ["exit", "3"], ["ignore", "TERM"], ["oom"], ["missing"] (refused when
staged), ["exec-fails"]. An agent "dies" by cancelling its nursery; the machine and the launcher stay for the next.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import trio

from mesocosm.kernel.contracts import (
    Descriptor,
    HostFacts,
)
from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.core.names import is_within
from mesocosm.kernel.launcher.contract import Ended, ExecFailed, Launched, Notice, Staged, StageRequest, Started
from mesocosm.kernel.runtime.undo import Attempt

_USAGE = 2  # what a program exits with that does not understand its arguments


class SimulatedMachine:
    """Things by path. `broken` holds targets that cannot be undone, `busy` how often a target is busy first."""

    def __init__(self) -> None:
        self.things: dict[str, str] = {}  # path → kind, in the order of making
        self.history: list[tuple[str, str]] = []  # ("do" | "undo", path)
        self.open: set[int] = set()
        self.broken: set[str] = set()
        self.busy: dict[str, int] = {}
        self.ooms: dict[str, int] = {}
        self.launcher: SimulatedLauncher | None = None
        self._fd = 1000

    def make(self, kind: str, path: str) -> None:
        """Makes a thing; making it again finds it."""
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
            if self.launcher is not None:
                self.launcher.end_in(target)
            return Attempt.GONE
        for path in [
            found for found in self.things if found == target or (verb == "remove_tree" and found.startswith(target + "/"))
        ]:
            del self.things[path]
            self.ooms.pop(path, None)  # the counter is a file in it
        self.history.append(("undo", target))
        return Attempt.GONE

    def holders(self, _verb: str, _target: str) -> str:
        """See runtime.machine.Machine."""
        return "pid 1 (simulated)"

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


class _Process:
    """One simulated container."""

    def __init__(self, request: StageRequest, pid: int) -> None:
        self.request = request
        self.pid = pid
        self.pidfds: set[int] = set()
        self.phase = "staged"
        self.ended: Ended | None = None
        self.over = trio.Event()
        exec_step = next((step for step in request.steps if step.kind == "exec"), None)
        self.argv: list[str] = list(exec_step.args["argv"]) if exec_step is not None else ["pause"]


class SimulatedLauncher:
    """contract.Launcher in memory. `run` (a task outside the agent) makes programs end; `connect` is a new client."""

    def __init__(self, machine: SimulatedMachine, *, delay: float = 0.0) -> None:
        self._machine = machine
        machine.launcher = self
        self._delay = delay
        self._processes: dict[str, _Process] = {}
        self._pid = 100
        self._alarm = trio.Event()
        self._due: list[tuple[float, _Process]] = []
        self.views: set[str] = set()
        self.hanging: set[str] = set()  # containers whose staging never answers
        self.started: list[str] = []  # whose programs have run
        self.acknowledged: list[str] = []
        self.send: trio.MemorySendChannel[Notice]
        self.notices: trio.MemoryReceiveChannel[Notice]
        self.connect()

    def connect(self) -> None:
        """A new client: exits that nobody has acknowledged are told again."""
        self.send, self.notices = trio.open_memory_channel[Notice](float("inf"))
        for process in self._processes.values():
            if process.ended is not None:
                self.send.send_nowait(process.ended)

    @property
    def living(self) -> list[str]:
        """Ids of containers that have a process."""
        return [found for found, process in self._processes.items() if process.ended is None]

    def process_of(self, pidfd: int) -> _Process:
        """The process behind a pidfd."""
        return next(process for process in self._processes.values() if pidfd in process.pidfds)

    async def run(self) -> None:
        """Time passing for programs that end by themselves."""
        while True:
            self._due = [(at, process) for at, process in self._due if process.ended is None]
            deadline = min((at for at, _ in self._due), default=float("inf"))
            if deadline <= trio.current_time():
                for at, process in self._due:
                    if at <= trio.current_time():
                        self._end_by_itself(process)
                continue
            self._alarm = trio.Event()
            with trio.move_on_at(deadline):
                await self._alarm.wait()

    async def view(self, name: str, _entries: Sequence[Mapping[str, Any]]) -> None:
        """See contract.Launcher."""
        self.views.add(name)

    async def stage(self, request: StageRequest) -> Staged:
        """See contract.Launcher."""
        if request.container_id in self._processes:
            raise LaunchError("the launcher has a container of that id already", id=request.container_id)
        if request.parent is not None and self._processes[request.parent].ended is not None:
            raise LaunchError("the parent is gone", id=request.container_id, syscall="setns", errno="ESRCH")
        for step in request.steps:
            for value in step.args.values():
                if type(value) is Descriptor and value not in self._machine.open:
                    raise LaunchError("a closed descriptor", id=request.container_id)
        if self._delay or request.container_id in self.hanging:
            await trio.sleep(float("inf") if request.container_id in self.hanging else self._delay)
        else:
            await trio.lowlevel.checkpoint()
        if request.fault is not None:
            index = min(request.fault[1], len(request.steps)) - 1
            step = request.steps[index]
            raise LaunchError(
                "it was to fail",
                id=request.container_id,
                syscall=step.syscall,
                errno="ENOSYS",
                plugin=step.plugin,
                step={"index": index, "stage": step.stage, "kind": step.kind},
            )
        self._pid += 1
        process = _Process(request, self._pid)
        if process.argv[0] == "missing":
            index = next(number for number, step in enumerate(request.steps) if step.kind == "check")
            raise LaunchError(
                "the program is not there",
                id=request.container_id,
                syscall="execveat",
                errno="ENOENT",
                target="missing",
                plugin=request.steps[index].plugin,
                step={"index": index, "stage": "check", "kind": "check"},
            )
        self._processes[request.container_id] = process
        return Staged(request.container_id, process.pid, self._pidfd(process))

    def _pidfd(self, process: _Process) -> int:
        fd = self._machine.descriptor()
        process.pidfds.add(fd)
        return fd

    async def release(self, barrier: str, *, wait: bool = True) -> None:
        """See contract.Launcher."""
        for container_id, process in self._processes.items():
            if process.request.barrier == barrier and process.phase == "staged":
                self._exec(container_id, process)
        await trio.lowlevel.checkpoint()

    def _exec(self, container_id: str, process: _Process) -> None:
        process.phase = "running"
        if process.argv[0] == "exec-fails":
            step = {"index": len(process.request.steps) - 1, "stage": "exec", "kind": "exec"}
            error = LaunchError("not executable", id=container_id, syscall="execve", errno="ENOEXEC", step=step).as_object()
            self.send.send_nowait(ExecFailed(container_id, {**error, "code": "exec_failed"}))
            self._reap(process, 127 << 8)
            return
        self.started.append(container_id)
        self.send.send_nowait(Started(container_id, trio.current_time()))
        program, *words = process.argv
        if program in ("exit", "oom"):
            self._end_by_itself(process)
        elif program == "sleep" and (seconds := _number(words)) is not None:
            self._due.append((trio.current_time() + seconds, process))
            self._alarm.set()
        elif program == "sleep":
            self._reap(process, _USAGE << 8)

    def _end_by_itself(self, process: _Process) -> None:
        program, *words = process.argv
        if program == "oom":
            self._machine.ooms[f"cgroup/{process.request.container_id}"] = 1
            self._reap(process, int(signal.SIGKILL))
        else:
            code = _number(words)
            self._reap(process, (_USAGE if code is None else int(code) & 0xFF) << 8 if program == "exit" else 0)

    def signal(self, pidfd: int, number: int) -> None:
        """A signal through a pidfd."""
        process = self.process_of(pidfd)
        if process.ended is not None:
            raise ProcessLookupError
        if number == signal.SIGKILL or (process.argv[0] not in ("pause", "ignore") and number != 0):
            self._reap(process, number)

    def _reap(self, process: _Process, status: int) -> None:
        """The process ends, and with it (as pid namespaces do) everything below."""
        container_id = process.request.container_id
        for found, other in list(self._processes.items()):
            if found != container_id and is_within(found, container_id) and other.ended is None:
                self._reap_one(other, int(signal.SIGKILL))
        self._reap_one(process, status)

    def _reap_one(self, process: _Process, status: int) -> None:
        process.phase = "ended"
        process.ended = Ended(process.request.container_id, status, 0, 0, 0, trio.current_time())
        process.over.set()
        try:
            self.send.send_nowait(process.ended)
        except trio.BrokenResourceError:
            return  # no client now: the next one is told

    def end_in(self, cgroup: str) -> None:
        """Every process of a cgroup ends."""
        process = self._processes.get(cgroup.removeprefix("cgroup/"))
        if process is not None and process.ended is None:
            self._reap(process, int(signal.SIGKILL))

    def crash(self, container_id: str, status: int = 9) -> None:
        """A container's process ends, for reasons of its own."""
        self._reap(self._processes[container_id], status)

    async def crash_slowly(self, container_id: str, seconds: float) -> None:
        """The same; it takes so long until the process itself is reaped, after those that are nested in it."""
        process = self._processes[container_id]
        process.phase = "dying"
        for found in [found for found in self._processes if is_within(found, container_id) and found != container_id]:
            self._reap_one(self._processes[found], int(signal.SIGKILL))
        await trio.sleep(seconds)
        self._reap_one(process, int(signal.SIGKILL))

    async def abort(self, barrier: str) -> None:
        """See contract.Launcher."""
        for container_id, process in list(self._processes.items()):
            if process.request.barrier == barrier and process.ended is None:  # of the others the record is kept
                process.over.set()
                del self._processes[container_id]
        await trio.lowlevel.checkpoint()

    async def acknowledge(self, container_ids: Sequence[str]) -> None:
        """See contract.Launcher."""
        await trio.lowlevel.checkpoint()
        for container_id in container_ids:
            process = self._processes.get(container_id)
            if process is not None and process.ended is not None:
                del self._processes[container_id]
                self.acknowledged.append(container_id)

    async def inventory(self) -> list[Launched]:
        """See contract.Launcher."""
        await trio.lowlevel.checkpoint()
        return [
            Launched(
                found,
                process.request.barrier,
                process.pid,
                process.phase,
                process.request.note,
                process.ended,
                self._pidfd(process) if process.ended is None else None,
            )
            for found, process in self._processes.items()
        ]

    async def stop(self) -> None:
        """See contract.Launcher."""
        if self.living:
            raise LaunchError("containers are alive", have=", ".join(self.living))


def _number(words: Sequence[str]) -> float | None:
    """What a program is told by its first word; None if that is nothing to count with."""
    try:
        number = float(words[0])
    except (ValueError, IndexError):
        return None
    return number if 0 <= number < 2**31 else None


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
