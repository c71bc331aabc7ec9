"""Calls of the agent's own that fail while it launches, kills, removes, reads, or while something ends by itself.

What lives here: how a call of this very process is made to fail, with which error, and what is done meanwhile. What must not: the
enumeration, the census and the canary (every_fault.py). Theory: the interpreter tells of each call with a path that opens or
changes something (its audit events), and of each write, before it happens; what is raised there is what the call would have
answered. So nothing has to be known of where the product opens or writes.

    call          in a launch
    call-kill     in a kill, and in the end that it leads to
    call-end      in an end that nobody has asked for
    call-remove   in a removal
    call-logs     while output is read, from its beginning to the end
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.runtime.agent import Agent

ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE)
CHANGING = ERRNOS[:4]  # what takes no descriptor cannot be short of them
OPENING = ("open", "os.listdir", "os.scandir")
VERBS = ("kill", "end", "remove", "logs")
KINDS = tuple(f"call-{verb}" for verb in VERBS)
SAID = "hello\n"
STAYS = f"trap 'exit 7' TERM; echo {SAID.strip()}; while :; do sleep 1000 & wait; done"
PATIENCE = 60.0  # seconds


class Counter:
    """Something that happens: counted, and at the `at`-th time `strike` is called. With `at` 0 it only counts."""

    def __init__(self, at: int, strike: Callable[[], None]) -> None:
        self.at, self.strike, self.count, self.armed = at, strike, 0, True

    def tick(self) -> None:
        """It happens."""
        if self.armed:
            self.count += 1
            if self.count == self.at:
                self.armed = False
                self.strike()


def turns(kinds: Collection[str]) -> tuple[int | None, ...]:
    """Which errors calls fail with: numbers of them, None for each in its turn."""
    return tuple(range(len(ERRNOS))) if "errors" in kinds else (None,) if "turns" in kinds else (0,)


class Calls:
    """Calls of this process that open or change something, by way of the interpreter's audit: the one that is due fails."""

    def __init__(self) -> None:
        self.counter: Counter | None = None
        self.failed: tuple[str, str, str] | None = None  # the last one that did: errno, event, path
        self._thread = threading.get_ident()
        self._turn: int | None = None
        self._turns = [4, 0]  # how many have failed that take a descriptor, and others; the former begin with EMFILE
        self._write = os.write
        os.write = self._written
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.counter is None or not (event == "open" or event.startswith("os.")):
            return
        path = args[0] if args and isinstance(args[0], str | bytes) else None
        if path is not None and not os.fsdecode(path).startswith("/proc/"):  # else by descriptor, or looking at processes
            self._tick(event, os.fsdecode(path))

    def _written(self, fd: int, data: Any) -> int:
        if self.counter is not None:
            self._tick("os.write", os.readlink(f"/proc/self/fd/{fd}"))
        return self._write(fd, data)

    def _tick(self, event: str, path: str) -> None:
        if self.counter is not None and threading.get_ident() == self._thread:
            self._event, self._path = event, path
            self.counter.tick()

    def _fail(self) -> None:
        path, errnos = self._path, ERRNOS if self._event in OPENING else CHANGING
        kind = errnos is CHANGING
        number = errnos[(self._turns[kind] if self._turn is None else self._turn) % len(errnos)]
        self._turns[kind] += 1
        self.failed = errno.errorcode[number], self._event, path
        raise OSError(number, os.strerror(number), path)

    @contextmanager
    def failing(self, number: int, turn: int | None) -> Iterator[Counter]:
        """The `number`-th call fails, with the error of that `turn`; None: each has its turn."""
        self._turn = turn
        self.counter = Counter(number, self._fail)
        try:
            yield self.counter
        finally:
            self.counter = None


class Subject:
    """A pod that stays until it is ended, and what is done to it. An answer is what was told; OSError and others are bugs."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.id = "subject.a"

    async def begin(self, verb: str) -> None:
        """It runs and has spoken, or is dead, as `verb` needs it."""
        await self.agent.launch_group({"name": "subject", "tasks": [{"name": "a", "command": STAYS}]})
        while await self.logs() != SAID:
            await trio.sleep(0.002)
        if verb == "remove":
            await self.kill()

    async def logs(self) -> str:
        """All it has said."""
        pieces = [piece async for piece in self.agent.read_logs(self.id, "stdout", 0)]
        return b"".join(piece.data for piece in pieces).decode()

    async def kill(self) -> dict[str, Any]:
        """Its end, and that of its pod."""
        await self.agent.kill_container("subject")
        return await self._over()

    async def end(self) -> dict[str, Any]:
        """The same, of its own accord."""
        lines = {line["id"]: line["pid"] for line in self.agent.get_containers()}
        os.kill(lines[self.id], signal.SIGTERM)
        return await self._over()

    async def remove(self) -> None:
        """It is dead: nobody knows it any more."""
        await self.agent.remove_container("subject")

    async def _over(self) -> dict[str, Any]:
        with trio.fail_after(PATIENCE):
            answer = await self.agent.wait_container(self.id)
            await self.agent.wait_container("subject")
        return answer

    async def suffer(self, verb: str) -> dict[str, Any]:
        """`verb` is done; {"error", "told"}."""
        try:
            told = await getattr(self, verb)()
        except MesoError as error:
            return {"error": error.as_object(), "told": None}
        return {"error": None, "told": told}

    async def finish(self, verb: str) -> dict[str, Any]:
        """Nothing fails any more: {"end": how it ended, "said"}; then it is gone, with whatever was parked."""
        world = self.agent.world
        found: dict[str, Any] = {"end": None, "said": None}
        if self.id in world.cells:
            found["said"] = await self.logs()
            found["end"] = await (self._over() if verb in ("kill", "end", "remove") else self.kill())
            await self.remove()
        with trio.fail_after(PATIENCE):
            while world.ledger.parked():
                await trio.sleep(0.02)
        return found
