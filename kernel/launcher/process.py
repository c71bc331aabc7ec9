"""How the launcher's process begins: the keeper above it, its limits, its signals, its socket; then `zygote` serves.

What must not be here: anything that happens after the first request.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import resource
import signal
import socket
from typing import NoReturn

from mesocosm.kernel.launcher import reaped, upgrade, womb
from mesocosm.kernel.launcher.keeper import keep
from mesocosm.kernel.launcher.protocol import SOCKET
from mesocosm.kernel.launcher.walk import choose_walker
from mesocosm.kernel.launcher.zygote import Zygote
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux.libc import syscall

_FEWEST_FILES = 256  # some of fixed numbers up to 95, and ten or so for each container that is being built


def main(run_dir: str, walker: str | None = None, build: str = "") -> None:
    """The process: starts the keeper, which starts the launcher, which serves RUN_DIR/launcher.sock. Returns in nobody.

    The first process leaves when the launcher answers: with 0, or with 1 if it never will.
    """
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())  # for good: signals arrive by descriptor
    heard, ready = os.pipe()
    if os.fork():
        os.close(ready)
        os._exit(0 if os.read(heard, 1) else 1)
    syscall("prctl", c.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    record = reaped.open_for_writing(directory)
    if os.fork():
        keep(record)
    os.close(record)
    os.close(heard)
    syscall("prctl", c.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < _FEWEST_FILES:
        raise SystemExit(f"at least {_FEWEST_FILES} open files are needed, the limit is {hard}: ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20), hard))
    listener = _listen(directory)
    if listener is None:
        os.write(ready, b"1")
        os._exit(0)
    zygote = _zygote(listener, directory, walker, build)
    os.write(ready, b"1")
    os.close(ready)
    _serve(zygote)


def resume(run_dir: str, walker: str | None, build: str, file: int) -> None:
    """The same process, after an execve in place (`upgrade`): `file` has what the program before knew. Returns in nobody."""
    state = upgrade.read_state(file)
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.set_inheritable(state["listener"], False)  # noqa: FBT003 - the library's own signature
    zygote = _zygote(socket.socket(fileno=state["listener"]), directory, walker, build)
    zygote.take_over(state)
    _serve(zygote)


def _zygote(listener: socket.socket, directory: int, walker: str | None, build: str) -> Zygote:
    syscall("prctl", c.PR_SET_NAME, b"meso-launcher", 0, 0, 0)
    syscall("prctl", c.PR_SET_DUMPABLE, 0, 0, 0, 0)
    _, walk = choose_walker(walker)
    wakeups = _signal_descriptor()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    return Zygote(listener, directory, walk, womb.enter(), wakeups, null, build)


def _serve(zygote: Zygote) -> NoReturn:
    gc.collect()
    gc.freeze()
    gc.disable()
    zygote.run()
    os._exit(0)


def _listen(directory: int) -> socket.socket | None:
    """The socket under its name; None if a launcher listens there. One that an agent was starting when it was killed, and the one
    that the next agent starts, look one after the other: whoever took the name from the other would hide what that one has."""
    path = f"/proc/self/fd/{directory}/{SOCKET}"  # a path of ours may be longer than a socket address takes
    turn = reaped.open_for_writing(directory)
    try:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if _is_served(path):
            return None
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET, dir_fd=directory)
        listener.bind(path)
        os.chmod(SOCKET, 0o600, dir_fd=directory)
        listener.listen(8)  # who connects from here on is answered when all is ready
        return listener
    finally:
        os.close(turn)


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)  # noqa: FBT003 - the library's own signature
        try:
            probe.connect(path)
        except BlockingIOError:  # so many wait for it already
            return True
        except OSError:
            return False
        return True


def _signal_descriptor() -> int:
    for number in range(1, 65):
        # Ignored signals survive execve, and Python ignores two; every signal is blocked here, so none of these can
        # hit us. SIGKILL and SIGSTOP refuse.
        with contextlib.suppress(OSError):
            syscall("rt_sigaction", number, bytes(32), None, 8)
    mask = (1 << (signal.SIGCHLD - 1)).to_bytes(8, "little")
    return syscall("signalfd4", -1, mask, 8, os.O_NONBLOCK | os.O_CLOEXEC)
