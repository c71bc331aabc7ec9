"""What the launcher knows of its containers: one Birth each, and the barriers they stand at.

Bookkeeping only; what is said to the agent, and when, is zygote.py's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import socket
import time
from typing import Any

from mesocosm.kernel.launcher.link import Linked
from mesocosm.kernel.linux.libc import syscall

_SLOTS = 1024  # births under way at once whose pidfd is not known yet


class Birth:
    """One container, from its clone until its exit record is acknowledged."""

    __slots__ = (
        "barrier", "concluded", "discarded_by", "ended", "failure", "held", "id", "linked", "mid", "note", "number", "phase", "pid",
        "pidfd", "slot", "status", "user_map",
    )  # fmt: skip

    def __init__(
        self, container_id: str, barrier: str, number: int, status: socket.socket, note: bytes, user_map: list[int] | None
    ) -> None:
        self.id = container_id
        self.barrier = barrier
        self.number = number  # of the request that waits for an answer
        self.status: socket.socket | None = status
        self.note = note
        self.user_map = user_map
        self.phase = "staging"
        self.pid = 0
        self.mid = 0  # the intermediate of a nested container, until it is reaped
        self.pidfd = -1
        self.slot = -1
        self.linked: Linked | None = None
        self.failure: dict[str, Any] | None = None
        self.ended: dict[str, Any] | None = None
        self.concluded = False
        self.held: list[int] = []  # descriptors that the intermediate of a nested container still needs
        self.discarded_by: list[int] = []
        status.setblocking(False)

    def receive(self) -> bytes:
        """The next record; empty when the child has closed its end (execve, or death)."""
        assert self.status is not None
        try:
            return self.status.recv(64)
        except OSError:
            return b""

    def has_more(self) -> bool:
        """Whether a record (not just the end) is waiting."""
        assert self.status is not None
        try:
            return bool(self.status.recv(64, socket.MSG_PEEK))
        except OSError:
            return False

    def send(self, data: bytes) -> None:
        """One byte down to the child, which may be gone."""
        try:
            if self.status is not None:
                self.status.send(data)
        except OSError:
            pass

    def kill(self) -> None:
        """SIGKILL, by pidfd where there is one; an intermediate by its pid, which is ours until we reap it."""
        try:
            if self.pidfd >= 0:
                syscall("pidfd_send_signal", self.pidfd, signal.SIGKILL, None, 0)
            elif self.mid or self.pid:
                os.kill(self.mid or self.pid, signal.SIGKILL)
        except OSError:
            pass

    def as_line(self) -> dict[str, Any]:
        """One line of the inventory."""
        phase = "ended" if self.ended else "running" if self.phase == "released" else self.phase
        living = self.pidfd >= 0 and not self.ended
        return {
            "id": self.id, "barrier": self.barrier, "pid": self.pid, "phase": phase, "note": self.note, "ended": self.ended,
            "living": living,
        }  # fmt: skip


class Barrier:
    """A pipe that all members of one launch read from. Its write end is in this process only."""

    __slots__ = ("aborted_by", "members", "read_end", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        self.members: set[Birth] = set()
        self.aborted_by: list[int] = []

    def close(self) -> None:
        """Both ends; whoever still reads gets 0, which means abort."""
        for name in ("read_end", "write_end"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


class Births:
    """All births, by container id, by pid and by status descriptor."""

    def __init__(self, poll: select.epoll) -> None:
        self._poll = poll
        self.by_id: dict[str, Birth] = {}
        self.by_pid: dict[int, Birth] = {}
        self.by_status: dict[int, Birth] = {}
        self.barriers: dict[str, Barrier] = {}
        self._strays: dict[int, tuple[int, Any]] = {}
        # clone3 writes the pidfd's number here. A page shared with the children: the intermediate of a nested
        # container does the clone, and its own memory is a copy.
        self._page = mmap.mmap(-1, _SLOTS * 8)
        self._words = memoryview(self._page).cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self._free = list(range(_SLOTS))

    def barrier(self, name: str) -> Barrier:
        """The barrier called `name`, made when first asked for."""
        found = self.barriers.get(name)
        if found is None:
            found = self.barriers[name] = Barrier()
        return found

    def take_slot(self, birth: Birth) -> int:
        """The address where the clone will leave the pidfd's number."""
        if not self._free:
            raise BlockingIOError(11, "too many containers are being born at once")
        birth.slot = self._free.pop()
        self._words[birth.slot] = -1
        return self._address + 8 * birth.slot

    def add(self, birth: Birth, pid: int, *, nested: bool) -> None:
        """The clone has succeeded: `pid` is the container's, or its intermediate's."""
        if nested:
            birth.mid = pid
            self.by_pid[pid] = birth
        else:
            birth.pid = pid
            self.by_pid[pid] = birth
            self._take_pidfd(birth)
        self.by_id[birth.id] = birth
        assert birth.status is not None
        self.by_status[birth.status.fileno()] = birth
        self._poll.register(birth.status, select.EPOLLIN)
        self.barriers[birth.barrier].members.add(birth)

    def _take_pidfd(self, birth: Birth) -> None:
        if birth.slot < 0:
            return
        value = self._words[birth.slot] & 0xFFFFFFFF
        if value != 0xFFFFFFFF:
            birth.pidfd = value
            self._free.append(birth.slot)
            birth.slot = -1

    def learn_pid(self, birth: Birth) -> None:
        """Finds out a nested container's pid, as this process counts, from its pidfd."""
        self._take_pidfd(birth)
        if birth.pid == 0 and birth.pidfd >= 0:
            with open(f"/proc/self/fdinfo/{birth.pidfd}") as info:
                for line in info:
                    if line.startswith("Pid:"):
                        birth.pid = max(0, int(line[4:]))
            if birth.pid:
                self.by_pid[birth.pid] = birth

    def reaped(self, pid: int, status: int, usage: Any) -> list[Birth]:
        """Books a reaped child; the births that have ended by it."""
        birth = self.by_pid.pop(pid, None)
        if birth is None:
            if any(each.mid for each in self.by_id.values()):
                self._strays[pid] = status, usage  # perhaps a nested container, reaped before its intermediate was
            else:
                self._strays.clear()
            return []
        if pid == birth.mid:
            birth.mid = 0
            self._let_go(birth)
            self.learn_pid(birth)
            if birth.pidfd < 0:
                return [self._end(birth, status, usage)]  # it never got as far as cloning
            if birth.pid in self._strays:
                self.by_pid.pop(birth.pid, None)
                return [self._end(birth, *self._strays.pop(birth.pid))]
            if birth.pid == 0 and self._strays:
                return [self._end(birth, *self._strays.pop(next(iter(self._strays))))]
            return []
        return [self._end(birth, status, usage)]

    def _let_go(self, birth: Birth) -> None:
        for fd in birth.held:
            os.close(fd)
        birth.held = []

    def _end(self, birth: Birth, status: int, usage: Any) -> Birth:
        birth.ended = {
            "id": birth.id,
            "status": status,
            "user_us": int(usage.ru_utime * 1e6),
            "system_us": int(usage.ru_stime * 1e6),
            "max_rss_kib": usage.ru_maxrss,
            "time": time.time(),
        }
        return birth

    def release(self, name: str) -> None:
        """Opens a barrier: one write, one byte for each member."""
        barrier = self.barriers.get(name)
        if barrier is None:
            raise FileNotFoundError(2, f"there is no barrier {name}")
        for birth in barrier.members:
            if birth.phase == "staged":
                birth.phase = "released"
        os.write(barrier.write_end, b"x" * max(1, len(barrier.members)))
        barrier.close()
        del self.barriers[name]

    def abort(self, name: str, number: int) -> bool:
        """Ends all that stand at a barrier; True if there is nobody to wait for."""
        barrier = self.barriers.get(name)
        if barrier is None:
            return True
        barrier.close()
        waiting = [birth for birth in barrier.members if not birth.ended]
        for birth in waiting:
            birth.kill()
        if not waiting:
            for birth in list(barrier.members):
                self.forget(birth)
            self.barriers.pop(name, None)
            return True
        barrier.aborted_by.append(number)
        return False

    def left(self, barrier: Barrier, birth: Birth) -> bool:
        """Takes an ended birth from its barrier; True if that was the last one of an aborted barrier."""
        barrier.members.discard(birth)
        if barrier.aborted_by and not barrier.members:
            self.barriers.pop(birth.barrier, None)
            return True
        return False

    def close_status(self, birth: Birth) -> None:
        """The child will say nothing more."""
        if birth.status is not None:
            if self.by_status.pop(birth.status.fileno(), None) is not None:
                self._poll.unregister(birth.status)
            birth.status.close()
            birth.status = None

    def forget(self, birth: Birth) -> None:
        """Drops everything about a birth that is over, or never was."""
        self.close_status(birth)
        if not birth.mid:
            self._let_go(birth)
        if birth.slot >= 0:
            self._free.append(birth.slot)
            birth.slot = -1
        if birth.pidfd >= 0:
            os.close(birth.pidfd)
            birth.pidfd = -1
        if self.by_id.get(birth.id) is birth:
            del self.by_id[birth.id]
        for pid in (birth.pid, birth.mid):
            if self.by_pid.get(pid) is birth:
                del self.by_pid[pid]
        barrier = self.barriers.get(birth.barrier)
        if barrier is not None:
            barrier.members.discard(birth)
            if not barrier.members and not barrier.aborted_by:
                barrier.close()
                del self.barriers[birth.barrier]
