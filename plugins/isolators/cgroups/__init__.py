"""Control groups: how much a container may use, and the certainty that all of it can be killed.

What lives here: which groups, where, with which limits. What does not: the files of either version (v1.py and
v2.py, the effect kinds), and killing and removing, which are undo verbs of the kernel.

Every container has groups of its own below its parent's, so a limit holds for it and everything inside it, at
any depth. What is made depends on what the probe found (HostFacts.cgroups.mode):

* v2: one group; the process is born in it. A group with limited children may hold no process itself, so one
  that will have children keeps its own in a leaf, `_self` (no container can have that name).
* v1: one group for each of memory, cpu and pids, entered by writing to `tasks` before anything is allocated; killed one by one.
* hybrid: limits in v1, and a group in the v2 tree, which has no controllers there but kills everything at once.
* none: no groups; a limit that is asked for is then refused, never ignored. So is a container among the processes of the host: what
  it leaves behind could not be found any more when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel import Effect, Fact, Grant, Plan, Step, Undo, hookimpl
from mesocosm.kernel.contracts import Check, ContainerPlan, ContainerSpec, EffectKind, HostFacts, Watch
from mesocosm.kernel.core.errors import UnsupportedError
from mesocosm.kernel.core.plan import is_apart
from mesocosm.kernel.core.resources import show_size
from mesocosm.plugins.isolators.cgroups.v1 import Cgroup1
from mesocosm.plugins.isolators.cgroups.v2 import Cgroup2

CONTROLLERS = ("memory", "cpu", "pids")
OWN = "_self"
_FIELDS = {"memory": "memory", "cpu": "cpus", "pids": "pids"}  # controller → field of a task's resources
_DELEGATE = "an ordinary user needs a delegated cgroup v2: systemd-run --user --scope -p Delegate=yes meso agent; see meso doctor"


@hookimpl
def effect_kinds() -> Sequence[EffectKind]:
    """cgroup1 and cgroup2."""
    return [Cgroup1(), Cgroup2()]


@hookimpl
def host_effects(host: HostFacts) -> Sequence[Effect]:
    """The group that all containers of this agent are below, in each hierarchy."""
    facts = host.cgroups
    effects = [_cgroup1(names, _base(host, top), {}, attach=False) for top, names in _hierarchies(host)]
    if facts.mode == "v2" and facts.v2:
        effects.append(_cgroup2(_base(host, facts.v2), {}, _controllers(host), attach=False))
    elif facts.mode == "hybrid" and facts.v2:
        effects.append(_cgroup2(_base(host, facts.v2), {}, [], attach=False))
    return effects


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
    """The container's groups, the process's way into them, and the watch for a memory limit that kills."""
    limits = _limits(container, host)
    if host.cgroups.mode == "none":
        _check_processes(container, parent, host)
        return None
    return _plan_v2(container, parent, host, limits) if host.cgroups.mode == "v2" else _plan_v1(container, host, limits)


@hookimpl
def checks(host: HostFacts) -> Sequence[Check]:
    """Where groups can be made, and each limit that can or cannot be set."""
    facts = host.cgroups
    hint = _DELEGATE if host.rootless else "mount a cgroup file system with the controllers"
    some = facts.mode != "none"
    found = [Check("cgroups", ok=some, have=facts.mode, need="v2, v1 or hybrid", hint="" if some else hint)]
    for name in CONTROLLERS:
        ok = name in facts.limits
        have = "can be set" if ok else facts.reason or "no such controller"
        found.append(Check(f"limit {_FIELDS[name]}", ok=ok, have=have, need=f"the {name} controller", hint="" if ok else hint))
    return found


def _limits(container: ContainerSpec, host: HostFacts) -> dict[str, int]:
    """controller → limit, as asked: memory in bytes, cpu in millicpus, pids. UnsupportedError for what cannot be set."""
    asked = {"memory": container.memory, "cpu": container.cpus, "pids": container.pids}
    for name, value in asked.items():
        if value is not None and name not in host.cgroups.limits:
            need = show_size(value) if name == "memory" else f"{value / 1000:g} cpus" if name == "cpu" else f"{value} processes"
            raise UnsupportedError(
                f"the {_FIELDS[name]} of a container cannot be limited here",
                path=f"{container.path}.resources.{_FIELDS[name]}",
                have=host.cgroups.reason or f"no {name} controller",
                need=need,
                hint=_DELEGATE if host.rootless else "leave the limit out, or see meso doctor",
            )
    return {name: value for name, value in asked.items() if value is not None}


def _check_processes(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts) -> None:
    share = container.namespaces.get("pid", "own")
    if not is_apart("pid", share, parent):
        raise UnsupportedError(
            "a container among the host's processes could not be ended whole here: there are no control groups to find its own by",
            path=f"{container.path}.namespaces.pid",
            have=share,
            need="own, or control groups",
            hint=f"leave it out; or {_DELEGATE}"
            if host.rootless
            else "leave it out; or mount a cgroup file system; see meso doctor",
        )


def _base(host: HostFacts, top: str) -> str:
    return f"{top.rstrip('/')}/mesocosm-{host.run_id}"


def _path(host: HostFacts, top: str, container_id: str) -> str:
    return f"{_base(host, top)}/{container_id.replace('.', '/')}"


def _hierarchies(host: HostFacts) -> list[tuple[str, list[str]]]:
    """(directory, controllers) of v1; controllers that are mounted together share a directory, and so a group."""
    found: dict[str, list[str]] = {}
    if host.cgroups.mode in ("v1", "hybrid"):
        for name in CONTROLLERS:
            if name in host.cgroups.v1:
                found.setdefault(host.cgroups.v1[name], []).append(name)
    return list(found.items())


def _controllers(host: HostFacts) -> list[str]:
    return [name for name in CONTROLLERS if name in host.cgroups.limits]


def _cgroup1(names: Sequence[str], path: str, limits: Mapping[str, int], *, attach: bool = True, kills: bool = False) -> Effect:
    args = {"controller": ",".join(names), "path": path, "limits": dict(limits), "attach": attach}
    undo = (Undo("kill_cgroup", path), Undo("rmdir_cgroup", path)) if kills else (Undo("rmdir_cgroup", path),)
    return Effect("cgroup1", args, undo)


def _cgroup2(path: str, limits: Mapping[str, Any], controllers: Sequence[str], *, attach: bool = True) -> Effect:
    args = {"path": path, "limits": dict(limits), "controllers": list(controllers), "attach": attach}
    undo = (Undo("kill_cgroup", path), Undo("rmdir_cgroup", path)) if attach else (Undo("rmdir_cgroup", path),)
    return Effect("cgroup2", args, undo)


def _plan_v1(container: ContainerSpec, host: HostFacts, limits: Mapping[str, int]) -> Plan:
    effects: list[Effect] = []
    steps: list[Step] = []
    watches: list[Watch] = []
    for top, names in _hierarchies(host):
        path = _path(host, top, container.id)
        kills = host.cgroups.mode == "v1"  # in a hybrid, v2 does
        effects.append(_cgroup1(names, path, {name: limits[name] for name in names if name in limits}, kills=kills))
        steps.append(Step("attach_cgroup", {"fd": Fact(len(effects) - 1, "tasks"), "path": path}))
        if "memory" in names:
            watches.append(Watch("oom", {"file": f"{path}/memory.oom_control", "key": "oom_kill", "limit": "memory"}))
    if host.cgroups.mode == "hybrid" and host.cgroups.v2:
        path = _path(host, host.cgroups.v2, container.id)
        effects.append(_cgroup2(path, {}, []))
        steps.append(Step("into_cgroup", {"fd": Fact(len(effects) - 1, "fd"), "path": path}))
    return Plan(effects=effects, setup=steps, watches=watches)


def _plan_v2(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, limits: Mapping[str, int]) -> Plan:
    top = host.cgroups.v2 or "/sys/fs/cgroup"
    path = _path(host, top, container.id)
    available = _controllers(host)
    if parent is not None and not _hands_on(parent):
        # Its parent's processes stand in its parent's group: no controller can be handed on from there (cgroups(7)).
        if limits:
            name = next(iter(limits))
            raise UnsupportedError(
                "a container that was not made for children cannot give them limits",
                path=f"{container.path}.resources.{_FIELDS[name]}",
                have=f"{parent.id} has no tasks and no api",
                need="a parent that was launched with tasks",
            )
        available = []
    has_memory = "memory" in available
    home = path
    if not container.has_children:
        effects = [_cgroup2(path, _v2_limits(limits, is_leaf=has_memory), [])]
    else:
        effects = [_cgroup2(path, limits, available)]
        home = f"{path}/{OWN}"
        effects.append(_cgroup2(home, _v2_limits({}, is_leaf=not container.is_pause and has_memory), []))
    steps = [Step("into_cgroup", {"fd": Fact(len(effects) - 1, "fd"), "path": home})]
    shares = container.namespaces
    if not container.is_pause and shares.get("mount", "own") == "own" and shares.get("cgroup", "own") == "own":
        steps.append(Step("cgroup2", {"target": "/sys/fs/cgroup"}))
    watches = [Watch("oom", {"file": f"{home}/memory.events", "key": "oom_kill", "limit": "memory"})] if has_memory else []
    return Plan(effects=effects, setup=steps, watches=watches)


def _v2_limits(limits: Mapping[str, int], *, is_leaf: bool) -> dict[str, int]:
    """The limits, and for a group of one program: if memory runs out, all of it goes, not one process of it."""
    return {**limits, "oom_group": 1} if is_leaf else dict(limits)


def _hands_on(parent: ContainerPlan) -> bool:
    return any(effect.kind == "cgroup2" and effect.args["path"].endswith(f"/{OWN}") for effect in parent.effects)
