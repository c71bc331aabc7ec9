"""A warden: a process that forks agents, and kills each with -9 before or after its N-th system call, as its tracer.

What lives here: forking, ptrace(2), counting. What must not: what an agent is asked meanwhile, and what has to hold afterwards
(every_call.py). Theory: an agent is traced from its first instruction on, but its calls are stopped at, and counted, only from a
marker on (`arm`), so that what comes before it costs nothing. All of its threads are followed, and no other process: neither the
launcher that it starts nor anything else. A call that is killed before it is not carried out; one that is killed after it has
been, and its caller has not heard of it.

Everything is imported before the first fork, and the plug-ins are looked for once: an agent is there within some 20 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import mesocosm.kernel.cli.staying
import mesocosm.kernel.launcher.client
import mesocosm.kernel.launcher.confinement
import mesocosm.kernel.linux.leaf
import mesocosm.kernel.linux.probe
import mesocosm.kernel.linux.watching
import mesocosm.kernel.runtime.agent
import mesocosm.kernel.runtime.locking
import mesocosm.kernel.wire.authority
import mesocosm.kernel.wire.listening
import mesocosm.kernel.wire.server  # noqa: F401 - all that an agent loads on its way up
from mesocosm.kernel.cli import paths, serve
from mesocosm.kernel.cli.output import Console
from mesocosm.kernel.linux.constants import SYS
from mesocosm.kernel.linux.libc import address_of, get_errno, slow
from mesocosm.kernel.sets import loading

PTRACE = 101  # x86-64; the requests are those of <linux/ptrace.h>
CONT, SYSCALL, SEIZE, INTERRUPT, GET_SYSCALL_INFO = 7, 24, 0x4206, 0x4207, 0x420E
OPTIONS = 0x1 | 0x8 | 0x100000  # TRACESYSGOOD, TRACECLONE (threads; a fork is another event), EXITKILL
OF_A_CALL, STOPPED = signal.SIGTRAP | 0x80, 128  # PTRACE_EVENT_STOP
ENTRY, EXIT = 1, 2
WALL = 0x40000000  # __WALL: threads, too
NAMES = {
    0: "read", 1: "write", 3: "close", 5: "fstat", 7: "poll", 8: "lseek", 9: "mmap", 10: "mprotect", 11: "munmap",
    16: "ioctl", 17: "pread64", 18: "pwrite64", 19: "readv", 20: "writev", 21: "access", 28: "madvise", 32: "dup",
    38: "setitimer", 39: "getpid", 41: "socket", 42: "connect", 43: "accept", 44: "sendto", 45: "recvfrom", 46: "sendmsg",
    47: "recvmsg", 49: "bind", 50: "listen", 51: "getsockname", 53: "socketpair", 54: "setsockopt", 55: "getsockopt",
    61: "wait4", 62: "kill", 63: "uname", 72: "fcntl", 73: "flock", 76: "truncate", 77: "ftruncate", 78: "getdents",
    82: "rename", 83: "mkdir", 84: "rmdir", 87: "unlink", 88: "symlink", 89: "readlink", 90: "chmod", 91: "fchmod", 92: "chown",
    93: "fchown", 99: "sysinfo", 102: "getuid", 107: "geteuid", 112: "setsid", 131: "sigaltstack", 137: "statfs",
    186: "gettid", 202: "futex", 217: "getdents64", 219: "restart_syscall", 228: "clock_gettime", 230: "clock_nanosleep",
    231: "exit_group", 247: "waitid", 232: "epoll_wait", 233: "epoll_ctl", 257: "openat", 262: "newfstatat", 263: "unlinkat",
    264: "renameat", 267: "readlinkat", 273: "set_robust_list", 281: "epoll_pwait", 288: "accept4", 290: "eventfd2",
    291: "epoll_create1", 293: "pipe2", 302: "prlimit64", 318: "getrandom", 334: "rseq",
} | {number: name for name, number in SYS.items()}  # fmt: skip
FIRST_PATH = {"openat": 1, "openat2": 1, "mkdir": 0, "rmdir": 0, "unlink": 0, "unlinkat": 1, "mkdirat": 1, "rename": 0, "open": 0}


def ptrace(request: int, tid: int, where: int = 0, data: int = 0) -> int:
    """ptrace(2); OSError."""
    result: int = slow(PTRACE, request, tid, where, data, 0, 0)
    if result < 0:
        raise OSError(get_errno(), os.strerror(get_errno()))
    return result


class Trace:
    """One traced process. Not armed: it runs. Armed: its calls are counted, and it dies at the `at`-th (0: at none)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.armed = self.dead = False
        self.at, self.after = 0, False
        self.calls = 0
        self.last = ""  # the call at which it was killed, in words
        self.names: dict[str, int] = {}
        self._victim = 0  # the thread that is in the call after which it dies
        self._along = 0
        self._stopping: set[int] = set()  # threads that have been told to stop, and have not yet
        self._info = bytearray(128)
        ptrace(SEIZE, pid, 0, OPTIONS)

    def arm(self, at: int, *, after: bool, along: int = 0) -> None:
        """From now on. Returns when every thread is followed. With it dies `along`, if that is a process."""
        self.armed, self.at, self.after, self._along = True, at, after, along
        self._stopping = {int(tid) for tid in os.listdir(f"/proc/{self.pid}/task")}
        for tid in tuple(self._stopping):
            ptrace(INTERRUPT, tid)
        while self._stopping and not self.dead:
            self.turn(*os.waitpid(-1, WALL))

    def turn(self, tid: int, status: int) -> None:
        """Deals with what waitpid said."""
        if not os.WIFSTOPPED(status):
            self._stopping.discard(tid)
            self.dead = self.dead or tid == self.pid
            return
        number, event = os.WSTOPSIG(status), status >> 16
        passed = 0
        if number == OF_A_CALL:
            if self.armed:
                self._count(tid)
        elif event == STOPPED:
            self._stopping.discard(tid)
        elif not event:
            passed = number  # a signal on its way: let it have it
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            ptrace(SYSCALL if self.armed else CONT, tid, 0, passed)

    def _count(self, tid: int) -> None:
        try:
            ptrace(GET_SYSCALL_INFO, tid, len(self._info), address_of(self._info))
        except ProcessLookupError:
            return
        if self._info[0] == EXIT:
            if tid == self._victim:
                self._kill()
        elif self._info[0] == ENTRY:
            number, *arguments = struct.unpack_from("=7Q", self._info, 24)
            self.calls += 1
            name = NAMES.get(number, str(number))
            self.names[name] = self.names.get(name, 0) + 1
            if self.calls == self.at:
                self.last = f"{name}({self._told(name, arguments)})"
                if self.after:
                    self._victim = tid
                else:
                    self._kill()

    def _told(self, name: str, arguments: list[int]) -> str:
        if name not in FIRST_PATH:
            return ", ".join(f"{word:#x}" if word > 9999 else str(word) for word in arguments[:4])
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(arguments[FIRST_PATH[name]])
            return memory.read(200).partition(b"\0")[0].decode(errors="replace")
        return "?"

    def _kill(self) -> None:
        for pid in filter(None, (self._along, self.pid)):
            os.kill(pid, signal.SIGKILL)
        self._victim = 0


class Warden:
    """The process: commands in, answers out, as lines of JSON on a socket.

    {"start": MISHAP, "at", "after"}   an agent; with "at" armed from its first instruction on. Answered by {"pid"}
    {"seize": PID}                     a process that is not ours (the launcher), traced from here. Answered by {"pid"}
    {"arm": N, "after", "of": PID, "along": PID}   from now on; the second dies with it. Answered by {"armed"}
    (unasked)                          {"died": PID, "calls", "last", "names"} when it has
    """

    def __init__(self, line: socket.socket, mishaps: Mapping[str, Callable[[], None]]) -> None:
        self._line = line
        self._mishaps = mishaps
        self._traces: dict[int, Trace] = {}

    def run(self) -> None:
        """Until the other end is closed; what is traced dies with us."""
        plugins = loading.load(paths.set_name(None), paths.config_dirs())
        loading.load = lambda *_: plugins  # type: ignore[assignment] # looking for them changes nothing, and takes longest
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._line, select.POLLIN)
        poll.register(woken, select.POLLIN)
        self._say({"ready": os.getpid()})
        while True:
            for fd, _ in poll.poll(None if not any(trace.armed for trace in self._traces.values()) else 0):
                if fd == woken:
                    os.read(woken, 4096)
                else:
                    try:
                        asked = self._line.recv(65536)
                    except ConnectionResetError:
                        return
                    if not asked:
                        return
                    self._serve(json.loads(asked))
            self._turn()

    def _turn(self) -> None:
        """All that waits, or the next thing that comes if something is armed."""
        while self._traces:
            armed = any(trace.armed for trace in self._traces.values())
            try:
                tid, status = os.waitpid(-1, WALL | (0 if armed else os.WNOHANG))
            except ChildProcessError:
                return
            if not tid:
                return
            self._take(tid, status)

    def _take(self, tid: int, status: int) -> None:
        if (trace := self._traces.get(tid) or self._traces.get(_owner(tid))) is not None:
            trace.turn(tid, status)
            self._bury(trace)

    def _bury(self, trace: Trace) -> None:
        if trace.dead:
            del self._traces[trace.pid]
            self._say({"died": trace.pid, "calls": trace.calls, "last": trace.last, "names": trace.names})

    def _say(self, told: Mapping[str, Any]) -> None:
        self._line.send(json.dumps(told).encode())

    def _serve(self, asked: Mapping[str, Any]) -> None:
        if "start" in asked:
            self._start(asked)
        elif "seize" in asked:
            self._traces[asked["seize"]] = Trace(asked["seize"])
            self._say({"pid": asked["seize"]})
        else:
            trace = self._traces[asked["of"]]
            trace.arm(asked["arm"], after=asked["after"], along=asked["along"])
            self._say({"armed": trace.pid})
            self._bury(trace)

    def _start(self, asked: Mapping[str, Any]) -> None:
        held, go = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.read(held, 1)
                self._be_an_agent(asked["start"])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(held)
        trace = self._traces[pid] = Trace(pid)
        if "at" in asked:
            trace.arm(asked["at"], after=asked["after"])
        os.write(go, b"1")
        os.close(go)
        self._say({"pid": pid})

    def _be_an_agent(self, mishap: str) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        log = os.open(f"{paths.make_run_dir()}/agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.closerange(3, 256)
        if mishap:
            self._mishaps[mishap]()
        os._exit(serve._serve(argparse.Namespace(set=None, socket=None), None, Console()))


def _owner(tid: int) -> int:
    """The process that a thread is of; 0 if it is gone."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{tid}/status") as status:
        return int(status.read().partition("\nTgid:")[2].split()[0])
    return 0


class Agents:
    """The other end: the agent that there is, and how it ended."""

    def __init__(self, mishaps: Mapping[str, Callable[[], None]]) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.warden = os.fork()
        if not self.warden:
            self._line.close()
            try:
                Warden(theirs, mishaps).run()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(0)
        theirs.close()
        self._line.settimeout(60)
        self._died: dict[int, dict[str, Any]] = {}
        self.pid = 0
        self._ask({}, "ready")

    def _ask(self, asked: Mapping[str, Any], answer: str) -> dict[str, Any]:
        if asked:
            self._line.send(json.dumps(asked).encode())
        while True:
            data = self._line.recv(65536)
            if not data:
                raise SystemExit("the warden is gone")
            told: dict[str, Any] = json.loads(data)
            if answer in told:
                return told
            if "died" in told:
                self._died[told["died"]] = told

    def start(self, mishap: str = "", *, at: int | None = None, after: bool = False) -> None:
        """An agent that has been forked, no more. With `at` it dies at that call, counted from its very first."""
        more = {} if at is None else {"at": at, "after": after}
        self.pid = self._ask({"start": mishap, **more}, "pid")["pid"]

    def seize(self, pid: int) -> None:
        """Some other process beside the agent, traced from now on."""
        self._ask({"seize": pid}, "pid")

    def arm(self, at: int, *, after: bool, of: int = 0, along: int = 0) -> None:
        """The agent, or another, dies at its `at`-th call from now on, and `along` at the same moment."""
        self._ask({"arm": at, "after": after, "of": of or self.pid, "along": along}, "armed")

    def dead(self, pid: int = 0) -> dict[str, Any]:
        """How the agent, or another, ended, once it has: {"calls", "last", "names"}."""
        pid = pid or self.pid
        while pid not in self._died:
            told = self._ask({}, "died")
            self._died[told["died"]] = told
        return self._died.pop(pid)

    def kill(self, pid: int = 0) -> dict[str, Any]:
        """Ends it with -9, if it is still there; how it ended."""
        pid = pid or self.pid
        if pid not in self._died:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.dead(pid)
