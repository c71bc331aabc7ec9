"""The launcher process: it clones containers, is their parent, reaps them, and keeps what it saw.

What must not be here: plug-ins, trio, plans, anything that makes the process bigger (every container begins as a
copy of it) or that could block it (everything waits in one epoll). It decides nothing; the agent does.

Life of a birth, driven by what is read from the child's status socket and by reaping:

    stage ──▶ staging ──SAYS_STAGED──▶ staged ──release──▶ released ──EOF──▶ running ──reaped──▶ ended ──acknowledge──▶ (gone)
                 │ record / EOF / reaped     │ abort, barrier gone       │ record: exec_failed
                 ▼                           ▼                           ▼
             answered "failed" when reaped                           running (ends at once with 126)

Everything is reaped at once and in any order (a dying init of a PID namespace waits until the inits nested in it
have been reaped); a record is kept instead of a zombie.

The process above, the keeper, is a subreaper that does nothing but wait: should the launcher be killed, its
containers go on with a parent that reaps them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import time
from typing import Any

from mesocosm.kernel.launcher import pause, reaped, upgrade, womb
from mesocosm.kernel.launcher.adopted import Adopted
from mesocosm.kernel.launcher.births import Birth, Births
from mesocosm.kernel.launcher.cradle import Cloners
from mesocosm.kernel.launcher.line import Heard, Line
from mesocosm.kernel.launcher.link import link
from mesocosm.kernel.launcher.news import SOON, News
from mesocosm.kernel.launcher.protocol import MAX_MESSAGE, SOCKET
from mesocosm.kernel.launcher.table import RECORD, SAYS_STAGED, SAYS_USER, SPECIALS, Table
from mesocosm.kernel.launcher.walk import Walker

import msgpack  # isort: skip  # the only third-party module here: C, 60 KiB

_PIECE = 100  # lines of the inventory in a message
_LINGER = 5.0  # seconds without an agent, a container or an unread exit record before the launcher ends itself


class Zygote:
    """The launcher's state and its loop."""

    def __init__(
        self, listener: socket.socket, run_dir: int, walker: Walker, host_mount: int, signals: int, null: int, build: str
    ) -> None:
        self._run_dir = run_dir
        self._build = build
        self._listener = listener
        self._signals = signals
        self._null = null
        self._pause = pause.sealed()
        self._host_mount = host_mount
        self._poll = select.epoll()
        self._poll.register(signals, select.EPOLLIN)
        self.births = Births(self._poll)
        self._adopted = Adopted(self._poll, self.births, run_dir)
        self._line = Line(listener, self._poll, self._orphaned)
        self._news = News(self._line)
        self._verbs = {
            "stage": self._stage, "release": self._release, "abort": self._abort, "discard": self._discard,
            "acknowledge": self._acknowledge, "inventory": self._inventory, "view": self._view, "hello": self._hello,
            "stop": self._stop, "adopt": self._adopt, "upgrade": self._upgrade,
        }  # fmt: skip
        self._running = True
        self._cloners = Cloners(walker, self.births.slots)

    def run(self) -> None:
        """Serves until told to stop, or until nobody has needed it for a while."""
        idle_since: float | None = time.monotonic()
        while self._running:
            left = -1.0 if idle_since is None else idle_since + _LINGER - time.monotonic()
            left = SOON if self._news.is_waiting else left
            if (claim := self.births.claim(agent=self._line.is_connected)) >= 0 and (left < 0 or claim < left):
                left = claim
            if idle_since is not None and left <= 0:
                break
            left = left if (again := self._adopted.again) is None else again if left < 0 else min(left, again)
            for fd, events in self._poll.poll(left):
                if fd == self._signals:
                    os.read(self._signals, 4096)
                    self._reap()
                elif self._line.owns(fd):
                    if heard := self._line.turn(fd, events):
                        self._serve(heard)
                elif (birth := self.births.by_status.get(fd)) is not None:
                    self._hear(birth)
                elif self._adopted.owns(fd):
                    self._adopted.wake(fd)
            for birth in self._adopted.ended():
                self._conclude(birth)
            self._news.tell()
            if self._line.is_connected or self.births.by_id:
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
        with contextlib.suppress(OSError):
            os.unlink(SOCKET, dir_fd=self._run_dir)

    def _serve(self, heard: Heard) -> None:
        number = 0
        held: list[int] = []
        try:
            number, verb, body = msgpack.unpackb(heard.data)
            if heard.cut:
                raise OSError(errno.EMFILE, "the launcher has no descriptor left")
            held = self._verbs[verb](number, body, heard.fds) or []
        except OSError as error:
            self._fail(number, {"row": None, "errno": error.errno or 0, "message": error.strerror or str(error)})
        except Exception as error:  # a message we cannot read must not end every container's parent
            self._fail(number, {"row": None, "errno": 0, "message": f"{type(error).__name__}: {error}"})
        finally:
            for fd in heard.fds:
                if fd not in held:
                    os.close(fd)

    def _fail(self, number: int, body: dict[str, Any]) -> None:
        self._answer(number, "failed", body)

    def _answer(self, number: int, kind: str, body: dict[str, Any], fds: list[int] | None = None) -> None:
        if number:  # else whoever asked has gone or wants no answer, and 0 would make it news
            self._news.tell()
            self._line.send([number, kind, body], fds)

    # --- verbs --------------------------------------------------------------------------------------------------

    def _stage(self, number: int, body: dict[str, Any], fds: list[int]) -> list[int]:
        if "rows" not in body:
            packed = fds[-1]
            body |= msgpack.unpackb(os.pread(packed, os.fstat(packed).st_size, 0), max_bin_len=1 << 25)
        passed = fds[: body["fds"]]
        table = Table(*(body[name] for name in Table._fields))
        container_id = body["id"]
        parent = self.births.by_id.get(body["parent"]) if body["parent"] else None
        if body["parent"] and (parent is None or parent.pidfd < 0 or parent.ended):
            raise ProcessLookupError(errno.ESRCH, f"the parent {body['parent']} is not running", body["parent"])
        if (before := self.births.by_id.get(container_id)) is not None:
            if not before.ended:
                raise FileExistsError(errno.EEXIST, f"there is a container {container_id} already", container_id)
            self.births.forget(before)  # who gives the id away again knows of its end
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        birth = Birth(container_id, body["barrier"], number, ours, body["note"], body["user_map"])
        try:
            barrier = self.births.barrier(body["barrier"])
            if barrier.aborted:
                raise OSError(errno.ECANCELED, f"the launch of {container_id} has been aborted", container_id)
            self.births.watch(birth)
            values = {
                "status": theirs.fileno(), "barrier": barrier.read_end, "null": self._null, "pause": self._pause,
                "parent": parent.pidfd if parent else -1, "host_mount": self._host_mount,
                "pidfd_slot": self.births.take_slot(birth), "owner": body["owner"],
            }  # fmt: skip
            cloner = self._cloners.choose(len(table.rows) + len(table.blob))
            birth.linked = link(table, passed, [values[name] for name in SPECIALS], cloner.address)
            enter = parent.pidfd if parent is not None and body["enter_pid"] else -1
            try:
                pid = cloner.clone(birth.linked, theirs.fileno(), enter)
            except ChildProcessError:
                self.births.abandon(birth)
                raise
            if pid < 0:
                self.births.forget(birth)
                self._fail(number, {"row": 0, "errno": -pid})
                return []
            nested = body["entry"] > 1
            if nested:
                # The intermediate shares our descriptors until the leaf has its copy of them.
                birth.held = [theirs.detach(), *passed]
            self.births.add(birth, pid, nested=nested)
            return birth.held
        except BaseException:
            self.births.forget(birth)
            raise
        finally:
            theirs.close()

    def _release(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        try:
            self.births.release(body["barrier"])
        except OSError as error:
            if number:
                raise
            self._news.add("not_released", {"barrier": body["barrier"], "message": str(error)})
        self._answer(number, "ok", {})

    def _abort(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        if self.births.abort(body["barrier"], number):
            self._answer(number, "ok", {})

    def _discard(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        birth = self.births.by_id.get(body["id"])
        if birth is None or birth.phase not in ("staging", "staged"):
            self._answer(number, "ok", {})
        elif birth.ended:
            self.births.forget(birth)
            self._answer(number, "ok", {})
        else:
            birth.discarded_by.append(number)
            birth.kill()

    def _acknowledge(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        for container_id in body["ids"]:
            birth = self.births.by_id.get(container_id)
            if birth is not None and birth.ended:
                self.births.forget(birth)
        self._answer(number, "ok", {})

    def _adopt(self, number: int, body: dict[str, Any], fds: list[int]) -> list[int]:
        held: list[int] = []
        for line, fd in zip(body["lines"], fds, strict=True):
            try:
                if self._adopted.adopt(line, fd):
                    held.append(fd)
            except OSError as error:  # the others can do nothing about it
                print(f"{line['id']} could not be adopted: {error}", file=sys.stderr, flush=True)
        self._answer(number, "ok", {})
        return held

    def _inventory(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        # In pieces: one message carries so many descriptors and so many bytes.
        part: list[Birth] = []
        size = 0
        for birth in self.births.by_id.values():
            if len(part) == _PIECE or (part and size + len(birth.note) > MAX_MESSAGE // 2):
                self._tell(number, "more", part)
                part, size = [], 0
            part.append(birth)
            size += len(birth.note) + len(birth.id) + len(birth.barrier)
        self._tell(number, "ok", part)

    def _tell(self, number: int, kind: str, part: list[Birth]) -> None:
        living = [birth.pidfd for birth in part if birth.pidfd >= 0 and not birth.ended]
        self._answer(number, kind, {"lines": [birth.as_line() for birth in part]}, living)

    def _hello(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        self._answer(number, "ok", {"build": self._build})

    def _upgrade(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        upgrade.refuse_if_busy(self.births)
        self._news.tell()
        if self._news.is_waiting or self._line.is_behind:  # the next program would know nothing of it
            raise OSError(errno.EBUSY, "the agent has not been told everything yet")
        self._cloners.dismiss()
        upgrade.become(fds[0], body["argv"], self.births, self._adopted, self._listener.fileno(), self._host_mount)

    def take_over(self, state: dict[str, Any]) -> None:
        """Goes on where the program left off that this process executed before. See upgrade.py."""
        upgrade.take_over(state, self.births, self._adopted)
        self._reap()  # who died meanwhile has been told to the other one

    def _view(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        womb.build_view(body["name"], body["entries"], fds)
        self._answer(number, "ok", {})

    def _stop(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        living = [birth.id for birth in self.births.by_id.values() if not birth.ended]
        if living:
            raise OSError(errno.EBUSY, f"containers are still running: {' '.join(living[:5])}")
        self._answer(number, "ok", {})
        self._running = False

    # --- children -----------------------------------------------------------------------------------------------

    def _hear(self, birth: Birth) -> None:
        data = birth.receive()
        if data is None:
            return
        if len(data) == RECORD.size:
            row, number, _ = RECORD.unpack(data)
            if row == SAYS_USER:
                self._map_users(birth)
            elif row == SAYS_STAGED:
                self._staged(birth)
            else:
                assert birth.linked is not None
                released = birth.phase == "released"  # then it is kept for agents to come, like its end
                birth.failure = {"row": birth.linked.original_row(row), "errno": number, "released": released}
                if birth.phase in ("staged", "released"):  # before that, the answer to "stage" tells it
                    self._news.add("exec_failed", {"id": birth.id, **birth.failure})
            return
        self.births.close_status(birth)
        if birth.phase == "released":
            birth.phase = "running"
            birth.linked = None  # its rows have all been walked
            if birth.failure is None and not birth.ended:
                self._news.started(birth, time.time())
        self._conclude(birth)

    def _staged(self, birth: Birth) -> None:
        self.births.learn_pid(birth)
        if birth.doomed or birth.pidfd < 0:
            birth.kill()
            return
        birth.phase = "staged"
        self._answer(birth.number, "ok", {"pid": birth.pid}, [birth.pidfd])

    def _map_users(self, birth: Birth) -> None:
        self.births.learn_pid(birth)
        base, count = birth.user_map or (0, 1)
        for name in ("uid_map", "gid_map"):
            try:
                fd = os.open(f"/proc/{birth.pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, b"0 %d %d" % (base, count))
                finally:
                    os.close(fd)
            except OSError as error:
                message = f"writing the {name} of the container failed"
                birth.failure = {"row": None, "errno": error.errno, "message": message, "kind": "new_user"}
                birth.kill()
                return
        birth.send(b"1")

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            if (birth := self.births.about_to_reap(found.si_pid)) is not None and birth.mid == found.si_pid:
                while birth.status is not None and birth.has_more():  # did it get as far as cloning?
                    self._hear(birth)
            pid, status, usage = os.wait4(found.si_pid, 0)
            if (birth := self.births.reaped(pid, status, usage)) is not None:
                if birth.pidfd >= 0:
                    birth.record = reaped.as_record(pid, status, usage, os.fstat(birth.pidfd).st_ino)
                if not self._line.has_agent:
                    self._write_down(birth)
                self._conclude(birth)

    def _orphaned(self) -> None:
        self.births.orphaned()
        self._write_down(*self.births.by_id.values())  # what the agent has not said it knows

    def _write_down(self, *births: Birth) -> None:
        if records := [birth.record for birth in births if birth.record]:
            reaped.append(self._run_dir, *records)
            for birth in births:
                birth.record = b""

    def _conclude(self, birth: Birth) -> None:
        """Says how it ended, once it is both reaped and silent: what it said last is read before."""
        if birth.concluded or not birth.ended:
            return
        while birth.status is not None and birth.has_more():
            self._hear(birth)
        self.births.close_status(birth)
        birth.concluded = True
        phase = birth.phase
        if phase == "staging":
            unknown = {"row": None, "errno": 0, "message": "it was killed before the barrier opened"}
            failure = birth.failure or birth.trouble or unknown
            self._fail(birth.number, failure | {"status": birth.ended["status"]})
        else:
            if phase == "released":
                birth.phase = "running"
                if birth.failure is None:
                    self._news.started(birth, birth.ended["time"])
            if phase != "staged" or not birth.discarded_by:  # whoever has discarded it knows why, and would be told too soon
                self._news.ended(birth)
        for number in birth.discarded_by:
            self._answer(number, "ok", {})
        waiting = self.births.left(birth)
        for number in waiting or ():
            self._answer(number, "ok", {})
        if phase == "staging" or birth.discarded_by or (phase == "staged" and waiting is not None):
            self.births.forget(birth)
