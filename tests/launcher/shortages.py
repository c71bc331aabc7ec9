"""A launcher that is short of something: of descriptors by its limit, or one of its own system calls fails, as strace has it.

What lives here: how a launcher is made to fail, and what has to come of it. Theory: at every number of free descriptors, and at
every call, a launch either is there or is refused with the errno; the program has not run; nothing of it is left, in the launcher
neither; and the launcher is the same process, which then launches the next one. Its cradle is killed before each, so that it is
made anew.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from bench import Bench, cradles, gone

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.launcher.contract import Started

MANY = 99
# (system call, errno, how many of them can fail like that: what takes something out of an epoll never does)
OWN_CALLS = (
    ("socketpair", "ENFILE", MANY), ("pipe2", "ENFILE", MANY), ("memfd_create", "ENOSPC", MANY), ("pwrite64", "ENOSPC", MANY),
    ("openat", "EMFILE", MANY), ("epoll_ctl", "ENOSPC", 1), ("pidfd_open", "EMFILE", MANY), ("clone3", "EAGAIN", MANY),
    ("mmap", "ENOMEM", MANY), ("write", "EIO", MANY),
)  # fmt: skip
DESCRIPTORS = (("of descriptors", "EMFILE", MANY),)
MOST_FREE = 20  # descriptors that a launch never needs at once

Failing = Callable[[str, str, int], AbstractContextManager[Callable[[], bool]]]


@contextmanager
def short_of_descriptors(pid: int, free: int) -> Iterator[Callable[[], bool]]:
    """`free` - 1 numbers are left for new descriptors; said is whether that may have been too few."""
    _, hard = before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit = next(number for number in range(hard) if number - len({fd for fd in taken if fd < number}) == free - 1)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield lambda: free < MOST_FREE
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def failing_call(pid: int, name: str, error: str, at: int) -> Iterator[Callable[[], bool]]:
    """The `at`-th such system call from now on fails; said is whether there was one."""
    command = ["strace", "-p", str(pid), "-e", f"trace={name}", "-e", f"inject={name}:error={error}:when={at}"]
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    said = strace.stderr.readline()
    assert "attached" in said, said

    try:
        yield lambda: "INJECTED" in said
    finally:
        strace.send_signal(signal.SIGINT)
        said = strace.communicate()[1]


async def fail_by_turns(b: Bench, whats: Sequence[tuple[str, str, int]], failing: Failing) -> None:
    """Each of `whats` fails at its first, second, … time, in launches of a container and of one nested in another."""
    parent = await b.start("p", None)
    await b.hear(Started, "p")  # until then it has the cradle's name
    await b.start("before", ["true"], home=True)
    await b.ended("before")
    log = Path(b.run_dir, "launcher.log")
    before = await b.steady()
    refused = 0
    for what, name, most in whats:
        for of in (None, "p"):
            at, reached = 0, True
            while reached and at < most:
                at += 1
                await kill_cradle(b)
                with failing(what, name, at) as ended:
                    error = await one_launch(b, of)
                reached = ended()
                where = (what, of, at, error and error.as_object())
                if error is not None:
                    refused += 1
                    assert reached, where
                    assert error.fields.get("errno") in (name, "ECHILD"), where
                    assert os.listdir(b.home) == [], where
                for mark in os.listdir(b.home):
                    os.unlink(b.home / mark)
                await kill_cradle(b)  # limits are inherited
                await b.start("x", ["touch", "/data/after"], of=of, home=True)
                await b.ended("x")
                assert os.listdir(b.home) == ["after"], where
                os.unlink(b.home / "after")
                await settled(b, before, where)
                assert b.find() == b.pid, where
    log.write_text("")  # it has said what it was short of
    assert refused > 2
    b.kill(parent)


async def kill_cradle(b: Bench) -> None:
    """It is gone, and the next launch makes another."""
    for pid in cradles(b):
        with suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            signal.pidfd_send_signal(ended, signal.SIGKILL)
            await gone(ended)
            os.close(ended)


async def one_launch(b: Bench, of: str | None) -> LaunchError | None:
    """A program that would leave a mark, launched; None if it has run, else why it could not."""
    try:
        await b.start("x", ["touch", "/data/ran"], of=of, home=True)
    except LaunchError as error:
        await b.launcher.abort("x")
        with suppress(trio.WouldBlock):
            while True:  # of one that stood at its barrier, the end is told
                b.launcher.notices.receive_nowait()
        return error
    await b.ended("x")
    assert os.listdir(b.home) == ["ran"]
    return None


async def settled(b: Bench, before: dict[str, Any], where: object) -> None:
    """As `Bench.settled`, but for the cradle, which is another one."""

    def comparable(census: dict[str, Any]) -> tuple[int, Any, int]:
        return len(census["processes"]), census["descriptors"], census["mounts"]

    now = b.census()
    with trio.move_on_after(10):
        while comparable(now) != comparable(before):
            await trio.sleep(0.01)
            now = b.census()
    assert comparable(now) == comparable(before), (where, now["descriptors"] - before["descriptors"], now, before)
