"""The bench on which the scenarios stand: a real launcher in a run directory of its own, and what one wants to see of it.

Runs in a process of its own, which may be an ordinary user's; so it needs nothing but the standard library and what
mesocosm itself needs. No tests here.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from mesocosm.kernel.contracts import Descriptor
from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.core.plan import Step
from mesocosm.kernel.launcher.client import LauncherClient, open_launcher
from mesocosm.kernel.launcher.compile import compile_steps
from mesocosm.kernel.launcher.connecting import connect
from mesocosm.kernel.launcher.contract import Ended, ExecFailed, Notice, Staged, StageRequest
from mesocosm.kernel.launcher.table import ROW_BYTES
from mesocosm.kernel.launcher.viewing import is_confined
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import mounts

DEADLINE = 20.0
BASE = 0x70000000
KEEP = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_BIND_SERVICE", "SETGID", "SETUID", "SYS_CHROOT"]
DIRECTORIES = ("tmp", "run", "proc", "dev", "etc", "data", "mnt")
LINKS = ("bin", "lib", "lib64", "sbin")


class Bench:
    """One launcher. `home` is a directory that containers may write to as /data."""

    def __init__(self, place: str, walker: str | None) -> None:
        self.place = Path(place)
        self.run_dir = str(self.place / "run")
        self.home = self.place / "home"
        self.walker = walker
        self.confined = is_confined()
        self.launcher: LauncherClient
        self.pid = 0  # of the launcher
        self.missed: list[Notice] = []
        self._strays: set[int] = set()  # pidfds: what a scenario may leave when it fails
        self._opened: list[int] = []
        os.makedirs(self.run_dir, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        self.home.chmod(0o777)

    # --- plans ------------------------------------------------------------------------------------------------

    def entries(self) -> list[dict[str, Any]]:
        """A small view of this machine."""
        entries: list[dict[str, Any]] = [{"target": "/usr", "kind": "overlay", "source": "/usr"}]
        for name in LINKS:
            if os.path.islink(f"/{name}"):
                entries.append({"target": f"/{name}", "kind": "link", "link": f"usr/{name}"})
            elif os.path.isdir(f"/{name}"):
                entries.append({"target": f"/{name}", "kind": "overlay", "source": f"/{name}"})
        entries += [{"target": f"/{name}", "kind": "directory"} for name in DIRECTORIES]
        entries.append({"target": "/dev/null", "kind": "device", "device": [1, 3], "source": "/dev/null"})
        return entries

    def steps(
        self,
        argv: Sequence[str] | None,
        *,
        of: str | None = None,
        clone: Sequence[str] = ("mount", "pid"),
        join: Sequence[str] = ("net", "ipc", "pid"),
        home: bool = False,
        stdin: int | None = None,
        stdout: int | None = None,
        env: dict[str, str] | None = None,
        cwd: str = "/",
        keep: Sequence[str] = KEEP,
        extra: Sequence[Step] = (),
    ) -> tuple[Step, ...]:
        """A container: its own mounts and pids, users of its own (root) or its parent's, no privileges."""
        count = 1 if self.confined else 65536
        base = 0 if self.confined else BASE
        steps = [Step("join", {"namespaces": list(join), "of": of})] if of else []
        steps += [Step("clone", {"namespaces": list(clone)}), Step("view", {"name": "host"})]
        steps.append(Step("tmpfs", {"target": "/tmp", "size": "8m", "mode": 0o1777, "uid": base, "flags": ["nosuid", "nodev"]}))
        steps.append(Step("proc", {"target": "/proc"}))
        if home:
            tree = mounts.open_tree(str(self.home))
            self._opened.append(tree)
            steps.append(Step("bind", {"fd": Descriptor(tree), "target": "/data"}))
        steps += [*(step for step in extra if step.stage == "mount"), Step("pivot", {})]
        if of:
            steps += [Step("join_user", {"of": of, "count": count}), Step("own", {"namespaces": ["uts"]})]
        else:
            steps += [Step("new_user", {"base": base, "count": count}), Step("own", {"namespaces": ["net", "ipc", "uts"]})]
        steps += [Step("hostname", {"name": "box"}), Step("session", {})]
        for number, fd in ((0, stdin), (1, stdout), (2, stdout)):
            if fd is not None:
                steps.append(Step("stdio", {"fd": Descriptor(fd), "number": number}))
        steps += [
            Step("bounding", {"keep": list(keep)}),
            Step("identity", {"uid": 0, "gid": 0, "groups": [], **({"only": [0, 0]} if self.confined else {})}),
            Step("capabilities", {"keep": list(keep)}),
            Step("no_new_privileges", {}),
            Step("working_directory", {"path": cwd}),
        ]
        if argv is None:
            return (*steps, Step("barrier", {}), Step("pause", {}))
        path = "/usr/bin:/bin"
        steps += [Step("check", {"argv": list(argv), "path": path}, "program"), Step("barrier", {})]
        return (*steps, Step("exec", {"argv": list(argv), "env": {"PATH": path, **(env or {})}}, "program"))

    # --- doing ------------------------------------------------------------------------------------------------

    async def stage(self, name: str, argv: Sequence[str] | None, barrier: str | None = None, **options: Any) -> Staged:
        """Stages a container; its barrier has its own name unless one is given."""
        request = StageRequest(name, barrier or name, self.steps(argv, **options), options.get("of"), f"note of {name}".encode())
        try:
            staged = await self.launcher.stage(request)
        finally:
            self.close_opened()
        self._strays.add(staged.pidfd)
        return staged

    def close_opened(self) -> None:
        """What `steps` opened, once it has been passed on."""
        while self._opened:
            os.close(self._opened.pop())

    async def start(self, name: str, argv: Sequence[str] | None, **options: Any) -> Staged:
        """Stages and releases it."""
        staged = await self.stage(name, argv, **options)
        await self.launcher.release(options.get("barrier") or name)
        return staged

    async def hear(self, kind: type, name: str | None = None) -> Any:
        """The next notice of this kind (about this container); others are kept for later."""
        for notice in self.missed:
            if isinstance(notice, kind) and name in (None, getattr(notice, "container_id", None)):
                self.missed.remove(notice)
                return notice
        while True:
            notice = await self.launcher.notices.receive()
            if isinstance(notice, kind) and name in (None, getattr(notice, "container_id", None)):
                return notice
            self.missed.append(notice)

    async def ended(self, *names: str) -> dict[str, Ended]:
        """The ends of these, acknowledged."""
        found = {name: await self.hear(Ended, name) for name in names}
        await self.launcher.acknowledge(list(names))
        return found

    def kill(self, staged: Staged) -> None:
        """SIGKILL by pidfd."""
        signal.pidfd_send_signal(staged.pidfd, signal.SIGKILL)

    def find(self) -> int:
        """The pid of the launcher that listens now; looking does not disturb it."""
        connection = connect(self.run_dir)
        assert connection is not None
        with connection:
            return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])

    def census(self) -> dict[str, Any]:
        """What births could leave behind: processes below the launcher, its descriptors, its mounts."""
        kinds = []
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                kinds.append(re.sub(r"\d+", "N", link_of(self.pid, f"fd/{fd}")))
            except FileNotFoundError:
                continue
        mounted = Path(f"/proc/{self.pid}/mountinfo").read_text().count("\n")
        return {"processes": sorted(descendants(self.pid)), "descriptors": Counter(kinds), "mounts": mounted}

    async def steady(self) -> dict[str, Any]:
        """A census after a round trip: what the launcher closes after an answer is closed before the next one."""
        await self.launcher.hello()
        return self.census()

    async def settled(self, before: dict[str, Any]) -> None:
        """Waits for the census to be what it was: an answer may be a moment ahead of the kernel's own cleaning up."""
        with trio.move_on_after(3):
            while self.census() != before:
                await trio.sleep(0.01)
        now = self.census()
        assert now["processes"] == before["processes"], now["processes"]
        assert now["mounts"] == before["mounts"], now["mounts"]
        more, less = now["descriptors"] - before["descriptors"], before["descriptors"] - now["descriptors"]
        assert not more, f"more: {dict(more)}"
        assert not less, f"less: {dict(less)}"


async def fail_each_row(b: Bench, steps: Callable[[], tuple[Step, ...]], of: str | None = None) -> None:
    """One after the other; whatever comes of it, it is told with the row's step, and nothing of it is left."""
    before = await b.steady()
    compiled = compile_steps(steps(), confined=b.confined)
    b.close_opened()
    sure = {c.SYS["wait4"], c.SYS["exit_group"]}  # of an intermediate, for its own child, with every signal blocked
    for number, index in enumerate(compiled.row_steps, 1):
        if struct.unpack_from("=q", compiled.table.rows, (number - 1) * ROW_BYTES)[0] in sure:
            continue
        mine = steps()
        request = StageRequest("x", f"x{number}", mine, of, fault=("row", number))
        error: dict[str, Any] | None = None
        try:
            staged = await b.launcher.stage(request)
        except LaunchError as caught:
            error = caught.as_object()
        else:
            os.close(staged.pidfd)
            if mine[index].stage == "exec":
                await b.launcher.release(f"x{number}")
            error = (await b.hear(ExecFailed, "x")).error
            await b.ended("x")
        finally:
            b.close_opened()
        step = mine[index]
        assert error["code"] == ("exec_failed" if step.stage == "exec" else "launch_failed"), (number, step)
        assert "step" in error, (number, step, error)
        assert error["step"] == {"index": index, "stage": step.stage, "kind": step.kind}, (number, error)
        assert error["errno"] == "ENOSYS"
        assert error["syscall"] in c.SYS
        await b.launcher.abort(f"x{number}")
        assert os.listdir(b.home) == [], (number, step)
    await b.settled(before)


def descendants(pid: int) -> set[int]:
    """All processes below this one."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parents[int(entry)] = parent_of(int(entry))
            except OSError:
                continue
    found: set[int] = set()
    grown = {pid}
    while grown:
        grown = {child for child, parent in parents.items() if parent in grown}
        found |= grown
    return found


def cradles(b: Bench) -> list[int]:
    """Who below the launcher has the cradle's name."""
    found = []
    for pid in descendants(b.pid):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "meso-cradle":
                found.append(pid)
    return found


async def cradle_of(b: Bench) -> int | None:
    """The process that clones for the launcher, where there is a walker in machine code."""
    found = cradles(b)
    with trio.move_on_after(10):
        while len(found) > 1:  # what it clones has its name until it becomes somebody else
            await trio.sleep(0.01)
            found = cradles(b)
    if c.ARCH != "x86_64" or b.walker == "python":
        assert found == []
        return None
    assert len(found) == 1
    return found[0]


def parent_of(pid: int) -> int:
    """Its parent's pid."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def field(pid: int, name: str, file: str = "status") -> str:
    """A line of a file of /proc/PID."""
    found = re.search(rf"^{name}:\s*(.*)$", Path(f"/proc/{pid}/{file}").read_text(), re.M)
    assert found, name
    return found[1]


def link_of(pid: int, name: str) -> str:
    """A symbolic link in /proc/PID."""
    return os.readlink(f"/proc/{pid}/{name}")


async def gone(pidfd: int) -> None:
    """Waits for the process of a pidfd to end."""
    await trio.lowlevel.wait_readable(pidfd)


@asynccontextmanager
async def bench(place: str, walker: str | None) -> AsyncIterator[Bench]:
    """A bench with a launcher and the view `host`; afterwards nothing of it is left, whatever happened."""
    it = Bench(place, walker)
    keeper = -1
    try:
        async with open_launcher(it.run_dir, walker=walker) as launcher:
            it.launcher = launcher
            it.pid = it.find()
            keeper = os.pidfd_open(parent_of(it.pid))
            await launcher.view("host", it.entries())
            await launcher.hello()
            while it.census()["descriptors"]["socket:[N]"] != 2:  # until it has noticed that `find` only looked
                await trio.sleep(0.002)
            yield it
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(DEADLINE) as scope:
            await _clean(it)
            if keeper >= 0:
                await gone(keeper)
                os.close(keeper)
        assert not scope.cancelled_caught, "the launcher and its keeper are still there"


async def _clean(it: Bench) -> None:
    for pidfd in it._strays:
        with suppress(OSError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    if (connection := connect(it.run_dir)) is None:
        return
    connection.close()
    async with open_launcher(it.run_dir) as launcher:
        while True:
            lines = [line for line in await launcher.inventory() if line.phase != "ended"]
            for line in lines:
                if line.pidfd is not None:
                    with suppress(OSError):  # it ends at this very moment
                        signal.pidfd_send_signal(line.pidfd, signal.SIGKILL)
                    os.close(line.pidfd)
            if not lines:
                break
            await trio.sleep(0.005)
        await launcher.stop()


Scenario = Callable[[Bench], Any]


def run(scenario: Scenario, place: str, walker: str | None) -> str | None:
    """Runs one scenario to its end; what went wrong, or None."""

    async def main() -> None:
        with trio.fail_after(DEADLINE):
            async with bench(place, walker) as it:
                await scenario(it)

    log = Path(place, "run", "launcher.log")
    try:
        trio.run(main)
    except BaseException as error:
        problems = "\n".join("".join(traceback.format_exception(leaf)) for leaf in leaves(error))
        return f"{problems}\nthe launcher said: {log.read_text() if log.exists() else 'nothing'}"
    return f"the launcher said: {log.read_text()}" if log.read_text() else None


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions inside a group."""
    return [leaf for each in error.exceptions for leaf in leaves(each)] if isinstance(error, BaseExceptionGroup) else [error]
