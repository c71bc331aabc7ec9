"""Short lives, many of them: programs that print and end at once, and every exit, byte and event of them looked at.

    python lives.py SOCKET '{"lives": 200, "size": 1, "connections": 8}'

launches `lives` programs in groups of `size` over `connections`, each with a text and a code of its own, waits for them, reads
what they printed and removes them, while another connection follows the events. With `gates` (a directory) they are held at a pipe
each until somebody follows their output. Prints {"findings", "lives", "bytes", "events", "seconds"}: a finding is a sentence
about something that was lost, came twice or was not as it should have been. With `lie` all is expected to be otherwise than it is.

A process of its own, since it runs as the user of the agent that it tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple

import trio

from mesocosm.kernel.client import RemoteError
from mesocosm.kernel.client import open as open_client

LONG = 25  # every so manieth prints much
LINES = 20_000
LEAD = 150  # lives that may have begun and not been told of to their end: the history is only so long
PATIENCE = 30.0  # seconds until an event that has not come is missing
OF_EACH = ["staged", "started", "exited", "undone", "dead"]  # told of every container, once, in this order
OF_GROUP = ["planned", "admitted", "committed", "end"]
READY = b"ready\n"


class Life(NamedTuple):
    """A program, and what it has to come to. `gate`: the pipe at which it waits, if it does."""

    id: str
    task: dict[str, Any]
    code: int
    printed: Mapping[str, bytes]
    gate: str | None


class Pod(NamedTuple):
    """A group of lives, and the pod that makes it; `root`: the container that the group's own events are about."""

    root: str
    document: dict[str, Any]
    lives: list[Life]


class Wanted(NamedTuple):
    """The arguments."""

    lives: int
    size: int
    connections: int
    first: int = 0
    gates: str | None = None
    lie: bool = False

    def pods(self) -> Iterator[Pod]:
        """All of it in groups; a single one is a group without a container around it."""
        for start in range(self.first, self.first + self.lives, self.size):
            root = f"life{start}"
            if self.size == 1:
                one = self._life(start, root, root)
                yield Pod(root, {"name": root, "executor": "command", "tasks": [one.task]}, [one])
                continue
            members = [self._life(start + at, f"{root}.m{at}", f"m{at}") for at in range(self.size)]
            yield Pod(root, {"name": root, "tasks": [member.task for member in members]}, members)

    def _life(self, number: int, container_id: str, name: str) -> Life:
        """The life with that number: always the same."""
        chance = random.Random(number)
        code = chance.randrange(256)
        said, sobbed = (chance.randbytes(chance.randrange(400)).hex() for _ in range(2))
        count = LINES if number % LONG == 0 else 0
        # What the shell does here it does itself: nothing is forked but for those that print much.
        program = 'printf %s "$1"; printf %s "$2" >&2; test $3 = 0 || seq $3; exit $4'
        printed = {"stdout": said.encode() + b"".join(b"%d\n" % line for line in range(1, count + 1)), "stderr": sobbed.encode()}
        task: dict[str, Any] = {"name": name, "essential": False}
        gate = None
        if self.gates is not None:
            gate = f"{self.gates}/{number}"
            program = f"echo ready; echo ready >&2; read go < /gates/{number}; {program}"
            printed = {stream: READY + text for stream, text in printed.items()}
            task["volumes"] = [{"source": f"host:{self.gates}", "target": "/gates"}]
        task["command"] = ["/bin/sh", "-c", program, "sh", said, sobbed, str(count), str(code)]
        if self.lie:
            code, printed = (code + 1) % 256, {stream: text[:-1] for stream, text in printed.items()}
        return Life(container_id, task, code, printed, gate)


class Findings(list[str]):
    """What was not as it should be. The first hundred will do. `bytes`: how many have been compared."""

    bytes = 0

    def compare(self, about: str, have: Any, need: Any) -> None:
        """A finding, if the two differ."""
        if have != need and len(self) < 100:
            self.append(f"{about}: {_short(have)} instead of {_short(need)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:90]} … {text[-90:]} ({len(value)})"


class Witness:
    """Reads the event log, and knows afterwards what was told of whom. What was told before its marker's end does not count."""

    MARKER = f"witness{os.getpid()}"  # another one than before it

    def __init__(self, findings: Findings, ended: trio.Semaphore) -> None:
        self._findings = findings
        self._ended = ended
        self._last: int | None = None
        self._told: dict[str, list[str]] = defaultdict(list)
        self._exits: dict[str, list[Any]] = defaultdict(list)
        self._listed: Counter[tuple[str, str]] = Counter()
        self.count = 0

    async def follow(self, client: Any, groups: int, *, task_status: trio.TaskStatus[None]) -> None:
        """Until that many groups have ended; started when all that is old has been read."""
        await client.call("LAUNCH_CONTAINER", container_id=self.MARKER, command=["true"])
        async with aclosing(client.stream("SUBSCRIBE_EVENTS", since=0)) as lines:
            async for line in lines:
                if self._last is not None:
                    self._findings.compare("the number of an event", line["seq"], self._last + 1)
                    self._last = line["seq"]
                    if line["id"].startswith("life"):  # others may be about, too
                        self._hear(line)
                        groups -= line["type"] == "end"
                elif line["type"] == "end" and line["id"] == self.MARKER:
                    self._last = line["seq"]
                    await client.call("REMOVE_CONTAINER", container_id=self.MARKER)
                    task_status.started()
                if not groups:
                    return

    def _hear(self, line: dict[str, Any]) -> None:
        self.count += 1
        kind, container_id = line["type"], line["id"]
        if kind == "end":
            self._ended.release()
        if kind in ("effect", "step"):
            self._findings.compare(f"{kind} of {container_id}", line["index"], self._listed[container_id, kind])
            self._listed[container_id, kind] += 1
            return
        self._told[container_id].append(kind)
        if kind in ("exited", "dead"):
            self._exits[container_id].append((line["wait"]["exit"], line["wait"]["signal"]))

    def check(self, pod: Pod) -> None:
        """Everything once, and in order."""
        told = self._told[pod.root]
        self._findings.compare(f"told of {pod.root} as a group", [kind for kind in told if kind not in OF_EACH], OF_GROUP)
        self._findings.compare(f"the last of {pod.root}", told[-1:], OF_GROUP[-1:])
        for found in {pod.root, *(each.id for each in pod.lives)}:
            self._findings.compare(f"told of {found}", [kind for kind in self._told[found] if kind in OF_EACH], OF_EACH)
        for each in pod.lives:
            self._findings.compare(f"the ends of {each.id} in events", self._exits[each.id], [(each.code, None)] * 2)


async def _read(client: Any, each: Life, stream: str, findings: Findings, begun: trio.Event | None = None) -> None:
    """All that a container has printed; with `begun`, which is set when the first of it has come, up to its end."""
    have = b""
    async with aclosing(client.stream("READ_LOGS", container_id=each.id, stream=stream, follow=begun is not None)) as pieces:
        async for item in pieces:
            findings.compare(f"the offset in {stream} of {each.id}", item["offset"], len(have))
            have += item["data"]
            if begun is not None:
                begun.set()
    findings.compare(f"{stream} of {each.id}", have, each.printed[stream])
    findings.bytes += len(have)


async def _live(client: Any, pod: Pod, findings: Findings) -> None:
    """One group from its launch to its removal."""
    with contextlib.ExitStack() as stack:
        gates = [stack.enter_context(_gate(each.gate)) for each in pod.lives if each.gate is not None]
        await client.call("LAUNCH_GROUP", group=pod.document)
        async with trio.open_nursery() as reading:
            for each, gate in zip(pod.lives, gates, strict=False):
                begun = [trio.Event() for _ in each.printed]
                for stream, event in zip(each.printed, begun, strict=True):
                    reading.start_soon(_read, client, each, stream, findings, event)
                for event in begun:
                    await event.wait()
                os.write(gate, b"go\n")
            for each in pod.lives:
                wait = await client.call("WAIT_CONTAINER", container_id=each.id)
                findings.compare(f"the end of {each.id}", (wait["exit"], wait["signal"]), (each.code, None))
    for each in pod.lives if not gates else ():
        for stream in each.printed:
            await _read(client, each, stream, findings)
    await client.call("WAIT_CONTAINER", container_id=pod.root)
    await client.call("REMOVE_CONTAINER", container_id=pod.root)


@contextlib.contextmanager
def _gate(path: str) -> Iterator[int]:
    """A pipe with a name, open for reading and writing: nobody waits for anybody to open it."""
    os.mkfifo(path)
    os.chmod(path, 0o644)
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)
        os.unlink(path)


async def _main(socket: str, wanted: Wanted) -> dict[str, Any]:
    findings = Findings()
    waiting = wanted.pods()
    ahead = trio.Semaphore(LEAD // wanted.size)

    async def work() -> None:
        async with open_client(socket) as client:
            for pod in waiting:
                await ahead.acquire()
                try:
                    await _live(client, pod, findings)
                except RemoteError as error:
                    findings.append(f"{pod.root}: {error}")
                    return

    witness = Witness(findings, ahead)
    async with open_client(socket) as watching, trio.open_nursery() as nursery:
        await nursery.start(witness.follow, watching, len(range(0, wanted.lives, wanted.size)))
        began = time.monotonic()
        async with trio.open_nursery() as working:
            for _ in range(wanted.connections):
                working.start_soon(work)
        seconds = time.monotonic() - began
        nursery.cancel_scope.deadline = trio.current_time() + PATIENCE  # for the last events
    for pod in wanted.pods():
        witness.check(pod)
    seen = {"lives": wanted.lives, "bytes": findings.bytes, "events": witness.count, "seconds": round(seconds, 2)}
    return {"findings": findings, **seen}


if __name__ == "__main__":
    print(json.dumps(trio.run(_main, sys.argv[1], Wanted(**json.loads(sys.argv[2])))))
