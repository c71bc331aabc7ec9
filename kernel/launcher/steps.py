"""What each kind of setup step becomes: rows of the table. One small function per kind, all pure.

This page has what a process does to itself; what it does to its mounts is in mount_steps.py. Slots 1 to 15 are
scratch: no step expects anything in them from another one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping

from mesocosm.kernel.core.containers import CAPABILITIES, RLIMITS
from mesocosm.kernel.launcher.mount_steps import MOUNT_COMPILERS, Args, open_inside_root
from mesocosm.kernel.launcher.table import (
    JUMP_IF_OK,
    OK_ANY,
    RECORD,
    SAYS_STAGED,
    SAYS_USER,
    Data,
    Fragment,
    Pointers,
    Slot,
    Special,
    Text,
    Vector,
)
from mesocosm.kernel.linux import constants as c

A = Slot(1)
_PATH_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


# --- cgroup -----------------------------------------------------------------------------------------------------


def _attach_cgroup(f: Fragment, args: Args) -> None:
    # To `tasks`, not to cgroup.procs: moving one thread needs no grace period of RCU (10 to 20 ms).
    f.row("write", args["fd"], Text(b"0"), 1, expect=1)


def _oom_score(f: Fragment, args: Args) -> None:
    text = str(int(args["value"])).encode()
    f.row("openat", c.AT_FDCWD, Text(b"/proc/self/oom_score_adj"), os.O_WRONLY | os.O_CLOEXEC, 0, out=A)
    f.row("write", A, Text(text), len(text), expect=len(text))


def _unshare(f: Fragment, args: Args) -> None:
    flags = 0
    for name in args["namespaces"]:
        flags |= c.NAMESPACE_FLAGS[name]
    if flags:
        f.row("unshare", flags)


# --- user, own, configure ---------------------------------------------------------------------------------------


def _become_root_inside(f: Fragment, count: int) -> None:
    if count == 1:
        return  # who has one id has it already, whatever its number is inside; and setgroups is denied for good
    f.row("setgroups", 0, 0)
    f.row("setresgid", 0, 0, 0)
    f.row("setresuid", 0, 0, 0)


def _new_user(f: Fragment, args: Args) -> None:
    f.row("unshare", c.CLONE_NEWUSER)
    f.row("write", Special("status"), Data(RECORD.pack(SAYS_USER, 0, 0)), RECORD.size, expect=RECORD.size)
    f.row("read", Special("status"), Data(bytes(8)), 1, expect=1)
    _become_root_inside(f, int(args["count"]))


def _join_user(f: Fragment, args: Args) -> None:
    f.row("setns", Special("parent"), c.CLONE_NEWUSER)
    _become_root_inside(f, int(args.get("count", 65_536)))


def _hostname(f: Fragment, args: Args) -> None:
    name = str(args["name"]).encode()[:64]
    f.row("sethostname", Text(name), len(name))


def _loopback(f: Fragment, args: Args) -> None:
    f.row("socket", 2, 2 | os.O_CLOEXEC, 0, out=A)  # AF_INET, SOCK_DGRAM: any socket will do for an interface's flags
    f.row("ioctl", A, c.SIOCSIFFLAGS, Data(struct.pack("=16sh22x", b"lo", c.IFF_UP)))


# --- session, stdio, limits -------------------------------------------------------------------------------------


def _session(f: Fragment, args: Args) -> None:
    f.row("setsid")


def _keyring(f: Fragment, args: Args) -> None:
    f.row("keyctl", c.KEYCTL_JOIN_SESSION_KEYRING, 0)


def _stdio(f: Fragment, args: Args) -> None:
    fd = args.get("fd")
    f.row("dup3", Special("null") if fd is None else fd, int(args["number"]), 0)


def _rlimit(f: Fragment, args: Args) -> None:
    soft, hard = int(args["soft"]), int(args["hard"])
    f.row("prlimit64", 0, RLIMITS.index(args["resource"]), Data(struct.pack("=QQ", soft, hard)), 0)


# --- identity ---------------------------------------------------------------------------------------------------


def _bounding(f: Fragment, args: Args) -> None:
    keep = {CAPABILITIES.index(name) for name in args["keep"]}
    for number in range(len(CAPABILITIES)):
        if number not in keep:
            # A kernel that does not know the newest capabilities answers EINVAL: there is nothing to drop then.
            f.row("prctl", c.PR_CAPBSET_DROP, number, 0, 0, 0, flags=OK_ANY if number > _OLDEST_LAST else 0)


_OLDEST_LAST = 40  # CHECKPOINT_RESTORE, Linux 5.9: every kernel we run on has all up to here


def _identity(f: Fragment, args: Args) -> None:
    uid, gid = int(args["uid"]), int(args["gid"])
    if (only := args.get("only")) is not None:
        if [uid, gid] != list(only):
            _rename_the_only_id(f, {"uid_map": (uid, only[0]), "gid_map": (gid, only[1])})
        return
    groups = [int(group) for group in args.get("groups") or ()]
    if uid:
        f.row("prctl", c.PR_SET_KEEPCAPS, 1, 0, 0, 0)
    f.row("setgroups", len(groups), Data(struct.pack(f"={len(groups)}I", *groups)) if groups else 0)
    f.row("setresgid", gid, gid, gid)
    f.row("setresuid", uid, uid, uid)


def _rename_the_only_id(f: Fragment, maps: Mapping[str, tuple[int, int]]) -> None:
    # Written from inside: the launcher may write the maps of its children's first namespace, not of one within it.
    f.row("unshare", c.CLONE_NEWUSER)
    for file, ids in maps.items():
        text = b"%d %d 1" % ids
        f.row("openat", c.AT_FDCWD, Text(b"/proc/self/" + file.encode()), os.O_WRONLY | os.O_CLOEXEC, 0, out=A)
        f.row("write", A, Text(text), len(text), expect=len(text))


def _capabilities(f: Fragment, args: Args) -> None:
    mask = 0
    for name in args["keep"]:
        mask |= 1 << CAPABILITIES.index(name)
    header = struct.pack("=Ii", c.CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    f.row("prctl", c.PR_CAP_AMBIENT, c.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    f.row("capset", Data(header), Data(struct.pack("=6I", low, low, 0, high, high, 0)))


def _no_new_privileges(f: Fragment, args: Args) -> None:
    f.row("prctl", c.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _working_directory(f: Fragment, args: Args) -> None:
    # getcwd must lead back here: a directory outside the root would say "(unreachable)". IN_ROOT makes that impossible.
    open_inside_root(f, c.AT_FDCWD, args.get("path") or "/", _PATH_DIRECTORY, A)
    f.row("fchdir", A)


def _seccomp(f: Fragment, args: Args) -> None:
    program = args["filter"]
    pointer = Pointers(struct.pack("=HxxxxxxQ", len(program) // 8, 0), ((8, Data(program)),))
    f.row("seccomp", c.SECCOMP_SET_MODE_FILTER, 0, pointer)


# --- check, barrier, exec ---------------------------------------------------------------------------------------


def candidates(argv: Iterable[str], path: str) -> list[str]:
    """Where execvp(3) would look for the program, in order."""
    program = next(iter(argv))
    if "/" in program:
        return [program]
    return [f"{directory or '.'}/{program}" for directory in path.split(":")]


def _vectors(args: Args) -> tuple[Vector, Vector]:
    argv = Vector(tuple(os.fsencode(text) for text in args["argv"]))
    return argv, Vector(tuple(os.fsencode(f"{key}={value}") for key, value in (args.get("env") or {}).items()))


def _check(f: Fragment, args: Args) -> None:
    paths = candidates(args["argv"], args["path"])
    for index, path in enumerate(paths):
        last = index == len(paths) - 1
        flags, skip = (0, 0) if last else (JUMP_IF_OK, len(paths) - 1 - index)
        if args.get("execve_check", True):
            argv = Vector((os.fsencode(path),))
            f.row("execveat", c.AT_FDCWD, Text(os.fsencode(path)), argv, Vector(()), c.AT_EXECVE_CHECK, flags=flags, skip=skip)
        else:
            f.row("faccessat2", c.AT_FDCWD, Text(os.fsencode(path)), os.X_OK, c.AT_EACCESS, flags=flags, skip=skip)


def _barrier(f: Fragment, args: Args) -> None:
    # Nobody may look into this copy of the launcher; no descriptor may get past execve, whatever we forgot to mark;
    # and the launcher blocks all signals, which execve would keep.
    f.row("prctl", c.PR_SET_DUMPABLE, 0, 0, 0, 0)
    f.row("close_range", 3, 2**32 - 1, c.CLOSE_RANGE_CLOEXEC)
    f.row("rt_sigprocmask", c.SIG_SETMASK, Data(bytes(8)), 0, 8)
    f.row("write", Special("status"), Data(RECORD.pack(SAYS_STAGED, 0, 0)), RECORD.size, expect=RECORD.size)
    f.row("read", Special("barrier"), Data(bytes(8)), 1, expect=1)


def _exec(f: Fragment, args: Args) -> None:
    argv, env = _vectors(args)
    paths = candidates(args["argv"], args.get("path") or (args.get("env") or {}).get("PATH", "/usr/bin:/bin"))
    for path in paths:
        f.row("execve", Text(os.fsencode(path)), argv, env, flags=0 if path is paths[-1] else JUMP_IF_OK)


def _pause(f: Fragment, args: Args) -> None:
    f.row("execveat", Special("pause"), Text(b""), Vector((b"pause",)), Vector(()), c.AT_EMPTY_PATH)


COMPILERS: Mapping[str, Callable[[Fragment, Args], None]] = {
    **MOUNT_COMPILERS,
    "attach_cgroup": _attach_cgroup,
    "oom_score": _oom_score,
    "unshare": _unshare,
    "new_user": _new_user,
    "join_user": _join_user,
    "own": _unshare,
    "hostname": _hostname,
    "loopback": _loopback,
    "session": _session,
    "keyring": _keyring,
    "stdio": _stdio,
    "rlimit": _rlimit,
    "bounding": _bounding,
    "identity": _identity,
    "capabilities": _capabilities,
    "no_new_privileges": _no_new_privileges,
    "working_directory": _working_directory,
    "seccomp": _seccomp,
    "check": _check,
    "barrier": _barrier,
    "exec": _exec,
    "pause": _pause,
}
