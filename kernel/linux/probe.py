"""What this machine can do, found out by looking only: nothing is made, moved or mounted here.

Planning, `doctor` and the tests' skip reasons all read the same `HostFacts`. A feature is probed by asking the
kernel with arguments it must refuse (EBADF, EFAULT: the call exists; ENOSYS, EINVAL: it does not), never by
comparing version numbers where a distribution may have ported it back.

The one module of this package that imports more than core.errors: it fills in core.host's value type.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import re
import resource

from mesocosm.kernel.core.containers import CAPABILITIES, RLIMITS
from mesocosm.kernel.core.host import Account, CgroupFacts, HostFacts
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux.libc import SyscallError, syscall

# feature: (system call asked with arguments that cannot work, what its absence means)
_CALLS: dict[str, tuple[str, tuple[int | bytes | None, ...]]] = {
    "openat2": ("openat2", (-1, b"", None, 0)),
    "mount_setattr": ("mount_setattr", (-1, b"x", 0, None, 0)),
    "clone3": ("clone3", (None, 0)),
    "open_tree": ("open_tree", (-1, b"x", 0)),
    "pidfd": ("pidfd_send_signal", (-1, 0, None, 0)),
    "seccomp": ("seccomp", (c.SECCOMP_SET_MODE_FILTER, 0, None)),
}
FEATURES = (*_CALLS, "execve_check", "overlay", "cgroup_kill", "user_namespaces", "proc_pidns")
_POOL_RANGES = 4096  # of 65,536 ids each from 0x70000000 on: above what systemd and distributions hand out
_LISTED = ("/", "/etc", "/sys", "/dev", "/usr", "/var")


def boot_id() -> str:
    """Which boot of this machine this is."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def probe(run_dir: str, state_dir: str, *, uid: int | None = None, rootless: bool | None = None) -> HostFacts:
    """The facts of this machine for an agent with these directories.

    `uid` and `rootless` say who the agent's user is when the caller has already moved into a user namespace.
    """
    real_uid = os.getuid() if uid is None else uid
    is_rootless = real_uid != 0 if rootless is None else rootless
    features = frozenset(feature for feature in FEATURES if _has(feature))
    capabilities = frozenset(CAPABILITIES) if is_rootless else _effective_capabilities()
    namespaces = frozenset(name for name, file in _NAMESPACE_FILES.items() if os.path.exists(f"/proc/self/ns/{file}"))
    return HostFacts(
        kernel=_kernel_version(),
        arch=os.uname().machine,
        uid=real_uid,
        rootless=is_rootless,
        run_dir=run_dir,
        state_dir=state_dir,
        run_id=run_id(run_dir),
        boot_id=boot_id(),
        features=features,
        namespaces=namespaces,
        capabilities=capabilities,
        cgroups=_cgroups(),
        uid_ranges=0 if is_rootless else _POOL_RANGES,
        uid_count=1 if is_rootless else 65_536,
        listing={directory: _listing(directory) for directory in _LISTED},
        submounts=_submounts(),
        rlimits={name: resource.getrlimit(number) for number, name in enumerate(RLIMITS)},
        accounts={entry.pw_name: Account(entry.pw_uid, entry.pw_gid, entry.pw_dir) for entry in _passwd()},
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        cpus=os.cpu_count() or 1,
    )


_NAMESPACE_FILES = {
    "user": "user", "mount": "mnt", "pid": "pid", "uts": "uts", "ipc": "ipc", "net": "net", "cgroup": "cgroup", "time": "time",
}  # fmt: skip


def run_id(run_dir: str) -> str:
    """Six hexadecimal digits that tell the agents of one machine apart; the same for one run directory every time."""
    return hashlib.sha256(os.path.abspath(run_dir).encode()).hexdigest()[:6]


def _kernel_version() -> tuple[int, int, int]:
    numbers = [int(text) for text in re.findall(r"\d+", os.uname().release)[:3]]
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def _has(feature: str) -> bool:
    match feature:
        case "overlay":
            # In a user namespace too from Linux 5.11 on; a module not loaded yet is loaded by the first mount.
            with open("/proc/filesystems") as file:
                listed = "\toverlay\n" in file.read()
            return listed or os.path.exists(f"/lib/modules/{os.uname().release}/kernel/fs/overlayfs")
        case "execve_check":
            return _errno_of("execveat", -1, b"", None, None, c.AT_EMPTY_PATH | c.AT_EXECVE_CHECK) != errno.EINVAL
        case "cgroup_kill":
            return _kernel_version() >= (5, 14, 0)
        case "user_namespaces":
            allowed = _number("/proc/sys/kernel/unprivileged_userns_clone", 1) > 0  # Debian's own switch
            return allowed and _number("/proc/sys/user/max_user_namespaces") > 0
        case "proc_pidns":
            return _kernel_version() >= (6, 18, 0)
        case _:
            name, arguments = _CALLS[feature]
            refusal = _errno_of(name, *arguments)
            # seccomp without filters exists, too: it does not even look for the program (EINVAL).
            return refusal == errno.EFAULT if feature == "seccomp" else refusal != errno.ENOSYS


def _errno_of(name: str, *arguments: int | bytes | None) -> int:
    try:
        syscall(name, *arguments)
    except SyscallError as error:
        return error.errno or 0
    return 0


def _number(path: str, default: int = 0) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return default


def _effective_capabilities() -> frozenset[str]:
    with open("/proc/self/status") as file:
        mask = int(re.search(r"^CapEff:\s*([0-9a-f]+)", file.read(), re.M)[1], 16)  # type: ignore[index]  # always there: proc_pid_status(5)
    return frozenset(name for number, name in enumerate(CAPABILITIES) if mask >> number & 1)


def _listing(directory: str) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_symlink():
                    found[entry.name] = f"-> {os.readlink(entry.path)}"
                else:
                    found[entry.name] = "dir" if entry.is_dir() else "file"
    except OSError:
        pass
    return dict(sorted(found.items()))


def mounts() -> list[tuple[str, str, str]]:
    """(mount point, file system type, options of the superblock) of every mount this process sees. proc_pid_mountinfo(5)."""
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            kind, _, rest = right.partition(" ")
            point = left.split(" ")[4].replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
            found.append((point, kind, rest.split()[-1]))
    return found


def _submounts() -> tuple[str, ...]:
    below = ("/usr/", "/opt/", "/bin/", "/sbin/", "/lib")
    return tuple(sorted({point for point, _, _ in mounts() if point == "/opt" or point == "/usr" or point.startswith(below)}))


def _passwd() -> list[pwd.struct_passwd]:
    """The lines of passwd(5) itself, not of LDAP and the like: containers see only the file."""
    found = []
    try:
        with open("/etc/passwd", errors="replace") as file:
            for line in file:
                fields = line.rstrip("\n").split(":")
                if len(fields) == 7 and fields[2].isdigit() and fields[3].isdigit():
                    found.append(pwd.struct_passwd((fields[0], "x", int(fields[2]), int(fields[3]), "", fields[5], fields[6])))
    except OSError:
        pass
    return found


# --- control groups -------------------------------------------------------------------------------------------

_V1_LIMITS = {"cpu": "cpu", "memory": "memory", "pids": "pids"}


def _cgroups() -> CgroupFacts:
    """Where this process may make control groups, and which limits work there. cgroups(7)."""
    v1, v2_mount = _hierarchies()
    own = _own_cgroups()
    bases = {controller: base for controller, point in v1.items() if (base := _writable(point, own.get(controller, "/")))}
    v2 = _delegated(v2_mount, own.get("", "/")) if v2_mount else None
    if v1:
        limits = tuple(name for name in ("cpu", "memory", "pids") if name in bases)
        mode = "hybrid" if limits and v2 else "v1" if limits else "v2" if v2 else "none"
        reason = "" if len(limits) == 3 else "this user may not make cgroup v1 groups" if not limits else "controller not mounted"
        return CgroupFacts(mode=mode, v1=bases, v2=v2, limits=limits, reason=reason)
    if not v2:
        ours = f"{v2_mount}{own.get('', '/')}"
        reason = f"no delegated cgroup: {ours} is not ours" if v2_mount else "no cgroup file system is mounted"
        return CgroupFacts(reason=reason)
    with open(f"{v2}/cgroup.controllers") as file:
        controllers = file.read().split()
    limits = tuple(name for name in ("cpu", "memory", "pids") if name in controllers)
    # The real root has no type, and may hold processes beside groups; the root of a cgroup namespace may not. An agent
    # that stands there alone goes into a leaf first (leaf.py), so it itself does not count.
    if limits and os.path.exists(f"{v2}/cgroup.type") and strangers(v2) and not _enabled(v2, limits):
        limits, reason = (), f"processes in {v2} itself keep its controllers from being handed on (cgroups(7))"
    else:
        reason = "" if len(limits) == 3 else f"{v2}/cgroup.controllers has only: {' '.join(controllers) or 'nothing'}"
    return CgroupFacts(mode="v2", v2=v2, limits=limits, reason=reason)


def _hierarchies() -> tuple[dict[str, str], str | None]:
    """Where each v1 controller is mounted, and where v2 is."""
    v1: dict[str, str] = {}
    v2 = None
    for point, kind, options in mounts():
        if kind == "cgroup":
            v1.update({controller: point for controller in options.split(",") if controller in _V1_LIMITS})
        elif kind == "cgroup2" and (v2 is None or len(point) < len(v2)):
            v2 = point
    return v1, v2


def delegated() -> str | None:
    """The highest group of cgroup v2 in which this process may make groups and move processes; None if there is none."""
    _, mount = _hierarchies()
    return _delegated(mount, _own_cgroups().get("", "/")) if mount else None


def strangers(directory: str) -> bool:
    """Whether processes other than this one stand in a group itself. (Ours can move.)"""
    with open(f"{directory}/cgroup.procs") as file:
        return not set(file.read().split()) <= {str(os.getpid())}


def _own_cgroups() -> dict[str, str]:
    """Controller → path of this process; the v2 path under ''."""
    found: dict[str, str] = {}
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            for controller in controllers.split(","):
                found[controller] = path
    return found


def _writable(mount: str, own: str) -> str | None:
    """The hierarchy's top if we may make groups there, else our own group if we may, else None."""
    for base in (mount, mount + own.rstrip("/")):
        if os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
            return base
    return None


def _delegated(mount: str, own: str) -> str | None:
    """The highest group at or above our own in which we may make groups and move processes; None if there is none."""
    best = None
    path = own.rstrip("/")
    while True:
        directory = mount + path
        ours = os.access(directory, os.W_OK | os.X_OK) and os.access(f"{directory}/cgroup.procs", os.W_OK)
        if not (os.path.isdir(directory) and ours):
            return best
        best = directory
        if not path:
            return best
        path = path.rpartition("/")[0]


def _enabled(directory: str, controllers: tuple[str, ...]) -> bool:
    with open(f"{directory}/cgroup.subtree_control") as file:
        return set(controllers) <= set(file.read().split())
