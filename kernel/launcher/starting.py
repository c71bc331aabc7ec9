"""How a launcher is started: a process of its own, which nothing of its starter's gets into.

What lives here: its command line, its program's file, waiting until it answers. What must not: talking to it (`client`).
"""

from __future__ import annotations

import os
import sys

import msgpack
import trio

from mesocosm.kernel.core.errors import InternalError, LaunchError, from_oserror
from mesocosm.kernel.launcher.build import build_id
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import mounts


async def start(run_dir: str, walker: str | None = None) -> None:
    """A launcher that answers; InternalError with its last words if it cannot start."""
    pid = _spawn(run_dir, walker)
    pidfd = os.pidfd_open(pid)
    try:
        await trio.lowlevel.wait_readable(pidfd)
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(pidfd)
    if status:
        raise InternalError(f"the launcher could not start: {_last_line(run_dir)}", target=f"{run_dir}/launcher.log")


def _last_line(run_dir: str) -> str:
    with open(f"{run_dir}/launcher.log", errors="replace") as log:
        return (log.read().splitlines() or ["it said nothing"])[-1]


def open_program() -> int:
    """A descriptor of the interpreter, on a read-only mount that nobody else has: a container begins as a copy of the launcher,
    and could otherwise keep /proc/self/exe (as its program, say) to write to the file later, once nobody executes it any more.

    LaunchError if it cannot be made.
    """
    program = -1
    try:
        program = mounts.open_tree(sys.executable)
        mounts.mount_setattr(program, set_=c.MOUNT_ATTR_RDONLY | c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NODEV)
    except OSError as error:
        if program >= 0:
            os.close(program)
        raise _cannot_start(error) from error
    return program


def command_line(call: str) -> list[str]:
    """What makes the interpreter call a function of `process`."""
    roots = {os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))}
    roots.add(os.path.dirname(os.path.dirname(msgpack.__file__)))
    script = f"import sys; sys.path[:0] = {sorted(roots)!r}; from mesocosm.kernel.launcher import process; process.{call}"
    return [sys.executable, "-I", "-S", "-c", script]


def _spawn(run_dir: str, walker: str | None) -> int:
    """Starts a launcher for `run_dir`: its own session, no terminal, nothing of our memory or descriptors.

    The pid of a process that leaves, with 0, when the launcher answers; the caller waits for it.
    """
    log = os.open(f"{run_dir}/launcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    program = -1
    try:
        program = open_program()
        return os.posix_spawn(
            f"/proc/self/fd/{program}",
            command_line(f"main({run_dir!r}, {walker!r}, {build_id()!r})"),
            {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
    except OSError as error:
        raise _cannot_start(error) from error
    finally:
        if program >= 0:
            os.close(program)
        os.close(log)


def _cannot_start(error: OSError) -> LaunchError:
    call = getattr(error, "syscall", None) or "posix_spawn"
    return from_oserror(error, syscall=call, target=sys.executable, doing="starting the launcher")
