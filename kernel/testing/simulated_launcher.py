"""A launcher in memory, which can die, and what it knows: containers that are entries in a dict. See `simulated`."""

from __future__ import annotations

import errno
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from mesocosm.kernel.contracts import Descriptor
from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.core.names import is_within
from mesocosm.kernel.launcher.contract import (
    Ended,
    ExecFailed,
    Launched,
    LauncherGone,
    Notice,
    Orphan,
    Staged,
    StageRequest,
    Started,
)

if TYPE_CHECKING:
    from mesocosm.kernel.testing.simulated import SimulatedMachine

_USAGE = 2  # what a program exits with that does not understand its arguments
_UNSEEN = "nobody was left to see it"


class _Process:
    """One simulated container."""

    def __init__(self, request: StageRequest, pid: int) -> None:
        self.request = request
        self.pid = pid
        self.pidfds: set[int] = set()
        self.phase = "staged"
        self.ended: Ended | None = None
        self.failed: dict[str, Any] | None = None
        self.over = trio.Event()
        self.birth = f"pidfd:{pid}{id(self)}"  # a pid comes again, this does not
        exec_step = next((step for step in request.steps if step.kind == "exec"), None)
        self.argv: list[str] = list(exec_step.args["argv"]) if exec_step is not None else ["pause"]


class SimulatedLauncher:
    """contract.Launcher in memory. `run` (a task outside the agent) makes programs end; `connect` is a new client.

    `die` is kill -9 of it: those at a barrier leave, those that run go on without a launcher, and a keeper reaps them, which
    writes down how they ended unless `keeper` is False; `renew` is the next one, unless `broken`.
    """

    def __init__(self, machine: SimulatedMachine, *, delay: float = 0.0) -> None:
        self._machine = machine
        machine.launcher = self
        self._delay = delay
        self._processes: dict[str, _Process] = {}  # that this launcher knows
        self._strangers: list[_Process] = []  # that it does not
        self.alive, self.keeper, self.broken = True, True, False
        self.deaths, self.starts_in = 0, 0.0  # seconds
        self.outdated = False
        self._pid = 100
        self._alarm = trio.Event()
        self._due: list[tuple[float, _Process]] = []
        self.views: set[str] = set()
        self.hanging: set[str] = set()  # containers whose staging never answers
        self.stuck: dict[str, int] = {}  # containers that no signal ends, and how often they have been killed
        self.started: list[str] = []  # whose programs have run
        self.acknowledged: list[str] = []
        self.send: trio.MemorySendChannel[Notice]
        self.notices: trio.MemoryReceiveChannel[Notice]
        self.connect()

    def connect(self) -> None:
        """A new client: exits that nobody has acknowledged are told again. Without a launcher, its agent starts one."""
        self.alive = True
        self.send, self.notices = trio.open_memory_channel[Notice](float("inf"))
        for process in self._processes.values():
            if process.ended is not None:
                self.send.send_nowait(process.ended)

    @property
    def living(self) -> list[str]:
        """Ids of containers that have a process."""
        return [process.request.container_id for process in self._all() if process.ended is None]

    def _all(self) -> list[_Process]:
        return [*self._processes.values(), *self._strangers]

    def _find(self, container_id: str) -> _Process:
        return next(found for found in self._all() if found.request.container_id == container_id and found.ended is None)

    def die(self) -> None:
        """kill -9."""
        if not self.alive:
            return
        self.alive = False
        self.deaths += 1
        self._strangers += self._processes.values()
        left = [process for process in self._processes.values() if process.phase == "staged"]
        self._processes.clear()
        for process in left:
            self._reap_one(process, 126 << 8)
        self.views.clear()
        with suppress(trio.BrokenResourceError):
            self.send.send_nowait(LauncherGone())

    def _must_live(self) -> None:
        if not self.alive:
            raise LaunchError("the launcher is gone", hint="what runs goes on; try again: a new launcher is started")

    async def renew(self) -> None:
        """See contract.Launcher."""
        await trio.sleep(self.starts_in)
        if self.broken:
            raise LaunchError("the launcher could not start: it is broken")
        self.alive = True

    @property
    def is_outdated(self) -> bool:
        """See contract.Launcher."""
        return self.outdated

    async def upgrade(self) -> bool:
        """See contract.Launcher."""
        await trio.lowlevel.checkpoint()
        self._must_live()
        if any(process.phase == "staged" for process in self._processes.values()):
            return False
        self.views.clear()
        self.outdated = False
        return True

    async def adopt(self, orphans: Sequence[Orphan]) -> None:
        """See contract.Launcher."""
        await trio.lowlevel.checkpoint()
        self._must_live()
        for orphan in orphans:
            process = self.process_of(orphan.pidfd)
            if process in self._strangers:
                self._strangers.remove(process)
                self._processes[orphan.container_id] = process
                if process.ended is not None:
                    self.send.send_nowait(self._as_known(process))

    def _as_known(self, process: _Process) -> Ended:
        assert process.ended is not None
        return (
            process.ended if self.keeper else msgspec.structs.replace(process.ended, status=None, why="nobody was left to see it")
        )

    def reopen(self, pid: int, birth: str) -> int | None:
        """See runtime.machine.Machine."""
        found = next((process for process in self._all() if process.birth == birth and process.pid == pid), None)
        return None if found is None or found.ended is not None else self._pidfd(found)

    async def how_it_ended(self, container_id: str, pidfd: int | None, birth: str) -> Ended:
        """See runtime.machine.Machine."""
        if pidfd is not None:
            process = self.process_of(pidfd)
            await process.over.wait()
            return self._as_known(process)
        found = next((process for process in self._strangers if process.birth == birth and process.ended is not None), None)
        if found is None:
            return Ended(container_id, None, 0, 0, 0, trio.current_time(), _UNSEEN)
        return self._as_known(found)

    def forget_ends(self) -> None:
        """See runtime.machine.Machine."""
        self._strangers = [process for process in self._strangers if process.ended is None]

    def process_of(self, pidfd: int) -> _Process:
        """The process behind a pidfd."""
        return next(process for process in self._all() if pidfd in process.pidfds)

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
        self._must_live()
        self.views.add(name)

    async def stage(self, request: StageRequest) -> Staged:
        """See contract.Launcher."""
        self._must_live()
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
        self._must_live()
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
        self._must_live()
        for container_id, process in self._processes.items():
            if process.request.barrier == barrier and process.phase == "staged":
                self._exec(container_id, process)
        await trio.lowlevel.checkpoint()

    def _exec(self, container_id: str, process: _Process) -> None:
        process.phase = "running"
        if process.argv[0] == "exec-fails":
            step = {"index": len(process.request.steps) - 1, "stage": "exec", "kind": "exec"}
            error = LaunchError("not executable", id=container_id, syscall="execve", errno="ENOEXEC", step=step).as_object()
            process.failed = {"row": 0, "errno": errno.ENOEXEC, "released": True}
            self._tell(ExecFailed(container_id, {**error, "code": "exec_failed"}))
            self._reap(process, 127 << 8)
            return
        self.started.append(container_id)
        self._tell(Started(container_id, trio.current_time()))
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
        if process.request.container_id in self.stuck:
            if number == signal.SIGKILL:
                self.stuck[process.request.container_id] += 1
            return
        if number == signal.SIGKILL or (process.argv[0] not in ("pause", "ignore") and number != 0):
            self._reap(process, number)

    def _reap(self, process: _Process, status: int) -> None:
        """The process ends, and with it (as pid namespaces do) everything below."""
        container_id = process.request.container_id
        for other in self._all():
            found = other.request.container_id
            if found != container_id and is_within(found, container_id) and other.ended is None:
                self._reap_one(other, int(signal.SIGKILL))
        self._reap_one(process, status)

    def _reap_one(self, process: _Process, status: int) -> None:
        process.phase = "ended"
        process.ended = Ended(process.request.container_id, status, 0, 0, 0, trio.current_time())
        process.over.set()
        if process not in self._strangers:
            self._tell(process.ended)

    def _tell(self, notice: Notice) -> None:
        with suppress(trio.BrokenResourceError):  # no client now: the next one is told
            self.send.send_nowait(notice)

    def end_in(self, cgroup: str) -> bool:
        """Every process of a cgroup ends, unless it is stuck."""
        container_id = cgroup.removeprefix("cgroup/")
        for process in self._all():
            if process.request.container_id == container_id and process.ended is None:
                if container_id in self.stuck:
                    return False
                self._reap(process, int(signal.SIGKILL))
        return True

    def free(self, container_id: str) -> None:
        """What a container was stuck in lets go of it: it dies, if it has been killed meanwhile."""
        if self.stuck.pop(container_id):
            for process in self._all():
                if process.request.container_id == container_id and process.ended is None:
                    self._reap(process, int(signal.SIGKILL))

    def crash(self, container_id: str, status: int = 9) -> None:
        """A container's process ends, for reasons of its own."""
        self._reap(self._find(container_id), status)

    async def crash_slowly(self, container_id: str, seconds: float) -> None:
        """The same; it takes so long until the process itself is reaped, after those that are nested in it."""
        process = self._find(container_id)
        process.phase = "dying"
        for other in self._all():
            if is_within(other.request.container_id, container_id) and other is not process and other.ended is None:
                self._reap_one(other, int(signal.SIGKILL))
        await trio.sleep(seconds)
        self._reap_one(process, int(signal.SIGKILL))

    async def abort(self, barrier: str) -> None:
        """See contract.Launcher."""
        self._must_live()
        for container_id, process in list(self._processes.items()):
            if process.request.barrier == barrier and process.ended is None:  # of the others the record is kept
                process.over.set()
                del self._processes[container_id]
        await trio.lowlevel.checkpoint()

    async def acknowledge(self, container_ids: Sequence[str]) -> None:
        """See contract.Launcher."""
        await trio.lowlevel.checkpoint()
        self._must_live()
        for container_id in container_ids:
            process = self._processes.get(container_id)
            if process is not None and process.ended is not None:
                del self._processes[container_id]
                self.acknowledged.append(container_id)

    async def inventory(self) -> list[Launched]:
        """See contract.Launcher."""
        await trio.lowlevel.checkpoint()
        self._must_live()
        return [
            Launched(
                found,
                process.request.barrier,
                process.pid,
                process.phase,
                process.request.note,
                process.ended,
                self._pidfd(process) if process.ended is None else None,
                process.failed,
            )
            for found, process in self._processes.items()
        ]

    async def stop(self) -> None:
        """See contract.Launcher."""
        self._must_live()
        assert not self.living, "containers are alive"
        self.alive = False


def _number(words: Sequence[str]) -> float | None:
    """What a program is told by its first word; None if that is nothing to count with."""
    with suppress(ValueError, IndexError):
        if 0 <= (number := float(words[0])) < 2**31:
            return number
    return None
