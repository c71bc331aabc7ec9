"""The effect kind of cgroup v1: one group in one hierarchy, its limits, its `tasks` file.

What lives here: the files of the controllers memory, cpu and pids. What does not: which groups there are.

cgroupspy drives the files where it is installed, one Node and one Controller at a time: its trees walk the whole
hierarchy (200 ms with 900 groups) and make groups while looking for them, and are not used. It knows nothing of
pids; that controller is ours, made of its parts. Where it is not installed, the same files are written plainly.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from mesocosm.kernel.contracts import Descriptor, EffectContext
from mesocosm.kernel.core.errors import ConflictError, LaunchError, from_oserror

PERIOD = 100_000  # microseconds: the kernel's default
_MADE = 0o1755  # the sticky bit means nothing to a group. It is there from its first moment, and nobody else sets it: our mark
_SHORTEST = 1_000  # the smallest quota that cpu.cfs_quota_us takes
Writer = Callable[[str, str, int], None]  # (group, attribute of the controller, value)


class Cgroup1:
    """args: controller (names joined by commas), path, limits {memory: bytes, cpu: millicpus, pids}, attach.

    Facts: path; with attach also tasks, open for writing.
    """

    name = "cgroup1"

    def do(self, args: Mapping[str, Any], context: EffectContext) -> Mapping[str, Any]:
        """Makes the group and sets its limits. ConflictError if somebody's processes are in one of that name."""
        path: str = args["path"]
        make(path, shared=not args["attach"])
        for name, value in args["limits"].items():
            _set(name, path, value)
        if not args["attach"]:
            return {"path": path}
        return {"path": path, "tasks": open_group(f"{path}/tasks", os.O_WRONLY)}

    def find(self, prefix: str) -> Iterable[str]:
        """All groups at or below the directory `prefix`."""
        return find(prefix)

    def owns(self, target: str) -> bool:
        """Whether that group was made by `do`."""
        return is_marked(target)


def make(path: str, *, shared: bool) -> None:
    """mkdir; a group that is there already is taken over if it is empty, or `shared`."""
    try:
        os.mkdir(path, _MADE)
    except FileExistsError:
        if shared:
            return
        with open(f"{path}/cgroup.procs") as file:
            processes = file.read().split()
        children = sum(1 for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))
        if processes or children:
            raise ConflictError(
                "a control group of that name is in use",
                syscall="mkdir",
                errno="EEXIST",
                target=path,
                have=f"{len(processes)} processes, {children} groups below",
                need="none",
                hint="another agent with the same run directory, or something that was left behind: look into it, then rmdir",
            ) from None
        os.chmod(path, _MADE)
    except OSError as error:
        raise from_oserror(error, syscall="mkdir", target=path) from None


def is_marked(path: str) -> bool:
    """Whether `make` made it, or took it over."""
    return bool(os.lstat(path).st_mode & stat.S_ISVTX)


def open_group(path: str, flags: int) -> Descriptor:
    """What a newborn enters its group by."""
    try:
        return Descriptor(os.open(path, flags | os.O_CLOEXEC))
    except OSError as error:
        raise from_oserror(error, syscall="open", target=path) from error


def find(prefix: str) -> Iterable[str]:
    """Groups at or below `prefix`, as they are come to; none if it is not there, or is no group."""
    if os.path.exists(f"{prefix}/cgroup.procs"):
        for directory, _, _ in os.walk(prefix):
            yield directory


def quota(millicpus: int) -> tuple[int, int]:
    """(quota, period) in microseconds; the period grows where the quota would be less than the kernel takes."""
    period = PERIOD if millicpus * PERIOD // 1000 >= _SHORTEST else 10 * PERIOD
    return max(_SHORTEST, millicpus * period // 1000), period


def shares(millicpus: int) -> int:
    """cpu.shares: 1024 for one cpu, as everybody has it; from 2 to 262144."""
    return min(max(2, millicpus * 1024 // 1000), 262_144)


def _set(name: str, path: str, value: int) -> None:
    if name == "memory":
        _write("memory", path, "limit_in_bytes", "memory.limit_in_bytes", value)
        # Memory and swap together no more than memory: a limit that swap gets around is none.
        _write("memory", path, "memsw_limit_in_bytes", "memory.memsw.limit_in_bytes", value, optional=True)
    elif name == "pids":
        _write("pids", path, "max", "pids.max", value)
    else:
        amount, period = quota(value)
        _write("cpu", path, "shares", "cpu.shares", shares(value))
        if period != PERIOD:  # else it is what a new group has
            _write("cpu", path, "cfs_period_us", "cpu.cfs_period_us", period)
        try:
            _write("cpu", path, "cfs_quota_us", "cpu.cfs_quota_us", amount)
        except LaunchError:
            if not _is_stricter_above(path, amount / period):
                raise


def _is_stricter_above(path: str, ratio: float) -> bool:
    """Whether an ancestor has less cpu. v1 refuses a larger quota below a smaller one (v2 takes the minimum): the
    ancestor's then holds here anyway, and none is written."""
    above = os.path.dirname(path)
    while os.path.exists(f"{above}/cpu.cfs_quota_us"):
        with open(f"{above}/cpu.cfs_quota_us") as quota_file, open(f"{above}/cpu.cfs_period_us") as period_file:
            amount, period = int(quota_file.read()), int(period_file.read())
        if 0 < amount < ratio * period:
            return True
        above = os.path.dirname(above)
    return False


def _write(controller: str, path: str, attribute: str, file: str, value: int, *, optional: bool = False) -> None:
    """`optional`: a kernel that was built without this file is no error."""
    try:
        writers = _cgroupspy()
        if writers is None:
            write_plainly(f"{path}/{file}", value)
        else:
            writers(controller, path, attribute, value)
    except OSError as error:
        if optional and error.errno == errno.ENOENT:
            return
        need = f"{value}"
        raise from_oserror(error, syscall="write", target=f"{path}/{file}", need=need, **_explain(error)) from None


def write_plainly(file: str, value: int | str) -> None:
    """One write(2) of the whole value, as control files want it. OSError of the kernel."""
    fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def _explain(error: OSError) -> dict[str, str]:
    if error.errno == errno.EINVAL:
        return {"hint": "the kernel takes no such value for this limit"}
    return {"hint": "the agent may not set this limit: meso doctor"} if error.errno in (errno.EACCES, errno.EPERM) else {}


@cache
def _cgroupspy() -> Callable[[str, str, str, int], None] | None:
    """A writer of attributes through cgroupspy, loaded when the first limit is set; None where it is not installed."""
    try:
        from cgroupspy.controllers import Controller, CpuController, MemoryController  # type: ignore[import-untyped]
        from cgroupspy.interfaces import IntegerFile  # type: ignore[import-untyped]
        from cgroupspy.nodes import Node  # type: ignore[import-untyped]
    except ImportError:
        return None

    def set_property(self: Any, filename: bytes, value: int) -> None:
        write_plainly(os.fsdecode(self.filepath(filename)), value)  # the library's own opens a buffered text file for each

    def quick(base: Any, **interfaces: Any) -> Any:
        return type(base.__name__, (base,), {"set_property": set_property, **interfaces})

    pids = quick(Controller, max=IntegerFile("pids.max"), current=IntegerFile("pids.current"))
    controllers = {"memory": quick(MemoryController), "cpu": quick(CpuController), "pids": pids}
    known = {name: {key for each in found.__mro__ for key in vars(each)} for name, found in controllers.items()}

    def write(controller: str, path: str, attribute: str, value: int) -> None:
        if attribute not in known[controller]:  # it would take any name, and do nothing
            raise AttributeError(f"{controller} has no {attribute}")
        setattr(controllers[controller](Node(path)), attribute, value)

    return write
