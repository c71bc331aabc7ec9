"""What execve would refuse that no system call can be asked about beforehand.

AT_EXECVE_CHECK (and faccessat2 even more so) is content with a script whose interpreter is missing, a program
whose loader is missing, a file of another machine, garbage and an empty file. All of these would fail after the
barrier, when the others are running already. So, while the container stands at its barrier with its final root,
the program's first bytes are read through /proc/PID/root, as execve would read them, and followed: `#!` lines to
their interpreter (as deep as the kernel follows them), ELF files to their PT_INTERP.

Nothing is executed, loaded or believed here: bytes are read, paths resolved inside the container's root, and numbers
checked before they are used (an enemy may have written the file). What lies on a volume could be a file system that never
answers, so where such a one is mounted that is read by a process of its own, with a deadline (`Elsewhere`): a thread would keep
the agent, and all its locks, from ending.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from mesocosm.kernel.core.errors import LaunchError, from_oserror
from mesocosm.kernel.core.plan import Step
from mesocosm.kernel.launcher.steps import candidates
from mesocosm.kernel.linux import served
from mesocosm.kernel.linux.constants import ARCH
from mesocosm.kernel.linux.holding import is_served, mounts_of
from mesocosm.kernel.linux.paths import open_inside
from mesocosm.kernel.linux.processes import is_exiting

Elsewhere = Callable[[Sequence[str], float], Awaitable[tuple[str, int]]]
"""Runs a command; what it says within so many seconds, and the pid of one that has to be left behind (runtime.outside)."""

_DEADLINE = 5.0  # seconds
_MACHINE = {"x86_64": (62, 3), "aarch64": (183, 40)}  # elf.h: EM_X86_64 (and EM_386, which it also runs), EM_AARCH64
_MAX_DEPTH = 6  # fs/exec.c, exec_binprm: five scripts and a binary (execve(2) says four)
_BINPRM = 256  # BINPRM_BUF_SIZE: execve looks for the interpreter's name in so many bytes
_MOST_HEADERS, _LONGEST = 65_536, 4096  # fs/binfmt_elf.c: bytes of program headers, PATH_MAX


_MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENXIO, errno.EPERM})


class _RefusedError(Exception):
    """(errno, what, message, hint)"""


async def precheck(pid: int, steps: Sequence[Step], container_id: str | None = None, *, elsewhere: Elsewhere) -> None:
    """Raises LaunchError if the program of the container staged as `pid` cannot be executed, or is not read (ETIMEDOUT)."""
    index = next((number for number, step in enumerate(steps) if step.kind == "check"), None)
    if index is None:
        return
    step = steps[index]
    where: dict[str, Any] = {"id": container_id, "plugin": step.plugin}
    where["step"] = {"index": index, "stage": step.stage, "kind": step.kind}
    programs = candidates(step.args["argv"], step.args["path"])
    cwd = next((str(each.args.get("path") or "/") for each in steps if each.kind == "working_directory"), "/")
    programs = [program if program.startswith("/") else f"{cwd}/{program}" for program in programs]
    try:
        if _answers(steps) or not _may_wait(pid, steps):
            _check(pid, programs, cwd)
        else:
            began = trio.current_time()
            said, left = await elsewhere([sys.executable, "-P", "-B", "-m", __name__, str(pid), cwd, *programs], _DEADLINE)
            if not said:
                has_waited = left or trio.current_time() - began >= _DEADLINE
                raise (_silent(programs[0], left) if has_waited else _unread(programs[0])).with_fields(**where)
            _relive(json.loads(said))
    except _RefusedError as refused:
        number, target, message, hint = refused.args
        raise LaunchError(message, syscall="execve", errno=errno.errorcode[number], target=target, hint=hint, **where) from None
    except OSError as error:
        hint = "the agent could not read the program before starting it"
        raise from_oserror(error, syscall="openat2", hint=hint, **where) from error


def _unread(program: str) -> LaunchError:
    hint = "it could not be started, or was killed: is the machine out of memory or processes?"
    return LaunchError(f"the process that was to read {program} ended without a word", target=program, hint=hint)


def _silent(program: str, left: int) -> LaunchError:
    return LaunchError(
        f"{program} could not be read within {_DEADLINE:.0f} s",
        syscall="openat2",
        errno="ETIMEDOUT",
        target=program,
        have=f"pid {left}, which tries it for us, is stuck" if left else None,
        hint="the file system it is on does not answer: see to it that it does, or unmount it (umount -l)",
    )


def _answers(steps: Sequence[Step]) -> bool:
    """Whether all that is mounted is the host's own view or of our making. A path may lead anywhere, by its links."""
    return any(step.kind == "view" for step in steps) and not any(
        step.kind == "bind" and step.args.get("foreign", True) for step in steps
    )


def _may_wait(pid: int, steps: Sequence[Step]) -> bool:
    """Whether a file system that somebody serves, and may stop serving, can be in that container's root; none of them is asked."""
    if not served.ours().touches("/"):
        return False
    # An overlay does not say what its layers are on.
    return any(step.kind == "overlay" for step in steps) or any(is_served(mount.type) for mount in mounts_of(pid))


def _check(pid: int, programs: Sequence[str], cwd: str = "/") -> None:
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        if not _is_ending(pid):
            raise
        return  # and whoever waits for it is about to be told why
    try:
        for program in programs:
            try:
                fd = open_inside(root, program, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError as error:
                if error.errno not in _MISSING:
                    raise
                continue  # execvp tries the next directory too; that one of them may be executed, the check has found
            try:
                if not _is_executable(fd):
                    continue
                _follow(root, program, fd, cwd)
            finally:
                os.close(fd)
            return
        kinds = {program: _is_file(root, program) for program in programs}
        none = [program for program, is_file in kinds.items() if is_file is False]
        if none and True not in kinds.values():  # to faccessat2 (before Linux 6.14) a directory or a pipe may be executed
            raise _RefusedError(errno.EACCES, none[-1], f"{none[-1]} cannot be executed: it is no file", None)
    finally:
        os.close(root)


def _is_ending(pid: int) -> bool:
    """Whether it has ended, or is about to."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            line = file.read()
    except OSError:
        return True
    return line.rpartition(")")[2].split()[0] in ("Z", "X") or is_exiting(line)


def _is_file(root: int, program: str) -> bool | None:
    """False for a directory, a pipe, a socket or a device, none of which is opened for that; None if nothing can be found."""
    try:
        fd = open_inside(root, program, os.O_PATH)
    except OSError:
        return None
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


def _is_executable(fd: int) -> bool:
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def _follow(root: int, asked: str, fd: int, cwd: str) -> None:
    program, opened = asked, list[int]()
    try:
        for _ in range(_MAX_DEPTH):
            needed = _interpreter(program, os.pread(fd, 4096, 0), fd)
            if needed is None:
                return
            kind, path = needed
            try:
                fd = open_inside(root, path if path.startswith("/") else f"{cwd}/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError as error:
                if error.errno not in _MISSING:
                    raise  # our own trouble (no descriptor left, say), not the program's
                message = f"{asked} cannot be executed: its {kind} {path} is missing"
                hint = f"put {path} into the container's root, or name another {kind} in {program}"
                raise _RefusedError(error.errno, path, message, hint) from None
            opened.append(fd)
            if not _is_executable(fd):
                message = f"{asked} cannot be executed: its {kind} {path} is not executable"
                raise _RefusedError(errno.EACCES, path, message, f"chmod +x {path}")
            if kind == "loader":
                return
            program = path
    finally:
        for found in opened:
            os.close(found)
    message = f"{asked} cannot be executed: its interpreters are scripts themselves, too many deep"
    raise _RefusedError(errno.ELOOP, asked, message, "name a binary in the #! line")


def _interpreter(program: str, head: bytes, fd: int) -> tuple[str, str] | None:
    """("interpreter" or "loader", its path) that executing `head` needs; None for a static program."""
    if head.startswith(b"#!"):
        line = head[2:_BINPRM].split(b"\n", 1)[0].strip(b" \t")
        path = line.split(b"\0", 1)[0].split(b" ", 1)[0].split(b"\t", 1)[0]
        if not path:
            message = f"{program} cannot be executed: its #! line names no interpreter"
            raise _RefusedError(errno.ENOEXEC, program, message, "#!/bin/sh, say")
        return "interpreter", os.fsdecode(path)
    if head.startswith(b"\x7fELF") and len(head) >= 64:
        return _loader(program, head, fd)
    if head and _runs_foreign_formats():
        return None
    what = "it is empty" if not head else "it is neither a script with a #! line nor an ELF program"
    hint = 'run it with its interpreter: ["sh", "FILE"]'
    raise _RefusedError(errno.ENOEXEC, program, f"{program} cannot be executed: {what}", hint)


def _runs_foreign_formats() -> bool:
    """Whether the kernel has been told of interpreters for other formats and machines: then it knows better than we do."""
    try:
        return bool(set(os.listdir("/proc/sys/fs/binfmt_misc")) - {"register", "status"})
    except OSError:
        return False


def _loader(program: str, head: bytes, fd: int) -> tuple[str, str] | None:
    is_64 = head[4] == 2
    machine = struct.unpack_from("<H", head, 18)[0]
    if machine not in _MACHINE.get(ARCH, (machine,)):
        if _runs_foreign_formats():
            return None
        message = f"{program} cannot be executed: it is for another machine (ELF e_machine {machine})"
        raise _RefusedError(errno.ENOEXEC, program, message, None)
    broken = _RefusedError(errno.ENOEXEC, program, f"{program} cannot be executed: its ELF headers are broken", None)
    if is_64:
        offset, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
    else:
        offset, size, count = *struct.unpack_from("<I", head, 28), *struct.unpack_from("<HH", head, 42)
    if size != (56 if is_64 else 32) or not 0 < size * count <= _MOST_HEADERS:
        raise broken
    table = _read(fd, size * count, offset)
    if table is None:
        raise broken
    for number in range(count):
        entry = table[number * size : (number + 1) * size]
        if struct.unpack_from("<I", entry)[0] != 3:  # PT_INTERP
            continue
        at, length = struct.unpack_from("<8xQ16xQ", entry) if is_64 else struct.unpack_from("<4xI8xI", entry)
        path = _read(fd, length, at) if 2 <= length <= _LONGEST else None
        if path is None or not path.endswith(b"\0") or path.startswith(b"\0"):
            raise broken
        return "loader", os.fsdecode(path.split(b"\0", 1)[0])
    return None


def _read(fd: int, size: int, offset: int) -> bytes | None:
    """`size` bytes at `offset`; None if they are not all there."""
    if offset > 2**63 - 1 - size:  # more than a file can have: pread would not even try
        return None
    found = os.pread(fd, size, offset)
    return found if len(found) == size else None


def _relive(told: list[Any]) -> None:
    """What `main` has met, here."""
    kind, *about = told
    if kind == "refused":
        raise _RefusedError(*about)
    if kind == "errno":
        raise OSError(*about)


def main(argv: Sequence[str]) -> int:
    """``python -m mesocosm.kernel.launcher.precheck PID CWD PROGRAM…``: prints what `_check` comes to, as a JSON list."""
    told: list[Any] = ["fine"]
    try:
        _check(int(argv[1]), argv[3:], argv[2])
    except _RefusedError as refused:
        told = ["refused", *refused.args]
    except OSError as error:
        told = ["errno", error.errno or 0, error.strerror or str(error), error.filename]
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
