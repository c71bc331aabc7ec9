"""Who clones: the launcher itself, or the cradle, a process of almost nothing that does it for the launcher.

A copying clone costs what its parent's memory costs: the page tables are copied, every page that the parent touches
afterwards is (an interpreter touches all of them: it counts references), and execve drops it all again; together that
is a third of a launch. The cradle is a copy of the launcher that has unmapped everything but the walker's code, one
region of its own, its thread's control block and the page that the numbers of pidfds go to. It

* shares the launcher's descriptors (CLONE_FILES): what a table mentions is there, the child's pidfd arrives there;
* clones with CLONE_PARENT: the launcher is the child's parent, as if it had cloned it itself;
* reads each table into memory of its own, from a file (the mould) that only the launcher writes: what a child will do
  cannot be changed by anybody once it exists;
* holds nothing, decides nothing, and dies with the launcher (PR_SET_PDEATHSIG). If it dies alone, a new one is made.

The launcher waits for its answer: that takes as long as the clone does, and nobody else can reach the cradle. It exists
where the walker in machine code does; elsewhere, and for the rare table that its region is too small for, `Direct` serves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import struct
import sys
from typing import Protocol

from mesocosm.kernel.launcher.emptying import add_unmapping
from mesocosm.kernel.launcher.link import Linked
from mesocosm.kernel.launcher.table import RETURN_IF_ANY, Fragment
from mesocosm.kernel.launcher.walk import Stub, Walker
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import namespaces
from mesocosm.kernel.linux.libc import private_region, syscall, write_at

_CONTROL = struct.Struct("=6q")  # stack, requests, answers, mould, buffer, own PID namespace: as in stub.S
_REQUEST = struct.Struct("=4q")  # size, rows, status, a pidfd whose PID namespace the child is born in or -1
_ANSWER = struct.Struct("=q")
_CLONE_ARGS = struct.Struct("=11Q")
_STACK = 4 * 4096  # with the control block at its low end, above it the buffer
_BUFFER = 1 << 20
_PATIENCE = 10  # seconds: a clone takes a millisecond, but somebody may have stopped the cradle
_ENTRY = 8  # of `cradle` in the stub


class Cloner(Protocol):
    """Runs a linked table up to its clone."""

    @property
    def address(self) -> int | None:
        """Where the table will be when it is walked; None: in the buffer it was linked in."""
        ...

    def clone(self, linked: Linked, status: int, enter: int) -> int:
        """The child's pid, or minus the errno. `enter`: a pidfd of whose PID namespace the child is born in, or -1."""
        ...


class Direct:
    """The launcher clones by itself."""

    address: int | None = None

    def __init__(self, walker: Walker, pid_namespace: int) -> None:
        self._walk = walker
        self._pid_namespace = pid_namespace

    def clone(self, linked: Linked, status: int, enter: int) -> int:
        """See Cloner."""
        if enter < 0:
            return self._walk(linked, status)
        namespaces.setns(enter, c.CLONE_NEWPID)
        try:
            return self._walk(linked, status)
        finally:
            namespaces.setns(self._pid_namespace, c.CLONE_NEWPID)


class Cradle:
    """The process, seen from the launcher. OSError from the constructor if it cannot be made.

    `shared`: (address, size) of the memory that the kernel writes the numbers of pidfds to.
    """

    def __init__(self, stub: Stub, pid_namespace: int, shared: tuple[int, int]) -> None:
        self._fds: list[int] = []
        pid, region = 0, -1
        try:
            requests, self._requests = self._keep(*os.pipe2(os.O_CLOEXEC))
            self._answers, answers = self._keep(*os.pipe2(os.O_CLOEXEC))
            (self._mould,) = self._keep(os.memfd_create("mould", os.MFD_CLOEXEC))
            self._poll = select.poll()
            self._poll.register(self._answers, select.POLLIN)
            region = private_region(_STACK + _BUFFER)
            self.address = region + _STACK
            write_at(region, _CONTROL.pack(self.address, requests, answers, self._mould, self.address, pid_namespace))
            rows = _rows(region, stub, shared)
            write_at(self.address, rows.packed)
            write_at(self.address + _NAME_AT, b"meso-cradle\0")
            write_at(self.address + _ARGS_AT, _CLONE_ARGS.pack(c.CLONE_FILES, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0))
            pid = stub.call(_ENTRY, self.address, rows.rows, region)
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid), "clone3")
            (self.pidfd,) = self._keep(os.pidfd_open(pid))
            self._poll.register(self.pidfd, select.POLLIN)
            self._hear()
        except BaseException:
            if pid > 0:
                os.kill(pid, signal.SIGKILL)  # our child, and not reaped yet; it has our descriptors: no numbers that it reads from
            self.close()
            raise
        finally:
            if region >= 0:
                syscall("munmap", region, _STACK + _BUFFER)

    def _keep(self, *fds: int) -> tuple[int, ...]:
        self._fds += fds
        return fds

    def fits(self, size: int) -> bool:
        """Whether its region is large enough, with room for the rows that linking adds."""
        return size <= _BUFFER // 2

    @property
    def is_alive(self) -> bool:
        """Whether nobody has killed it."""
        return not any(fd == self.pidfd for fd, _ in self._poll.poll(0))

    def clone(self, linked: Linked, status: int, enter: int) -> int:
        """See Cloner. OSError ECHILD if the cradle is dead; whether there is a child then, reaping tells."""
        if os.pwrite(self._mould, linked.buffer, 0) != len(linked.buffer):
            raise OSError(errno.ENOMEM, "no memory for a container's table")
        os.write(self._requests, _REQUEST.pack(len(linked.buffer), linked.rows, status, enter))
        return self._hear()

    def _hear(self) -> int:
        heard = {fd for fd, _ in self._poll.poll(_PATIENCE * 1000)}
        if not heard:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        if self._answers not in heard:
            raise ChildProcessError(errno.ECHILD, "the process that clones for the launcher has died, or did not answer: try again")
        answer: int = _ANSWER.unpack(os.read(self._answers, _ANSWER.size))[0]
        return answer

    def close(self) -> None:
        """Lets go of a dead one's descriptors."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


class Cloners:
    """Which of the two clones, and a new cradle for one that has been killed. `shared`: see Cradle."""

    def __init__(self, walker: Walker, shared: tuple[int, int]) -> None:
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._stub = walker if isinstance(walker, Stub) else None
        self._shared = shared
        self._direct = Direct(walker, self._pid_namespace)
        self._attempts = _ATTEMPTS
        self._cradle = self._make()

    def _make(self) -> Cradle | None:
        if self._stub is None:
            return None
        try:
            cradle = Cradle(self._stub, self._pid_namespace, self._shared)
        except OSError as error:
            print(f"no cradle: {error}; the launcher clones by itself", file=sys.stderr, flush=True)
            self._attempts -= 1
            if not self._attempts:
                self._stub = None
            return None
        self._attempts = _ATTEMPTS
        return cradle

    def dismiss(self) -> None:
        """No cradle, until the next clone: it has all our descriptors open, and would keep them open after an execve."""
        if self._cradle is not None:
            with contextlib.suppress(OSError):  # dead already
                signal.pidfd_send_signal(self._cradle.pidfd, signal.SIGKILL)
                os.waitid(os.P_PIDFD, self._cradle.pidfd, os.WEXITED)
            self._cradle.close()
            self._cradle = None

    def choose(self, size: int) -> Cloner:
        """Who clones for a table of `size` bytes."""
        if self._cradle is not None and not self._cradle.is_alive:
            self._cradle.close()
            self._cradle = None
        if self._cradle is None:
            self._cradle = self._make()
        if self._cradle is not None and self._cradle.fits(size):
            return self._cradle
        return self._direct


_ATTEMPTS = 3  # in a row: an error may be of the moment, or of the machine
_NAME_AT = _BUFFER - 4096  # in the buffer, out of the way of the rows; a table may overwrite them later
_ARGS_AT = _BUFFER - 2048


def _rows(region: int, stub: Stub, shared: tuple[int, int]) -> Fragment:
    """What makes a copy of the launcher the cradle: its clone, its name, its death, and no memory but what it needs."""
    rows = Fragment()
    buffer = region + _STACK
    rows.row("clone3", buffer + _ARGS_AT, _CLONE_ARGS.size, flags=RETURN_IF_ANY)
    rows.row("prctl", c.PR_SET_NAME, buffer + _NAME_AT, 0, 0, 0)
    rows.row("prctl", c.PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    rows.row("getppid", expect=os.getpid())  # it may have died before it was asked to tell
    add_unmapping(rows, [(stub.address, stub.size), (region, _STACK + _BUFFER), shared])
    return rows
