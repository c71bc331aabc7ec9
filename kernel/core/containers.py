"""What a container is, once defaults, units and inheritance are applied: the value that isolators plan from.

A pod file says what a user wants in the user's words; a `ContainerSpec` says what will be, in whole numbers
and with every field filled in. It is made here, by pure functions, from a task and its parent's spec.

Defaults that follow the parent (the table of the manual is this dict):
a nested container owns its mounts, process ids, host name and cgroup view, and shares its parent's users,
network and IPC; a root container owns everything but the clock.
"""

from __future__ import annotations

import posixpath
import re
import signal as _signal
from collections.abc import Mapping

import msgspec

from mesocosm.kernel.core import names, resources
from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.core.spec import Kill, Pod, Resources, Task, Volume, check_absolute

ROOT_SHARES = {
    "user": "own",
    "mount": "own",
    "pid": "own",
    "uts": "own",
    "ipc": "own",
    "net": "own",
    "cgroup": "own",
    "time": "host",
}
NESTED_SHARES = {
    "user": "parent", "mount": "own", "pid": "own", "uts": "own",
    "ipc": "parent", "net": "parent", "cgroup": "own", "time": "parent",
}  # fmt: skip

# What Docker grants by default (moby oci/caps/defaults.go, 14 capabilities): ours is never more.
DEFAULT_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "NET_RAW",
    "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
)  # fmt: skip
CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip
"""In the order of linux/capability.h: the index is the capability's number."""

RLIMITS = (
    "cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as", "locks",
    "sigpending", "msgqueue", "nice", "rtprio", "rttime",
)  # fmt: skip
"""In the order of asm-generic/resource.h: the index is the resource's number."""
UNLIMITED = 2**64 - 1  # RLIM_INFINITY


_NUMBER = re.compile(r"[0-9]{1,9}")  # str.isdigit() also takes what int() does not: superscripts, thousands of digits


class VolumeMount(msgspec.Struct, frozen=True):
    """A volume, parsed: `kind` is shared, host, tmpfs or volume; `value` its name or path; `size` in bytes (tmpfs)."""

    kind: str
    value: str
    target: str
    read_only: bool = False
    size: int = 0


class ContainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One container, complete. `command` is empty for the pod's own container, which runs `pause`."""

    id: str
    role: str = "default"
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    user: str = "0"
    cwd: str | None = None
    rootfs: str = "host"
    image: str | None = None
    read_only: bool = False
    hostname: str = "pod"
    namespaces: dict[str, str] = msgspec.field(default_factory=ROOT_SHARES.copy)
    cpus: int | None = None  # millicpus
    memory: int | None = None  # bytes
    pids: int | None = None
    rlimits: dict[str, tuple[int, int]] = {}  # (soft, hard)
    log: int | None = None  # bytes that each of stdout and stderr keeps; None: LOG_BUDGET
    kill_signal: int = int(_signal.SIGTERM)
    kill_grace: int = 3000  # milliseconds
    essential: bool = True
    sidecar: bool = False
    api: bool = False
    init: bool = False
    capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES
    volumes: tuple[VolumeMount, ...] = ()
    labels: dict[str, str] = {}
    has_children: bool = False
    path: str = "$"  # where in the user's document this container stands: errors name it

    @property
    def parent(self) -> str | None:
        """The id of the container this one lives in, None for a root container."""
        return names.parent_of(self.id)

    @property
    def is_pause(self) -> bool:
        """Whether this container only holds namespaces and volumes for those below it."""
        return not self.command


def pod_container(pod: Pod, path: str = "$") -> ContainerSpec:
    """The root container of a pod: it runs `pause` and holds what the tasks share."""
    shares = {**ROOT_SHARES, "net": {"pod": "own", "none": "own", "host": "host"}[pod.network], **pod.namespaces}
    cpus, memory, pids = _resources(pod.resources, f"{path}.resources")
    return ContainerSpec(
        id=pod.name, role=pod.role, hostname=pod.hostname or pod.name, namespaces=shares, cpus=cpus, memory=memory, pids=pids,
        labels=pod.labels, has_children=True, path=path, kill_signal=9, kill_grace=0,
    )  # fmt: skip


def task_container(task: Task, parent: ContainerSpec, path: str) -> ContainerSpec:
    """The container of a task nested in `parent`."""
    return _container(task, names.join(parent.id, task.name), {**NESTED_SHARES, **task.namespaces}, parent.role, task.name, path)


def single_container(pod: Pod, task: Task, path: str) -> ContainerSpec:
    """The container of the only task of `pod`, as a root container of its own: no pod around it."""
    shares = {**ROOT_SHARES, "net": {"pod": "own", "none": "own", "host": "host"}[pod.network], **pod.namespaces, **task.namespaces}
    return _container(task, pod.name, shares, pod.role, pod.hostname or pod.name, path)


def _container(task: Task, container_id: str, shares: Mapping[str, str], role: str, hostname: str, path: str) -> ContainerSpec:
    cpus, memory, pids = _resources(task.resources, f"{path}.resources")
    kill_signal, kill_grace = _kill(task.kill, f"{path}.kill")
    log = None if task.log is None else _log(task.log, f"{path}.log")
    capabilities = DEFAULT_CAPABILITIES if task.capabilities is None else _capabilities(task.capabilities, f"{path}.capabilities")
    return ContainerSpec(
        id=container_id,
        role=role,
        command=("/bin/sh", "-c", task.command) if isinstance(task.command, str) else tuple(task.command),
        env=task.env,
        user="0" if task.user is None else str(task.user),
        cwd=task.cwd,
        rootfs=task.rootfs or "host",
        image=task.image,
        read_only=task.read_only,
        hostname=hostname,
        namespaces=dict(shares),
        cpus=cpus,
        memory=memory,
        pids=pids,
        rlimits={name: _rlimit(name, value, f"{path}.limits.{name}") for name, value in task.limits.items()},
        log=log,
        kill_signal=kill_signal,
        kill_grace=kill_grace,
        essential=task.essential,
        sidecar=task.sidecar,
        api=task.api,
        init=task.init,
        capabilities=capabilities,
        volumes=tuple(parse_volume(volume, f"{path}.volumes[{index}]") for index, volume in enumerate(task.volumes)),
        labels=task.labels,
        has_children=bool(task.tasks) or task.api,
        path=path,
    )


def parse_volume(volume: Volume, path: str) -> VolumeMount:
    """``shared:N``, ``host:/p``, ``tmpfs:16MiB`` or ``volume:N``, at an absolute target."""
    kind, colon, value = volume.source.partition(":")
    target = check_absolute(volume.target, f"{path}.target")
    if posixpath.normpath("/" + target.lstrip("/")) == "/":
        raise SpecError("a volume cannot be the root directory", path=f"{path}.target", hint="use rootfs = '/dir' for that")
    match kind if colon else "":
        case "shared" | "volume":
            names.check_name(value, f"{path}.source")
        case "host":
            check_absolute(value, f"{path}.source")
        case "tmpfs":
            return VolumeMount("tmpfs", value, target, volume.read_only, resources.size(value, f"{path}.source"))
        case _:
            raise SpecError(
                f"{volume.source[:80]!r} is not a volume source",
                path=f"{path}.source",
                hint="shared:NAME, host:/path, tmpfs:16MiB or volume:NAME",
            )
    return VolumeMount(kind, value, target, volume.read_only)


def _resources(asked: Resources, path: str) -> tuple[int | None, int | None, int | None]:
    if asked.pids is not None and not 0 < asked.pids < 2**22:
        raise SpecError("out of range", path=f"{path}.pids", have=str(asked.pids), need="1 to 4194303")
    cpus = None if asked.cpus is None else resources.millicpus(asked.cpus, f"{path}.cpus")
    memory = None if asked.memory is None else resources.size(asked.memory, f"{path}.memory")
    return cpus, memory, asked.pids


def signal_number(value: str | int, path: str) -> int:
    """SIGTERM by name (``TERM``, ``SIGTERM``) or number."""
    text = str(value).upper()
    if _NUMBER.fullmatch(text):
        if 1 <= int(text) <= 64:
            return int(text)
    elif (name := text if text.startswith("SIG") else "SIG" + text) in _signal.Signals.__members__:
        return int(_signal.Signals[name])
    raise SpecError(f"{str(value)[:40]!r} is not a signal", path=path, hint="a name like TERM, or 1 to 64")


def _kill(kill: Kill, path: str) -> tuple[int, int]:
    grace = 0 if kill.grace in (0, "0", "0s") else resources.duration(kill.grace, f"{path}.grace")
    return signal_number(kill.signal, f"{path}.signal"), grace


def _log(value: str | float, path: str) -> int:
    found = resources.size(value, path)
    if found < resources.SMALLEST_LOG:
        need = f"≥ {resources.show_size(resources.SMALLEST_LOG)}"
        raise SpecError("too little to keep anything", path=path, have=resources.show_size(found), need=need)
    return found


def _capabilities(asked: list[str], path: str) -> tuple[str, ...]:
    found = set()
    for index, text in enumerate(asked):
        name = text.upper().removeprefix("CAP_")
        if name not in CAPABILITIES:
            raise SpecError(f"{text[:40]!r} is not a capability", path=f"{path}[{index}]", hint="see capabilities(7)")
        found.add(name)
    return tuple(sorted(found, key=CAPABILITIES.index))


def _rlimit(name: str, value: int | str | list[int | str], path: str) -> tuple[int, int]:
    if name not in RLIMITS:
        raise SpecError(f"{name[:40]!r} is not a resource limit", path=path, hint=f"one of {' '.join(RLIMITS)} (getrlimit(2))")
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2:
        raise SpecError("a limit is one value or [soft, hard]", path=path)
    soft, hard = (_rlimit_value(item, path) for item in pair)
    if soft > hard:
        raise SpecError("the soft limit is above the hard one", path=path, have=str(soft), need=f"≤ {hard}")
    return soft, hard


def _rlimit_value(value: int | str, path: str) -> int:
    if value == "unlimited":
        return UNLIMITED
    if isinstance(value, str):
        return resources.size(value, path)
    if not 0 <= value < 2**63:
        raise SpecError("out of range", path=path, have=str(value), need="0 or more")
    return value
