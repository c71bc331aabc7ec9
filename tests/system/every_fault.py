"""Fails everything that a launch does, one thing after the other: run by test_every_fault.py in a world of its own.

    every_fault.py KINDS MARKS DOCUMENT [TASKS]

An agent of this process, the real launcher and the real machine. What there is to fail comes from the plan itself and from what
happens, so what a new isolator adds is covered by being in the plan. DOCUMENT is a pod as JSON, TASKS what is launched inside
a pod that runs; every program leaves a file in MARKS. KINDS is one or more of, with commas,

    effect, member, step    as MESOCOSM_FAULT has them: each effect, each staging, each setup step of each task
    row                     each system call of each task's table
    call                    each call of the agent's own that changes or opens something: no space left on device
    call-kill, call-end, call-remove, call-logs
                            the same while a pod is ended or removed, while it ends by itself, while its output is read
    turns, errors           these calls fail with each of five errors in its turn; with every one of them
    kill                    the group is killed at each of its moments: before each effect, staging, transaction, at each event

A line of JSON for each: {"fault", "error", "launched", "maybe", "ran", "left", "canary"}, where `error` is that of the launch or of
the group's end, `launched` whether the launch was answered, `maybe` whether what was to fail may not have been needed (a directory
is made only where there is none), `ran` the marks that were left, `left` the difference of the census. Of a call there is `call`,
[errno, event, path]; of what is no launch `told`, the answer, `end`, how it ended, and `said`, its output.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import trio
from own_calls import KINDS, Calls, Counter, Subject, turns

from mesocosm.kernel.cli import serve
from mesocosm.kernel.cli.output import Console
from mesocosm.kernel.contracts import HostFacts
from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.core.plan import Step
from mesocosm.kernel.launcher.client import open_launcher
from mesocosm.kernel.launcher.compile import compile_steps
from mesocosm.kernel.launcher.contract import Launcher, Staged, StageRequest
from mesocosm.kernel.launcher.table import JUMP_IF_FAIL, JUMP_IF_OK, JUMP_IF_ZERO, ROW_BYTES
from mesocosm.kernel.launcher.viewing import is_confined
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.runtime.agent import Agent
from mesocosm.kernel.runtime.faults import Faults
from mesocosm.kernel.sets.loading import Plugins
from mesocosm.kernel.testing.census import Census, census, left_over

CANARY = {"name": "canary", "tasks": [{"name": "bird", "command": ["sleep", "1000"]}]}
SETTLE = 30.0  # seconds; a network namespace takes one
SURE = {c.SYS["wait4"], c.SYS["exit_group"]}  # of an intermediate, for its own child, with every signal blocked: they cannot fail


# --- faults ---------------------------------------------------------------------------------------------------------


class Moments(Faults):
    """In place of an agent's faults: tells a counter of what they would be asked about."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.armed, self._counter = True, counter

    def strike(self, kind: str, what: str) -> None:
        """A moment."""
        self._counter.tick()

    def inside(self, name: str) -> None:
        """Nothing is to fail."""


@contextmanager
def killed_at(agent: Agent, number: int, group: str, victim: str) -> Iterator[Counter]:
    """Kills `victim` at the `number`-th moment of the group named `group`."""
    world = agent.world
    assert world.nursery is not None

    async def kill() -> None:
        try:
            await agent.kill_container(victim)
        except MesoError as error:  # it is over, or not yet known
            assert error.code in ("conflict", "not_found"), error  # noqa: PT017 - a moment may come before or after its life

    counter = Counter(number, lambda: world.nursery.start_soon(kill))  # type: ignore[union-attr] # it runs
    add = world.journal.add

    def adding(container_id: str, *args: Any, **more: Any) -> None:
        add(container_id, *args, **more)
        if container_id == group or container_id.startswith(f"{group}."):
            counter.tick()

    world.journal.add, world.faults = adding, Moments(counter)  # type: ignore[method-assign]
    try:
        yield counter
    finally:
        world.journal.add, world.faults = add, Faults("")  # type: ignore[method-assign]


class Watched:
    """A launcher that remembers what it was last asked to stage of each name."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.steps: dict[str, tuple[Step, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._launcher, name)

    async def stage(self, request: StageRequest) -> Staged:
        """Stages it."""
        self.steps[request.container_id] = request.steps
        return await self._launcher.stage(request)

    def rows(self, container_id: str) -> dict[int, bool]:
        """The numbers of those of its system calls that can fail → whether others may spare it them."""
        steps = self.steps[container_id]
        compiled = compile_steps(steps, confined=is_confined())
        found, jumped = {}, 0
        for number in range(1, len(compiled.row_steps) + 1):
            call, *_, flags = struct.unpack_from("=10q", compiled.table.rows, (number - 1) * ROW_BYTES)
            if call not in SURE:
                found[number] = number <= jumped or is_behind(container_id, steps[compiled.row_steps[number - 1]].stage)
            if flags & (JUMP_IF_OK | JUMP_IF_FAIL | JUMP_IF_ZERO):
                jumped = max(jumped, number + (flags >> 32))
        return found


def is_behind(container_id: str, stage: str) -> bool:
    """Whether a pod's own container may be ended before it gets to this step: behind the barrier nobody waits for it."""
    return "." not in container_id and stage == "exec"


# --- trials ---------------------------------------------------------------------------------------------------------


class Trials:
    """One launch, again and again."""

    def __init__(self, agent: Agent, launcher: Watched, marks: str, document: dict[str, Any], tasks: list[Any] | None) -> None:
        self.agent, self.launcher, self.marks, self.document, self.tasks = agent, launcher, marks, document, tasks
        self.name: str = document["name"]
        inside = self.name + "." + document["tasks"][0]["name"]
        self.parent = inside  # of nested tasks
        self.ids = [self.name] if tasks is None else [f"{inside}.{task['name']}" for task in tasks]
        self.launched = False
        self.maybe = False  # what is to fail may be unnecessary
        self.calls = Calls()

    async def prepare(self) -> list[dict[str, Any]]:
        """Whatever has to be there; the plans of the containers that are launched again and again."""
        await self.agent.launch_group(CANARY)
        containers: list[dict[str, Any]] = (await self.agent.plan_group(self.document))["containers"]
        if self.tasks is not None:
            await self.agent.launch_group(self.document)
            first, *others = self.document["tasks"]
            whole = {**self.document, "tasks": [{**first, "tasks": self.tasks}, *others]}
            outer = {found["id"] for found in containers}
            containers = [each for each in (await self.agent.plan_group(whole))["containers"] if each["id"] not in outer]
        await self.outcome()  # once whole, so that all that is made once is made
        await self.forget()
        self.take()
        return containers

    async def outcome(self) -> dict[str, Any] | None:
        """The error with which the launch fails, or with which what was launched ends; None if there is neither."""
        self.launched = False
        try:
            with trio.fail_after(SETTLE):
                if self.tasks is None:
                    await self.agent.launch_group(self.document)
                else:
                    await self.agent.launch_nested_group(self.parent, self.tasks)
        except MesoError as error:
            return error.as_object()
        self.launched = True
        group = self.agent.world.cells[self.ids[0]].group
        with trio.fail_after(SETTLE):
            await group.over.wait()
        return group.error

    async def forget(self) -> None:
        """Whatever is known of it still."""
        for container_id in self.ids:
            if container_id in self.agent.world.cells:
                with trio.fail_after(SETTLE):
                    await self.agent.remove_container(container_id)

    def take(self) -> list[str]:
        """The names of what programs have left, which goes."""
        names = sorted(os.listdir(self.marks))
        for name in names:
            os.unlink(os.path.join(self.marks, name))
        return names

    async def run(self, kinds: list[str]) -> None:
        """Each fault in its turn."""
        containers = await self.prepare()
        before = await settled(self.agent.world.host)
        for fault, trial in self._trials(kinds, containers):
            with trial as counter:
                error = await self.outcome()
            await self.forget()
            if counter is not None and counter.armed:
                self.take()
                continue  # it was never reached: the last one of its kind has been
            seen = {"launched": self.launched, "maybe": self.maybe, "ran": self.take()}
            await self._tell(before, {"fault": fault, "error": error, **seen})
        for verb in [kind.removeprefix("call-") for kind in kinds if kind in KINDS]:
            await self._run_verb(verb, kinds, before)

    async def _tell(self, before: Census, seen: dict[str, Any]) -> None:
        left = await trio.to_thread.run_sync(partial(left_over, before, seconds=SETTLE))
        alive = {line["id"]: line["state"] for line in self.agent.get_containers()}.get("canary.bird") == "RUNNING"
        print(json.dumps({**seen, "call": self.calls.failed, "left": left, "canary": alive}), flush=True)

    async def _run_verb(self, verb: str, kinds: list[str], before: Census) -> None:
        subject = Subject(self.agent)
        for turn in turns(kinds):
            number, counter = 0, None
            while counter is None or not counter.armed:
                number += 1
                await subject.begin(verb)
                with self.calls.failing(number, turn) as counter:
                    seen = await subject.suffer(verb)
                seen |= await subject.finish(verb)
                if not counter.armed:
                    await self._tell(before, {"fault": f"call-{verb}:{number}", **seen})

    def _trials(self, kinds: list[str], containers: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
        count = 0
        for container in containers:
            for _ in container["effects"]:
                count += 1
                if "effect" in kinds:
                    yield self._asked(f"effect:{count}")
        for number in range(1, len(containers) + 1):
            if "member" in kinds:
                yield self._asked(f"member:{number}")
        for container in containers:
            leaf = container["id"].rpartition(".")[2]
            if "step" in kinds:
                for number, step in enumerate(container["setup"], 1):
                    self.maybe = is_behind(container["id"], step["stage"])
                    yield self._asked(f"step:{leaf}:{number}")
            if "row" in kinds:
                for number, unneeded in self.launcher.rows(container["id"]).items():
                    self.maybe = unneeded
                    yield self._asked(f"row:{leaf}:{number}")
            self.maybe = False
        for turn in turns(kinds) if "call" in kinds else ():
            yield from self._numbered("call", partial(self.calls.failing, turn=turn))
        if "kill" in kinds:
            yield from self._numbered("kill", self._killing)

    def _numbered(self, kind: str, failing: Callable[[int], Any]) -> Iterator[tuple[str, Any]]:
        number, counter = 0, None
        while counter is None or not counter.armed:
            number += 1
            with failing(number) as counter:
                yield f"{kind}:{number}", _entered(counter)

    def _asked(self, fault: str) -> tuple[str, Any]:
        return fault, self._with(Faults(fault))

    @contextmanager
    def _with(self, faults: Faults) -> Iterator[None]:
        self.agent.world.faults = faults
        try:
            yield
        finally:
            self.agent.world.faults = Faults("")

    def _killing(self, number: int) -> Any:
        return killed_at(self.agent, number, self.name if self.tasks is None else self.parent, self.ids[0])


@contextmanager
def _entered(counter: Counter) -> Iterator[Counter]:
    yield counter
    counter.at = 0 if counter.armed else counter.at  # what comes afterwards is not part of the launch


async def settled(host: HostFacts) -> Census:
    """A census once nothing moves any more."""
    taken = census(pids=[os.getpid()], run_id=host.run_id, keys="APART" not in os.environ)
    while True:
        await trio.sleep(0.05)
        again = taken.again()
        if not taken.difference(again):
            return taken
        taken = again


async def main(host: HostFacts, plugins: Plugins, *_: object) -> None:
    """In place of the agent's own main function, which would serve its socket."""
    kinds, marks, *documents = sys.argv[1:]
    document, tasks = json.loads(documents[0]), json.loads(documents[1]) if len(documents) > 1 else None
    async with open_launcher(host.run_dir) as real, trio.open_nursery() as nursery:
        launcher = Watched(real)
        agent = Agent(host=host, plugins=plugins, launcher=launcher, fault="")
        await nursery.start(agent.run)
        await Trials(agent, launcher, marks, document, tasks).run(kinds.split(","))
        await agent.stop_agent()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    serve._main = main
    serve._serve(argparse.Namespace(set=None, socket=None), None, Console())
