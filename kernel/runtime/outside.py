"""Calls that may never return, in a process of their own, which can be left behind.

What lives here: starting such a process, waiting for what it says until its time is up, and keeping account of those that did
not end. Theory: a call on a file system that has stopped answering waits in the kernel, and may wait so that not even SIGKILL
ends it. A thread of the agent's would do that too, but a process cannot end while one of its threads cannot: the agent's
descriptors, and with them its lock on the ledger, would outlive its death, and no other agent could follow. So it is a process
that has none of them. The one that is left behind is asked for no second time while it lives: there is one for each question.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import trio

from mesocosm.kernel.runtime.undo import Attempt

SECONDS = 5.0  # for a call that takes microseconds; starting Python for it takes a tenth of a second
_LAST_WORDS = 0.2  # seconds for SIGKILL to work
_MOST = 1 << 20  # bytes of an answer


class Said(NamedTuple):
    """What a process has said; `pid` is that of one that was left behind, 0 if it has ended."""

    text: str
    pid: int


class Outside:
    """The processes of one agent that make such calls."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}

    async def ask(self, command: Sequence[str], seconds: float, given: int = subprocess.DEVNULL) -> Said:
        """What a command says within so many seconds; `given` is its standard input. OSError if it cannot be started."""
        self._reap()
        key = tuple(command)
        if (before := self._left.get(key)) is not None:
            return Said("", before.pid)
        child = subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True
        )
        assert child.stdout is not None
        try:
            said = bytearray()
            with trio.move_on_after(seconds):
                await _read(child.stdout.fileno(), said)
            return Said(said.decode("utf-8", "replace"), 0 if await _end(child) else child.pid)
        finally:
            child.stdout.close()
            if child.poll() is None:
                child.kill()
                self._left[key] = child

    def _reap(self) -> None:
        for key in [key for key, child in self._left.items() if child.poll() is not None]:
            del self._left[key]


async def _read(fd: int, said: bytearray) -> None:
    os.set_blocking(fd, False)
    while len(said) < _MOST:
        await trio.lowlevel.wait_readable(fd)
        piece = os.read(fd, 1 << 16)
        if not piece:
            return
        said += piece


async def _end(child: subprocess.Popen[bytes]) -> bool:
    """Whether it ends, killed if it has not ended yet."""
    if child.poll() is None:
        pidfd = os.pidfd_open(child.pid)
        try:
            for _ in range(2):
                with trio.CancelScope(shield=True), trio.move_on_after(_LAST_WORDS):
                    await trio.lowlevel.wait_readable(pidfd)
                    break
                child.kill()
        finally:
            os.close(pidfd)
    return child.poll() is not None


async def undo(outside: Outside, verb: str, target: str) -> Attempt:
    """One undo verb, as far as it comes. OSError as the verb has it; ETIMEDOUT, if it does not answer."""
    return Attempt(await _call(outside, "mesocosm.kernel.runtime.undo", verb, target))


async def open_tree(outside: Outside, path: str, *, recursive: bool) -> tuple[int, str]:
    """A detached clone of what is at a path, as `linux.mounts.open_tree` makes it, and "dir" or "file". OSError as above."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kind = await _call(outside, "mesocosm.kernel.linux.mounts", path, str(int(recursive)), given=theirs.fileno())
        _, fds, _, _ = socket.recv_fds(ours, 16, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
        return fds[0], kind


async def _call(outside: Outside, module: str, *words: str, given: int = subprocess.DEVNULL) -> str:
    """The word that a module of ours answers when it is run with `words`, or the OSError."""
    target = words[-1] if given == subprocess.DEVNULL else words[0]
    said = await outside.ask([sys.executable, "-P", "-B", "-m", module, *words], SECONDS, given)
    told = said.text.split(None, 2)
    if len(told) == 3 and told[0] == "errno":
        raise OSError(int(told[1]), told[2].strip(), target)
    if len(told) == 1:
        return told[0]
    tried = f": pid {said.pid}, which tries it for us, is stuck" if said.pid else ""
    raise OSError(errno.ETIMEDOUT, f"the file system does not answer{tried}", target)
