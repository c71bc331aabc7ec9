"""What the launcher knows of its containers: one Birth each, and the barriers they stand at.

Bookkeeping only; what is said to the agent, and when, is zygote.py's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from typing import Any

from mesocosm.kernel.launcher.link import Linked
from mesocosm.kernel.launcher.protocol import UNCLAIMED
from mesocosm.kernel.linux.libc import shared_words, syscall
from mesocosm.kernel.linux.pidfds import pid_of

_SLOTS = 1024  # births under way at once whose pidfd is not known yet
_WORD = 0xFFFFFFFF  # the kernel writes 32 bits; all ones: nothing yet


class Birth:
    """One container, from its clone until its exit record is acknowledged."""

    __slots__ = (
        "barrier", "concluded", "discarded_by", "doomed", "ended", "failure", "held", "id", "linked", "mid", "note", "number",
        "phase", "pid", "pidfd", "record", "slot", "status", "trouble", "user_map",
    )  # fmt: skip

    def __init__(
        self, container_id: str, barrier: str, number: int, status: socket.socket | None, note: bytes, user_map: list[int] | None
    ) -> None:
        self.id = container_id
        self.barrier = barrier
        self.number = number  # of the request that waits for an answer; 0 if nobody does any more
        self.status = status  # None: of somebody else's child, or said all it had to say
        self.note = note
        self.user_map = user_map
        self.phase = "staging"
        self.pid = 0
        self.mid = 0  # the intermediate of a nested container, until it is reaped
        self.pidfd = -1
        self.slot = -1
        self.linked: Linked | None = None
        self.failure: dict[str, Any] | None = None
        self.trouble: dict[str, Any] | None = None  # of this process, with the birth: what it fails of if it is not over
        self.ended: dict[str, Any] | None = None
        self.record = b""  # of its end, until it is written down (`reaped`)
        self.concluded = self.doomed = False  # doomed: to be killed as soon as there is something to kill
        self.held: list[int] = []  # descriptors that the intermediate of a nested container still needs
        self.discarded_by: list[int] = []
        if status is not None:
            status.setblocking(False)  # noqa: FBT003 - the library's own signature

    def receive(self) -> bytes | None:
        """The next record; empty when the child has closed its end (execve, or death), None if there is nothing yet.

        Nothing yet: an event may be older than the birth whose descriptor has its number now.
        """
        assert self.status is not None
        try:
            return self._recv(0)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def has_more(self) -> bool:
        """Whether a record (not just the end) is waiting."""
        try:
            return bool(self._recv(socket.MSG_PEEK))
        except OSError:
            return False

    def _recv(self, flags: int) -> bytes:
        assert self.status is not None
        try:
            return self.status.recv(64, flags)
        except ConnectionResetError:
            # It died before it had read what was sent to it: the kernel says so once, before what it said itself.
            return self.status.recv(64, flags)

    def send(self, data: bytes) -> None:
        """One byte down to the child, which may be gone."""
        try:
            if self.status is not None:
                self.status.send(data)
        except OSError:
            pass

    def kill(self) -> None:
        """SIGKILL, by pidfd; now, or as soon as there is one.

        An intermediate is left alone: it lives for a millisecond, and killed in the middle of its clone it could
        leave a container that nobody knows. What it leaves is killed when it has been reaped.
        """
        self.doomed = True
        if self.pidfd >= 0 and not self.ended:
            with contextlib.suppress(OSError):
                syscall("pidfd_send_signal", self.pidfd, signal.SIGKILL, None, 0)

    @property
    def failed_before_leaf(self) -> bool:
        """Whether the intermediate of a nested container has reported that it could not make it."""
        row = (self.failure or {}).get("row")
        return row is not None and self.linked is not None and row < self.linked.entry

    def as_line(self) -> dict[str, Any]:
        """One line of the inventory."""
        phase = "ended" if self.ended else "running" if self.phase == "released" else self.phase
        living = self.pidfd >= 0 and not self.ended
        return {
            "id": self.id, "barrier": self.barrier, "pid": self.pid, "phase": phase, "note": self.note, "ended": self.ended,
            "living": living, "failed": self.failure if self.failure and self.failure.get("released") else None,
        }  # fmt: skip


class Barrier:
    """A pipe that all members of one launch read from. Its write end is in this process only."""

    __slots__ = ("aborted", "aborted_by", "members", "read_end", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        self.members: set[Birth] = set()
        self.aborted = False
        self.aborted_by: list[int] = []

    def abort(self) -> None:
        """Whoever reads gets 0, which means abort.

        The read end stays while there are members: an intermediate could still hand its number to a child, and by
        then it must not be another barrier's.
        """
        self.aborted = True
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        """Both ends."""
        self.abort()
        os.close(self.read_end)


class Births:
    """All births, by container id, by pid and by status descriptor."""

    def __init__(self, poll: select.epoll) -> None:
        self._poll = poll
        self.by_id: dict[str, Birth] = {}
        self.by_pid: dict[int, Birth] = {}
        self.by_status: dict[int, Birth] = {}
        self.barriers: dict[str, Barrier] = {}
        self._unclaimed: float | None = None  # since when barriers have stood without an agent
        self._pidfds: set[int] = set()
        self._nested: set[Birth] = set()  # those whose intermediate has not told the pidfd yet
        # clone3 writes the pidfd's number here. A page shared with the children: the intermediate of a nested
        # container does the clone, and its own memory is a copy.
        self._words, self._address = shared_words(_SLOTS)
        self._free = list(range(_SLOTS))

    def barrier(self, name: str) -> Barrier:
        """The barrier called `name`, made when first asked for."""
        found = self.barriers.get(name)
        if found is None:
            found = self.barriers[name] = Barrier()
        return found

    @property
    def slots(self) -> tuple[int, int]:
        """(address, size) of the page with the slots."""
        return self._address, 8 * _SLOTS

    def take_slot(self, birth: Birth) -> int:
        """The address where the clone will leave the pidfd's number."""
        if not self._free:
            raise BlockingIOError(11, "too many containers are being born at once")
        birth.slot = self._free.pop()
        self._words[birth.slot] = -1
        return self._address + 8 * birth.slot

    def watch(self, birth: Birth) -> None:
        """Hears what the child says. Before it is cloned: OSError is still in time."""
        assert birth.status is not None
        self._poll.register(birth.status, select.EPOLLIN)
        self.by_status[birth.status.fileno()] = birth

    def add(self, birth: Birth, pid: int, *, nested: bool) -> None:
        """The clone has succeeded: `pid` is the container's, or its intermediate's."""
        self.by_pid[pid] = birth
        if nested:
            birth.mid = pid
            self._nested.add(birth)
        else:
            birth.pid = pid
            birth.pidfd = self._words[birth.slot] & _WORD
            self._pidfds.add(birth.pidfd)
            self._give_back_slot(birth)
        self.by_id[birth.id] = birth
        self.barriers[birth.barrier].members.add(birth)

    def foster(self, birth: Birth, pidfd: int) -> None:
        """Somebody else's child. Its pid is not looked up when one of ours is reaped: that has it only once this one is gone."""
        birth.pidfd = pidfd
        self._pidfds.add(pidfd)
        self.by_id[birth.id] = birth

    def restore(self, birth: Birth, pidfd: int) -> None:
        """A child of this process from before it executed this program; `pidfd` -1 if it has been reaped."""
        self.by_id[birth.id] = birth
        if pidfd >= 0:
            os.set_inheritable(pidfd, False)  # noqa: FBT003 - the library's own signature
            birth.pidfd = pidfd
            self._pidfds.add(pidfd)
            self.by_pid[birth.pid] = birth

    def _give_back_slot(self, birth: Birth) -> None:
        if birth.slot >= 0:
            self._free.append(birth.slot)
            birth.slot = -1
            self._nested.discard(birth)

    def learn_pid(self, birth: Birth) -> None:
        """Finds out a nested container's pidfd and pid, as this process counts, if its clone has taken place.

        The kernel writes the number before it opens the pidfd, and leaves it there when the clone then fails. So the
        number alone says nothing: it must be a pidfd, of a process that is not reaped, that no other birth has.
        """
        if birth.pid or birth.slot < 0 or birth.failed_before_leaf:
            return
        number = self._words[birth.slot] & _WORD
        if number == _WORD or number in self._pidfds or any(self._claims(other, number) for other in self._nested - {birth}):
            return
        try:
            pid = pid_of(number)
        except OSError as error:  # asked again when its intermediate has been reaped; it does not start meanwhile
            birth.trouble = {"row": None, "errno": error.errno, "message": "the launcher could not look up the container's process"}
            return
        if pid > 0 and pid not in self.by_pid:
            birth.pid, birth.pidfd = pid, number
            self.by_pid[pid] = birth
            self._pidfds.add(number)
            self._give_back_slot(birth)
            birth.trouble = birth.trouble if birth.doomed else None
            if birth.doomed:
                birth.kill()

    def abandon(self, birth: Birth) -> None:
        """Who cloned this one died over it: if there is a child, nobody else knows of it, so it ends here."""
        number = self._words[birth.slot] & _WORD if birth.slot >= 0 else _WORD
        if number == _WORD or number in self._pidfds or any(self._claims(other, number) for other in self._nested - {birth}):
            return
        try:
            syscall("pidfd_send_signal", number, signal.SIGKILL, None, 0)
        except OSError as error:
            if error.errno != errno.ESRCH:
                return  # a number that the kernel left there before its clone failed: it is no pidfd
        os.close(number)

    def _claims(self, birth: Birth, number: int) -> bool:
        return not birth.failed_before_leaf and self._words[birth.slot] & _WORD == number

    def about_to_reap(self, pid: int) -> Birth | None:
        """The birth that a dead child belongs to, None for a stranger. Ask before reaping: afterwards a pidfd has no pid."""
        if pid not in self.by_pid:
            for birth in tuple(self._nested):
                self.learn_pid(birth)
        return self.by_pid.get(pid)

    def reaped(self, pid: int, status: int, usage: Any) -> Birth | None:
        """Books a reaped child; the birth that has ended by it."""
        birth = self.by_pid.pop(pid, None)
        if birth is None:
            return None  # an orphan of a container without a PID namespace
        if pid == birth.mid:
            birth.mid = 0
            self._let_go(birth)
            if birth.pid or birth.ended:
                return None
            self.learn_pid(birth)
            if birth.pid:
                return None
            # It never got as far as cloning; or one intermediate of two failed after the other had.
            self.abandon(birth)
            self._give_back_slot(birth)
        birth.ended = {
            "id": birth.id,
            "status": status,
            "user_us": int(usage.ru_utime * 1e6),
            "system_us": int(usage.ru_stime * 1e6),
            "max_rss_kib": usage.ru_maxrss,
            "time": time.time(),
        }
        return birth

    def _let_go(self, birth: Birth) -> None:
        for fd in birth.held:
            os.close(fd)
        birth.held = []

    def release(self, name: str) -> None:
        """Opens a barrier: one write, one byte for each member. All or none: somebody still on the way is an error."""
        barrier = self.barriers.get(name)
        if barrier is None or barrier.aborted:
            raise FileNotFoundError(errno.ENOENT, f"there is no barrier {name}")
        for birth in barrier.members:
            if birth.phase != "staged":
                raise BlockingIOError(errno.EBUSY, f"{birth.id} does not stand at the barrier yet")
        os.write(barrier.write_end, b"x" * max(1, len(barrier.members)))
        for birth in barrier.members:
            birth.phase = "released"
        barrier.close()
        del self.barriers[name]

    def abort(self, name: str, number: int) -> bool:
        """Ends all that stand at a barrier; True if there is nobody to wait for."""
        barrier = self.barriers.get(name)
        if barrier is None:
            return True
        barrier.abort()
        for birth in barrier.members:
            birth.kill()
        if not barrier.members:
            self._drop(name, barrier)
            return True
        barrier.aborted_by.append(number)
        return False

    def claim(self, *, agent: bool) -> float:
        """Seconds until barriers that nobody has claimed are aborted, -1 if there is none, or an agent. Aborts them when due."""
        if agent or all(barrier.aborted for barrier in self.barriers.values()):
            self._unclaimed = None
            return -1.0
        now = time.monotonic()
        self._unclaimed = self._unclaimed or now
        left = self._unclaimed + UNCLAIMED - now
        if left > 0:
            return left
        for name in list(self.barriers):
            self.abort(name, 0)
        return -1.0

    def left(self, birth: Birth) -> list[int] | None:
        """Takes an ended birth from its barrier. If that is aborted: who waited for it, once it is empty. Else None."""
        barrier = self.barriers.get(birth.barrier)
        if barrier is None or birth not in barrier.members:
            return None
        barrier.members.discard(birth)
        if not barrier.aborted:
            return None
        if barrier.members:
            return []
        self._drop(birth.barrier, barrier)
        return barrier.aborted_by

    def _drop(self, name: str, barrier: Barrier) -> None:
        barrier.close()
        del self.barriers[name]

    def orphaned(self) -> None:
        """The agent has gone: nobody waits for any answer. Numbers start again with the next one."""
        for birth in self.by_id.values():
            birth.number = 0
            birth.discarded_by.clear()
        for barrier in self.barriers.values():
            barrier.aborted_by.clear()

    def close_status(self, birth: Birth) -> None:
        """The child will say nothing more."""
        if birth.status is not None:
            if self.by_status.pop(birth.status.fileno(), None) is not None:
                self._poll.unregister(birth.status)
            birth.status.close()
            birth.status = None

    def forget(self, birth: Birth) -> None:
        """Drops everything about a birth that is over, or never was. An intermediate not reaped yet stays known by its pid."""
        self.close_status(birth)
        if not birth.mid:
            self._let_go(birth)
        self._give_back_slot(birth)
        if birth.pidfd >= 0:
            self._pidfds.discard(birth.pidfd)
            os.close(birth.pidfd)
            birth.pidfd = -1
        if self.by_id.get(birth.id) is birth:
            del self.by_id[birth.id]
        if self.by_pid.get(birth.pid) is birth:
            del self.by_pid[birth.pid]
        barrier = self.barriers.get(birth.barrier)
        if barrier is not None:
            barrier.members.discard(birth)
            if not barrier.members:
                self._drop(birth.barrier, barrier)
