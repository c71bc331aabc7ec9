"""Plug-ins of a simulated host: kinds of effects that make things in a SimulatedMachine, an isolator, two executors.

They are as small as plug-ins can be while using everything that a plan has: kept and short-lived effects, quick and
slow ones, facts, grants, watches, host effects.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any

import trio

from mesocosm.kernel.contracts import (
    ContainerSpec,
    Descriptor,
    Effect,
    EffectContext,
    Executor,
    Fact,
    Grant,
    GroupView,
    HostFacts,
    Kill,
    Plan,
    Pod,
    Step,
    Undo,
    Watch,
)
from mesocosm.kernel.core.containers import pod_container, single_container, task_container
from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.core.spec import Task
from mesocosm.kernel.hookspecs import hookimpl
from mesocosm.kernel.sets.loading import Plugins, from_modules
from mesocosm.kernel.testing.simulated import FOREIGN, SimulatedMachine


class _ThingKind:
    """`thing` {path}: something that has to be undone; → fd."""

    name = "thing"

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        """Makes it; paths with "refused" in them are refused."""
        if "refused" in args["path"]:
            raise OSError(errno.ENOSPC, "No space left on device", args["path"])
        self._machine.make(self.name, args["path"])
        return {"fd": Descriptor(self._machine.descriptor())} if args.get("open") else {}

    def find(self, prefix: str) -> Iterable[str]:
        """Things below a prefix."""
        return [path for path in self._machine.things if path.startswith(prefix)]

    def owns(self, target: str) -> bool:
        """Whether an agent made it."""
        return self._machine.things[target] != FOREIGN


class _SlowKind:
    """`slow_thing` {path, seconds}: the same, from an outsider who takes his time."""

    name = "slow_thing"
    deadline = 10.0

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def do(self, args: Mapping[str, Any], _context: EffectContext) -> Awaitable[Mapping[str, Any]]:
        """Makes it after a while."""
        return self._do(args)

    async def _do(self, args: Mapping[str, Any]) -> Mapping[str, Any]:
        self._machine.make(self.name, args["path"])
        await trio.sleep(args["seconds"])
        return {"name": args["path"]}

    def find(self, prefix: str) -> Iterable[str]:
        """Slow things below a prefix."""
        return [path for path in self._machine.things if path.startswith(prefix)]


class SimulatedIsolator:
    """Three things per container (a kept directory, a cgroup, an open thing), a check, the barrier, the program.

    Labels ask for more: ``slow`` for that many slow things, ``effect = refused`` for one that fails.
    """

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    @hookimpl
    def effect_kinds(self) -> list[Any]:
        """thing and slow_thing."""
        return [_ThingKind(self._machine), _SlowKind(self._machine)]

    @hookimpl
    def host_effects(self, host: HostFacts) -> list[Effect]:
        """One thing for all."""
        return [Effect("thing", {"path": "host/shared"}, (Undo("rmdir", "host/shared"),))]

    @hookimpl
    def plan(self, container: ContainerSpec, grants: Mapping[str, Grant]) -> Plan:
        """See the class."""
        directory, cgroup = f"dir/{container.id}", f"cgroup/{container.id}"
        effects = [
            Effect("thing", {"path": directory, "uid": grants["uid_base"]}, (Undo("remove_tree", directory),), keep=True),
            Effect("thing", {"path": cgroup}, (Undo("kill_cgroup", cgroup), Undo("rmdir_cgroup", cgroup))),
            Effect("thing", {"path": f"{directory}/log", "open": True}, keep=True),
        ]
        for number in range(_count(container)):
            path = f"slow/{container.id}/{number}"
            effects.append(Effect("slow_thing", {"path": path, "seconds": 1.0 + number}, (Undo("unlink", path),)))
        if "effect" in container.labels:
            path = f"{container.labels['effect']}/{container.id}"
            effects.append(Effect("thing", {"path": path}, (Undo("unlink", path),)))
        setup = [Step("stdio", {"fd": Fact(2, "fd"), "number": 1}), Step("new_user", {"base": grants["uid_base"], "count": 1})]
        if container.is_pause:
            setup += [Step("barrier"), Step("pause")]
        else:
            setup += [Step("check", {"argv": list(container.command)}), Step("barrier")]
            setup.append(Step("exec", {"argv": list(container.command), "env": dict(container.env)}))
        return Plan(effects, setup, watches=[Watch("oom", {"file": cgroup, "key": "oom_kill", "limit": "memory"})])


def _count(container: ContainerSpec) -> int:
    asked = container.labels.get("slow", "0")
    if not (asked.isdecimal() and len(asked) < 3):
        raise SpecError("so many slow things cannot be made", path=f"{container.path}.labels.slow", have=asked, need="0 to 99")
    return int(asked)


class SimulatedPods:
    """An executor with the default one's rules, in their simplest form."""

    name = "default"

    def arrange(self, pod: Pod) -> list[ContainerSpec]:
        """The pod's container and one for each task."""
        root = pod_container(pod)
        return [root, *self._below(root, pod.tasks)]

    def _below(self, parent: ContainerSpec, tasks: Sequence[Task]) -> list[ContainerSpec]:
        found = []
        for index, task in enumerate(tasks):
            spec = task_container(task, parent, f"{parent.path}.tasks[{index}]")
            found += [spec, *self._below(spec, task.tasks)]
        return found

    def react(self, group: GroupView, ended: str) -> list[Kill]:
        """A failing essential member ends the group; when all are done, the pod's container goes."""
        root, *others = (member.id for member in group.members)
        if ended == root:
            return []
        wait = group.waits[ended]
        essential = next(member.essential for member in group.members if member.id == ended)
        if essential and not wait.succeeded and wait.reason != "parent" and ended not in group.killed:
            return [Kill(other, "group", ended) for other in others if other not in group.waits] or [Kill(root, "group", ended)]
        return [] if set(others) - group.waits.keys() else [Kill(root, "group")]


class SimulatedCommands:
    """An executor of single containers."""

    name = "command"

    def arrange(self, pod: Pod) -> list[ContainerSpec]:
        """One container."""
        return [single_container(pod, pod.tasks[0], "$.tasks[0]")]

    def react(self, group: GroupView, ended: str) -> list[Kill]:
        """Nothing follows."""
        return []


class _Provides:
    def __init__(self, made: Executor) -> None:
        self._made = made

    @hookimpl
    def executor(self) -> Executor:
        """The executor."""
        return self._made


def simulated_plugins(machine: SimulatedMachine, *more: Any) -> Plugins:
    """A set for a simulated host: SimulatedIsolator, `more` isolators, both executors."""
    isolators = {"simulated": SimulatedIsolator(machine), **{f"extra{number}": plugin for number, plugin in enumerate(more)}}
    executors: dict[str, Any] = {"pods": _Provides(SimulatedPods()), "commands": _Provides(SimulatedCommands())}
    return from_modules(isolators, executors)
