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
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import Any

from mesocosm.kernel.launcher import pause, womb
from mesocosm.kernel.launcher.births import Birth, Births
from mesocosm.kernel.launcher.link import link
from mesocosm.kernel.launcher.protocol import MAX_FDS, MAX_MESSAGE, SOCKET
from mesocosm.kernel.launcher.table import RECORD, SAYS_STAGED, SAYS_USER, SPECIALS, Table
from mesocosm.kernel.launcher.walk import Walker, choose_walker
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import namespaces
from mesocosm.kernel.linux.libc import syscall

import msgpack  # isort: skip  # the only third-party module here: C, 60 KiB

_LINGER = 5.0  # seconds without an agent, a container or an unread exit record before the launcher ends itself


class Zygote:
    """The launcher's state and its loop."""

    def __init__(self, listener: socket.socket, run_dir: int, walker: Walker, host_mount: int, signals: int, null: int) -> None:
        self._listener = listener
        self._run_dir = run_dir
        self._walk = walker
        self._signals = signals
        self._null = null
        self._pause = pause.sealed()
        self._host_mount = host_mount
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(listener, select.EPOLLIN)
        self._poll.register(signals, select.EPOLLIN)
        self._agent: socket.socket | None = None
        self._idle_since = time.monotonic()
        self.births = Births(self._poll)
        self._verbs = {
            "stage": self._stage, "release": self._release, "abort": self._abort, "discard": self._discard,
            "acknowledge": self._acknowledge, "inventory": self._inventory, "view": self._view, "stop": self._stop,
        }  # fmt: skip
        self._running = True

    def run(self) -> None:
        """Serves until told to stop, or until nobody needs it."""
        while self._running:
            idle = self._agent is None and not self.births.by_id
            for fd, _ in self._poll.poll(_LINGER if idle else -1):
                if fd == self._signals:
                    os.read(self._signals, 4096)
                    self._reap()
                elif fd == self._listener.fileno():
                    self._accept()
                elif self._agent is not None and fd == self._agent.fileno():
                    self._serve()
                elif (birth := self.births.by_status.get(fd)) is not None:
                    self._hear(birth)
            if not (self._agent is None and not self.births.by_id):
                self._idle_since = time.monotonic()
            elif time.monotonic() - self._idle_since >= _LINGER:
                break
        try:
            os.unlink(SOCKET, dir_fd=self._run_dir)
        except OSError:
            pass

    # --- the agent ----------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._drop_agent()
        self._agent = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._poll.register(connection, select.EPOLLIN)

    def _drop_agent(self) -> None:
        if self._agent is not None:
            self._poll.unregister(self._agent)
            self._agent.close()
            self._agent = None

    def _serve(self) -> None:
        assert self._agent is not None
        try:
            data, fds, _, _ = socket.recv_fds(self._agent, MAX_MESSAGE + 65536, MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            data, fds = b"", []
        if not data:
            self._drop_agent()
            return
        number, verb, body = msgpack.unpackb(data)
        held: list[int] = []
        try:
            held = self._verbs[verb](number, body, fds) or []
        except OSError as error:
            self._send([number, "failed", {"row": None, "errno": error.errno or 0, "message": str(error)}])
        except Exception as error:  # a message we cannot read must not end every container's parent
            self._send([number, "failed", {"row": None, "errno": 0, "message": f"{type(error).__name__}: {error}"}])
        finally:
            for fd in fds:
                if fd not in held:
                    os.close(fd)

    def _send(self, message: list[Any], fds: list[int] | None = None) -> None:
        if self._agent is None:
            return
        try:
            socket.send_fds(self._agent, [msgpack.packb(message)], fds or [])
        except OSError:
            self._drop_agent()

    # --- verbs --------------------------------------------------------------------------------------------------

    def _stage(self, number: int, body: dict[str, Any], fds: list[int]) -> list[int]:
        if "rows" not in body:
            packed = fds[-1]
            body |= msgpack.unpackb(os.pread(packed, os.fstat(packed).st_size, 0), max_bin_len=1 << 25)
        passed = fds[: body["fds"]]
        table = Table(
            body["rows"], body["blob"], body["blob_words"], body["slots"], body["passed"], body["specials"], body["entry"]
        )
        parent = self.births.by_id.get(body["parent"]) if body["parent"] else None
        if body["parent"] and (parent is None or parent.pidfd < 0 or parent.ended):
            raise ProcessLookupError(3, f"the parent {body['parent']} is not running", body["parent"])
        barrier = self.births.barrier(body["barrier"])
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        birth = Birth(body["id"], body["barrier"], number, ours, body["note"], body["user_map"])
        try:
            slot = self.births.take_slot(birth)
            values = {
                "status": theirs.fileno(), "barrier": barrier.read_end, "null": self._null, "pause": self._pause,
                "parent": parent.pidfd if parent else -1, "host_mount": self._host_mount, "pidfd_slot": slot,
            }  # fmt: skip
            birth.linked = link(table, passed, [values[name] for name in SPECIALS])
            if parent is not None and body["enter_pid"]:
                namespaces.setns(parent.pidfd, c.CLONE_NEWPID)
            try:
                pid = self._walk(birth.linked, theirs.fileno())
            finally:
                if parent is not None and body["enter_pid"]:
                    namespaces.setns(self._pid_namespace, c.CLONE_NEWPID)
            if pid < 0:
                self.births.forget(birth)
                self._send([number, "failed", {"row": 0, "errno": -pid}])
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
        self.births.release(body["barrier"])
        self._send([number, "ok", {}])

    def _abort(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        if self.births.abort(body["barrier"], number):
            self._send([number, "ok", {}])

    def _discard(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        birth = self.births.by_id.get(body["id"])
        if birth is None or birth.ended:
            self._send([number, "ok", {}])
            return
        birth.discarded_by.append(number)
        birth.kill()

    def _acknowledge(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        for container_id in body["ids"]:
            birth = self.births.by_id.get(container_id)
            if birth is not None and birth.ended:
                self.births.forget(birth)
        self._send([number, "ok", {}])

    def _inventory(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        # In pieces: one message carries at most so many descriptors.
        lines = [birth for birth in self.births.by_id.values()]
        for start in range(0, max(len(lines), 1), 100):
            part = lines[start : start + 100]
            living = [birth.pidfd for birth in part if birth.pidfd >= 0 and not birth.ended]
            more = start + 100 < len(lines)
            self._send([number, "more" if more else "ok", {"lines": [birth.as_line() for birth in part]}], living)

    def _view(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        womb.build_view(body["name"], body["entries"], fds)
        self._send([number, "ok", {}])

    def _stop(self, number: int, body: dict[str, Any], fds: list[int]) -> None:
        living = [birth.id for birth in self.births.by_id.values() if not birth.ended]
        if living:
            raise OSError(16, f"containers are still running: {' '.join(living[:5])}")
        self._send([number, "ok", {}])
        self._running = False

    # --- children -----------------------------------------------------------------------------------------------

    def _hear(self, birth: Birth) -> None:
        data = birth.receive()
        if len(data) == RECORD.size:
            row, errno, _ = RECORD.unpack(data)
            if row == SAYS_USER:
                self._map_users(birth)
            elif row == SAYS_STAGED:
                self.births.learn_pid(birth)
                birth.phase = "staged"
                self._send([birth.number, "ok", {"pid": birth.pid}], [birth.pidfd])
            else:
                assert birth.linked is not None
                birth.failure = {"row": birth.linked.original_row(row), "errno": errno}
                if birth.phase == "released":
                    self._send([0, "exec_failed", {"id": birth.id, **birth.failure}])
            return
        self.births.close_status(birth)
        if birth.phase == "released":
            birth.phase = "running"
            if birth.failure is None and not birth.ended:
                self._send([0, "started", {"id": birth.id, "time": time.time()}])
        self._conclude(birth)

    def _map_users(self, birth: Birth) -> None:
        self.births.learn_pid(birth)
        base, count = birth.user_map or (0, 1)
        try:
            for name in ("uid_map", "gid_map"):
                fd = os.open(f"/proc/{birth.pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, b"0 %d %d" % (base, count))
                finally:
                    os.close(fd)
        except OSError as error:
            birth.failure = {"row": None, "errno": error.errno, "message": f"writing the {name} of the container failed", "kind": "new_user"}
            birth.kill()
            return
        birth.send(b"1")

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for birth in self.births.reaped(pid, status, usage):
                self._conclude(birth)

    def _conclude(self, birth: Birth) -> None:
        """Says how it ended, once it is both reaped and silent: what it said last is read before."""
        if birth.concluded or not birth.ended:
            return
        if birth.status is not None:
            while not birth.concluded and birth.status is not None and birth.has_more():
                self._hear(birth)
            if birth.concluded:
                return
            self.births.close_status(birth)
        birth.concluded = True
        if birth.phase in ("staging", "staged"):
            failure = birth.failure or {"row": None, "errno": 0, "message": "it was killed before the barrier opened"}
            if birth.phase == "staging":
                self._send([birth.number, "failed", failure | {"status": birth.ended["status"]}])
            else:
                self._send([0, "ended", birth.ended])
        else:
            if birth.phase == "released":
                birth.phase = "running"
                if birth.failure is None:
                    self._send([0, "started", {"id": birth.id, "time": birth.ended["time"]}])
            self._send([0, "ended", birth.ended])
        for number in birth.discarded_by:
            self._send([number, "ok", {}])
        if (barrier := self.births.barriers.get(birth.barrier)) is not None and self.births.left(barrier, birth):
            for number in barrier.aborted_by:
                self._send([number, "ok", {}])
        if birth.phase == "staging" or birth.discarded_by or (birth.phase == "staged" and barrier is not None and barrier.aborted_by):
            self.births.forget(birth)


def main(run_dir: str, walker: str | None = None) -> None:
    """The process: becomes keeper and launcher, enters its own mount tree, serves RUN_DIR/launcher.sock."""
    os.umask(0o022)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())  # for good: signals arrive by descriptor
    syscall("prctl", c.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    path = f"/proc/self/fd/{directory}/{SOCKET}"  # a path of ours may be longer than a socket address takes
    try:
        os.unlink(SOCKET, dir_fd=directory)
    except FileNotFoundError:
        pass
    listener.bind(path)
    os.chmod(SOCKET, 0o600, dir_fd=directory)
    if os.fork():
        _keep()
    syscall("prctl", c.PR_SET_NAME, b"meso-launcher", 0, 0, 0)
    syscall("prctl", c.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    syscall("prctl", c.PR_SET_DUMPABLE, 0, 0, 0, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20), hard))
    _, walk = choose_walker(walker)
    wakeups = _signal_descriptor()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    host_mount = womb.enter()
    zygote = Zygote(listener, directory, walk, host_mount, wakeups, null)
    listener.listen(8)
    gc.collect()
    gc.freeze()
    gc.disable()
    zygote.run()


def _signal_descriptor() -> int:
    for number in range(1, 65):
        # Ignored signals survive execve, and Python ignores two; every signal is blocked here, so none of these can
        # hit us. SIGKILL and SIGSTOP refuse.
        with contextlib.suppress(OSError):
            syscall("rt_sigaction", number, bytes(32), None, 8)
    mask = (1 << (signal.SIGCHLD - 1)).to_bytes(8, "little")
    return syscall("signalfd4", -1, mask, 8, os.O_NONBLOCK | os.O_CLOEXEC)


def _keep() -> None:
    """Waits for the launcher and, after it, for whatever it leaves behind; nothing else."""
    syscall("prctl", c.PR_SET_NAME, b"meso-keeper", 0, 0, 0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)
        except InterruptedError:
            continue


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
