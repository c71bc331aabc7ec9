"""Plans: what an isolator answers with, and the merged plan of one container.

Everything here is data. An isolator returns a `Plan`; `merge` puts the plans of all isolators together into
one `ContainerPlan`: effects in planning order, setup steps in the order of their *stages*. The kernel carries
the merged plan out, remembers it, explains it and undoes it; nobody else may.

Two things cannot be known while planning and stand in the plan as references:

* `Fact(n, "name")`: what the effect n will find out (a file descriptor, an address). Effects are counted
  within the isolator's own plan; `merge` renumbers them for the whole container.
* `Grant("name")`: what the kernel hands out when the container is admitted (an id range).

The vocabulary of steps is closed: STEPS is the whole of it. A kind is bound to its stage, so no plug-in
depends on another's position; within a stage the planning order of the set decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from mesocosm.kernel.core.errors import InternalError

# In the order in which the child goes through them; contrib/manual/launch.md has the reasons.
STAGES = (
    "clone",  # namespaces that must exist from the first instruction; joins of the parent's
    "cgroup",  # into the limits, before anything is allocated
    "enclose",  # the cgroup namespace: its root is where the process is now
    "root",  # the mount tree that will be /
    "mount",  # everything below it
    "protect",  # masks and read-only views over what was mounted
    "pivot",  # the host's tree is gone after this
    "user",  # the user namespace: from here on no power over anything made above
    "own",  # namespaces owned by that user namespace
    "configure",  # what can be said inside them: host name, loopback
    "session",  # session, keyring
    "stdio",
    "identity",  # capabilities, user and group, working directory
    "limits",  # of the program: what comes before needs descriptors of its own
    "check",  # what execve would refuse, asked before the barrier
    "barrier",
    "exec",
)

# kind: (stage, the system call that does the work, what it is). Grown by a change here with two users, never by a hook.
STEPS: Mapping[str, tuple[str, str, str]] = {
    "clone": ("clone", "clone3", "namespaces: list of names to create with the process"),
    "join": ("clone", "setns", "namespaces: list of names to enter; of: container id, or 'host'"),
    "into_cgroup": ("clone", "clone3", "fd: of a cgroup v2 directory the process is born in"),
    "attach_cgroup": ("cgroup", "write", "fd: of a cgroup v1 tasks file, opened before"),
    "oom_score": ("cgroup", "write", "value: of oom_score_adj; before the user changes, who could not open the file"),
    "unshare": ("enclose", "unshare", "namespaces: list of names, made before the root (cgroup)"),
    "view": ("root", "open_tree", "name: of a launcher's mount tree; extra: directories it lacks, parts: its top (own root)"),
    "overlay": (
        "root",
        "fsmount",
        "lower: list of fds of detached trees; layer: fd of one with `upper` and `work` in it, or null (read-only)",
    ),
    "tree": ("root", "move_mount", "fd: of a detached mount tree; read_only"),
    "tmpfs": ("mount", "fsmount", "target, size, mode, uid, flags: list of names, nr_inodes; directories: name → mode, made in it"),
    "scratch": (
        "mount",
        "fsmount",
        "size, nr_inodes, uid, flags: of one tmpfs; places: target → mode, flags, directories (name → mode) of a directory in it;"
        " create: dir or null",
    ),
    "proc": ("mount", "fsmount", "target"),
    "devpts": ("mount", "fsmount", "target"),
    "mqueue": ("mount", "fsmount", "target"),
    "cgroup2": ("mount", "fsmount", "target; read-only"),
    "bind": (
        "mount",
        "move_mount",
        "fd: of a detached mount tree; target; read_only; create: dir, file or null; foreign: of a file system that may not answer",
    ),
    "view_part": ("mount", "open_tree", "view, source: path in it; target; create: dir, file or null"),
    "rebind": ("mount", "open_tree", "source: path inside the root; target; read_only"),
    "mask": ("protect", "move_mount", "paths: list; each covered by an empty file or directory, absent ones ignored"),
    "read_only": ("protect", "mount_setattr", "paths: list; each bound onto itself read-only, absent ones ignored"),
    "pivot": ("pivot", "pivot_root", "the new root becomes /, the old one is detached; read_only"),
    "new_user": ("user", "unshare", "base, count: ids outside that 0…count-1 inside are"),
    "join_user": ("user", "setns", "of: container id"),
    "own": ("own", "unshare", "namespaces: list of names owned by the container's users"),
    "hostname": ("configure", "sethostname", "name"),
    "loopback": ("configure", "ioctl", "bring lo up"),
    "session": ("session", "setsid", "a session of its own"),
    "keyring": ("session", "keyctl", "a session keyring of its own"),
    "stdio": ("stdio", "dup3", "fd: what becomes number; number: 0, 1 or 2"),
    "rlimit": ("limits", "prlimit64", "resource, soft, hard"),
    "bounding": ("identity", "prctl", "keep: list of capability names; all others leave the bounding set"),
    "identity": (
        "identity",
        "setresuid",
        "uid, gid, groups; user: as asked for; only: [uid, gid] that the only id has so far, which becomes uid and gid",
    ),
    "capabilities": ("identity", "capset", "keep: list of names in permitted and effective; inheritable and ambient end empty"),
    "no_new_privileges": ("identity", "prctl", "set-uid programs and file capabilities give nothing"),
    "working_directory": ("identity", "chdir", "path inside the root, or null for /"),
    "seccomp": ("identity", "seccomp", "filter: the BPF program as bytes"),
    "check": ("check", "execveat", "argv: its first, the program, is looked up on `path` and asked whether it may be executed"),
    "barrier": ("barrier", "read", "waits with all others of the group"),
    "exec": ("exec", "execve", "argv, env"),
    "pause": ("exec", "execveat", "the pod's own program, which only waits"),
}


class Fact(msgspec.Struct, frozen=True, array_like=True, tag="\0fact"):
    """What effect number `index` will find out under `name`; in JSON {"$fact": [index, name]}.

    As bytes it is a list with a tag that no text given to execve can be, for the sake of the ledger.
    """

    index: int
    name: str


class Grant(msgspec.Struct, frozen=True, array_like=True, tag="\0grant"):
    """What the kernel hands out at admission: "uid_base", "uid_count"; in JSON {"$grant": name}."""

    name: str


class Undo(NamedTuple):
    """One verb of the kernel's closed undo vocabulary, and what it is done to."""

    verb: str
    target: str


class Effect(msgspec.Struct, frozen=True):
    """A thing to make on the host before the container exists.

    `undo` is recorded before the thing is made and is all that is needed to unmake it. `keep` says how long
    the thing lives: False, as long as the container runs; True, until its record is removed (logs, sandbox).
    """

    kind: str
    args: dict[str, Any] = {}
    undo: tuple[Undo, ...] = ()
    keep: bool = False
    plugin: str = ""


class Step(msgspec.Struct, frozen=True):
    """Something the new process does to itself between clone3 and execve."""

    kind: str
    args: dict[str, Any] = {}
    plugin: str = ""

    @property
    def stage(self) -> str:
        """The stage its kind belongs to."""
        return STEPS[self.kind][0]

    @property
    def syscall(self) -> str:
        """The system call that does the work, for errors."""
        return STEPS[self.kind][1]


class Watch(msgspec.Struct, frozen=True):
    """What may end a container from outside: `kind` "oom" with the cgroup whose events tell."""

    kind: str
    args: dict[str, Any] = {}
    plugin: str = ""


class Plan(msgspec.Struct, frozen=True):
    """One isolator's answer for one container. Empty parts may be left out."""

    effects: Sequence[Effect] = ()
    setup: Sequence[Step] = ()
    env: Mapping[str, str] = {}
    watches: Sequence[Watch] = ()


class ContainerPlan(msgspec.Struct, frozen=True):
    """The whole plan of one container, in the order in which it is carried out.

    `referring` has the indexes of the setup steps with a reference in them: few, and asked for at every launch.
    """

    id: str
    namespaces: dict[str, str]
    effects: tuple[Effect, ...]
    setup: tuple[Step, ...]
    watches: tuple[Watch, ...] = ()
    referring: tuple[int, ...] = ()

    @property
    def unshared(self) -> frozenset[str]:
        """The kinds of namespaces in which this container is not the host's: its own, or those of an ancestor.

        `namespaces` says what was asked for; "parent" there may still mean the host. This reads what is done.
        """
        kinds: set[str] = set()
        for step in self.setup:
            if step.kind in ("clone", "unshare", "own") or (step.kind == "join" and step.args["of"] != "host"):
                kinds.update(step.args["namespaces"])
            elif step.kind in ("new_user", "join_user"):
                kinds.add("user")
        return frozenset(kinds)


def is_apart(kind: str, share: str, parent: ContainerPlan | None) -> bool:
    """Whether a container with this share ("own", "parent", "host") of `kind` is in another namespace than the host."""
    return share == "own" or (share == "parent" and parent is not None and kind in parent.unshared)


_STAGE_ORDER = {stage: number for number, stage in enumerate(STAGES)}
_KIND_ORDER = {kind: _STAGE_ORDER[stage] for kind, (stage, _, _) in STEPS.items()}


def merge(container_id: str, namespaces: Mapping[str, str], plans: Sequence[tuple[str, Plan]]) -> ContainerPlan:
    """The plans of (plug-in, Plan) in planning order, as one.

    Variables set by several isolators: the later one wins, the container's own (put into the `exec` step by
    the planner of the program) wins over all. InternalError names the plug-in that used an unknown kind.
    """
    effects: list[Effect] = []
    steps: list[tuple[int, bool, Step]] = []  # (stage, whether it refers, step)
    watches: list[Watch] = []
    env: dict[str, str] = {}
    for plugin, plan in plans:
        offset = len(effects)
        for effect in plan.effects:
            effects.append(Effect(effect.kind, _moved(effect.args, offset), effect.undo, effect.keep, plugin))
        for step in plan.setup:
            order = _KIND_ORDER.get(step.kind)
            if order is None:
                raise InternalError(
                    f"{step.kind!r} is not a setup step", plugin=plugin, id=container_id, hint=f"the kinds are: {' '.join(STEPS)}"
                )
            args = step.args
            is_referring = bool(args) and refers(args.values())
            steps.append((order, is_referring, Step(step.kind, _shift(args, offset) if is_referring and offset else args, plugin)))
        watches.extend(Watch(watch.kind, _moved(watch.args, offset), plugin) for watch in plan.watches)
        env.update(plan.env)
    steps.sort(key=_by_stage)
    setup = tuple(_with_env(step, env) if step.kind == "exec" else step for _, _, step in steps)
    referring = tuple(index for index, (_, is_referring, _) in enumerate(steps) if is_referring)
    return ContainerPlan(container_id, dict(namespaces), tuple(effects), setup, tuple(watches), referring)


def _by_stage(entry: tuple[int, bool, Step]) -> int:
    return entry[0]


def _with_env(step: Step, env: Mapping[str, str]) -> Step:
    return Step("exec", {**step.args, "env": {**env, **step.args["env"]}}, step.plugin)


_REFERENCES = frozenset({Fact, Grant})
_NESTED = frozenset({dict, list, tuple})


def refers(values: Collection[Any]) -> bool:
    """Whether there is a Fact or Grant among `values`, at any depth. Most plans are asked this, few have one: it is quick."""
    kinds = set(map(type, values))
    if not _REFERENCES.isdisjoint(kinds):
        return True
    if _NESTED.isdisjoint(kinds):
        return False
    return any(refers(value.values() if type(value) is dict else value) for value in values if type(value) in _NESTED)


def _shift(value: Any, offset: int) -> Any:
    """`value` with every Fact moved by `offset` effects."""
    kind = type(value)
    if kind is Fact:
        return Fact(value.index + offset, value.name)
    if kind is dict:
        return {key: _shift(item, offset) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [_shift(item, offset) for item in value]
    return value


def _moved(args: dict[str, Any], offset: int) -> dict[str, Any]:
    """`args` counted within the whole plan; shared if nothing has to be."""
    shifted: dict[str, Any] = _shift(args, offset) if offset and refers(args.values()) else args
    return shifted


def resolve(value: Any, facts: Sequence[Mapping[str, Any]], grants: Mapping[str, Any]) -> Any:
    """`value` with every Fact and Grant replaced by what it became; KeyError for one that nobody found out."""
    kind = type(value)
    if kind is Fact:
        return facts[value.index][value.name]
    if kind is Grant:
        return grants[value.name]
    if kind is dict:
        return {key: resolve(item, facts, grants) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [resolve(item, facts, grants) for item in value]
    return value


def resolve_steps(plan: ContainerPlan, facts: Sequence[Mapping[str, Any]], grants: Mapping[str, Any]) -> tuple[Step, ...]:
    """A plan's setup steps with every reference replaced; those without one are the plan's own."""
    steps = list(plan.setup)
    for index in plan.referring:
        step = steps[index]
        steps[index] = Step(step.kind, resolve(step.args, facts, grants), step.plugin)
    return tuple(steps)


def as_data(value: Any) -> Any:
    """`value` as JSON has it: references as {"$fact": …} and {"$grant": …}, bytes as hexadecimal text."""
    kind = type(value)
    if kind is Fact:
        return {"$fact": [value.index, value.name]}
    if kind is Grant:
        return {"$grant": value.name}
    if kind is dict:
        return {key: as_data(item) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [as_data(item) for item in value]
    return value.hex() if kind is bytes else value


def effect_as_data(index: int, effect: Effect) -> dict[str, Any]:
    """The E of the contract: {"index", "kind", "plugin", "args", "undo"}."""
    undo = [{"verb": undo.verb, "target": undo.target} for undo in effect.undo]
    return {"index": index, "kind": effect.kind, "plugin": effect.plugin, "args": as_data(effect.args), "undo": undo}


def step_as_data(index: int, step: Step) -> dict[str, Any]:
    """The S of the contract: {"index", "stage", "kind", "plugin", "args", "syscall"}."""
    return {
        "index": index,
        "stage": step.stage,
        "kind": step.kind,
        "plugin": step.plugin,
        "args": as_data(step.args),
        "syscall": step.syscall,
    }


def plan_as_data(plan: ContainerPlan) -> dict[str, Any]:
    """One container of ``meso plan --json``."""
    return {
        "id": plan.id,
        "namespaces": plan.namespaces,
        "effects": [effect_as_data(index, effect) for index, effect in enumerate(plan.effects)],
        "setup": [step_as_data(index, step) for index, step in enumerate(plan.setup)],
    }
