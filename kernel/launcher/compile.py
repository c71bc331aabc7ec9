"""From setup steps to a table of system calls: a pure function.

`compile_steps` takes resolved steps (no Fact, no Grant) in stage order and answers the table, which step each
row belongs to, and the descriptors to pass along. What a step becomes is one small function in `steps.py`;
fragments that do not depend on the container (most of them) are made once and kept.

Order inside the table, and why:

    the clone            alone: everything before `entry` runs in the launcher or in an intermediate
    (closing)            the launcher inserts it at `entry`: from the first instruction on, a container holds
                         nothing of its siblings, least of all the other end of its own barrier
    the steps            in stage order
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from mesocosm.kernel.contracts import Descriptor
from mesocosm.kernel.core.errors import InternalError, LaunchError, MesoError
from mesocosm.kernel.core.plan import STEPS, Step
from mesocosm.kernel.launcher import table as t
from mesocosm.kernel.launcher.contract import StageRequest
from mesocosm.kernel.launcher.steps import COMPILERS
from mesocosm.kernel.linux import constants as c

_CLONE_ARGS = struct.Struct("=11Q")  # linux/sched.h struct clone_args, version 2
_SIGCHLD = 17


class Compiled(NamedTuple):
    """A table, the step of each of its rows, the descriptors it needs, and what the launcher does besides.

    `origins` has for each fragment the steps it was made of, and which of them each of its rows is from (or how many
    rows, if all are from the only one). `user_map` is (base, count) if the child will ask for its maps; `owner` the uid that
    owns its scratch; `enter_pid` says whether the launcher has to enter the parent's PID namespace around the clone.
    """

    table: t.Table
    origins: list[tuple[Sequence[int], Sequence[int] | int]]
    fds: list[int]
    user_map: tuple[int, int] | None
    owner: int
    enter_pid: bool

    @property
    def row_steps(self) -> list[int]:
        """For each row the step it belongs to. Asked for when something has failed."""
        found: list[int] = []
        for steps, rows in self.origins:
            found += [steps[0]] * rows if isinstance(rows, int) else [steps[place] for place in rows]
        return found


def compile_steps(steps: Sequence[Step], *, confined: bool = False) -> Compiled:
    """The table for `steps`. InternalError names a step that nobody can compile, and whose it is.

    `confined`: the launcher is root of a user namespace only, so it may not come back from a PID namespace it entered.
    """
    try:
        return _compile(steps, confined=confined)
    except MesoError:
        raise
    except Exception as error:
        raise _uncompilable(steps, error) from error


def _uncompilable(steps: Sequence[Step], error: Exception) -> InternalError:
    for index, step in enumerate(steps):
        try:
            _compile((step,), confined=False)
        except Exception as own:
            where = {"plugin": step.plugin, "step": {"index": index, "stage": step.stage, "kind": step.kind}}
            hint = f"a bug of this plug-in; what a step needs: {STEPS[step.kind][2]}"
            return InternalError(f"not a step that can be done: {type(own).__name__}: {own}"[:500], hint=hint, **where)
    return InternalError(f"{type(error).__name__}: {error}")


def _compile(steps: Sequence[Step], *, confined: bool) -> Compiled:
    fragments: list[tuple[t.Fragment, int]] = []
    origins: list[tuple[Sequence[int], Sequence[int] | int]] = []
    fds: list[int] = []
    user_map, owner = None, 0
    clone, joins_leaf, enter_pid = _clone(steps, fds, confined=confined)
    entry = 0
    for fragment, index in clone:
        fragments.append((fragment, 0))
        origins.append(((index,), fragment.rows))
        entry += fragment.rows
    for fragment, index in joins_leaf:
        fragments.append((fragment, 0))
        origins.append(((index,), fragment.rows))
    given = {int(step.args["number"]) for step in steps if step.kind == "stdio"}
    run: list[tuple[str, dict[str, Any]]] = []  # steps of which nothing depends on this container, as far as possible in one piece
    indices: list[int] = []
    for index, step in enumerate(steps):
        kind, args = step.kind, step.args
        if kind in _CLONE_KINDS:
            continue
        # Ids differ from container to container. They are said beside the rows, which so are the same and kept once.
        if kind == "new_user":
            user_map = int(args["base"]), int(args["count"])
            args = {"count": args["count"]}
        elif kind == "scratch":
            owner = int(args["uid"])
            args = {**args, "uid": _OWNER if owner else 0}
        if kind not in _ALONE and (not args or not _has_descriptors(args)) and (kind != "barrier" or len(given) == 3):
            run.append((kind, args))
            indices.append(index)
            continue
        if run:
            fragment, places = _joined(_encode(run))
            fragments.append((fragment, 0))
            origins.append((indices, places))
            run, indices = [], []
        if kind == "barrier" and len(given) < 3:
            fragment = _missing_stdio(frozenset(given))
            fragments.append((fragment, 0))
            origins.append(((index,), fragment.rows))
        first = len(fds)
        fragment = _make(kind, args) if kind in _PARTICULAR else _fragment(kind, _encode(_extract(args, fds, first)))
        fragments.append((fragment, first))
        origins.append(((index,), fragment.rows))
    if run:
        fragment, places = _joined(_encode(run))
        fragments.append((fragment, 0))
        origins.append((indices, places))
    return Compiled(t.assemble(fragments, entry), origins, fds, user_map, owner, enter_pid and not confined)


def _has_descriptors(args: Mapping[str, Any]) -> bool:
    """Whether a step is passed descriptors: as an argument, or in a list that is one."""
    for value in args.values():
        if type(value) is Descriptor or (type(value) is list and value and type(value[0]) is Descriptor):
            return True
    return False


_encode = msgspec.msgpack.Encoder().encode
_CLONE_KINDS = frozenset({"clone", "join", "into_cgroup"})
_PLACE, _SPECIAL = 1, 2  # the codes of our msgpack extensions: a place among the step's descriptors, a number in SPECIALS
_OWNER = msgspec.msgpack.Ext(_SPECIAL, bytes([t.SPECIALS.index("owner")]))


def _extract(value: Any, fds: list[int], first: int) -> Any:
    """`value` with its Descriptors appended to `fds` and replaced by places, which no text of a user's can imitate."""
    kind = type(value)
    if kind is Descriptor:
        fds.append(int(value))
        return msgspec.msgpack.Ext(_PLACE, bytes([len(fds) - 1 - first]))
    if kind is dict:
        return {key: _extract(item, fds, first) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [_extract(item, fds, first) for item in value]
    return value


def _extension(code: int, data: memoryview) -> t.Passed | t.Special:
    return t.Passed(data[0]) if code == _PLACE else t.Special(t.SPECIALS[data[0]])


_decode = msgspec.msgpack.Decoder(ext_hook=_extension).decode
_parted = msgspec.msgpack.Decoder().decode  # extensions stay as they are, to be encoded once more


def _make(kind: str, args: dict[str, Any]) -> t.Fragment:
    compiler = COMPILERS.get(kind)
    if compiler is None:
        raise InternalError(f"nobody compiles the step {kind!r}", step={"index": -1, "stage": "?", "kind": kind})
    fragment = t.Fragment()
    compiler(fragment, args)
    return fragment


@lru_cache(maxsize=512)
def _fragment(kind: str, encoded: bytes) -> t.Fragment:
    return _make(kind, _decode(encoded))


@lru_cache(maxsize=256)
def _joined(encoded: bytes) -> tuple[t.Fragment, list[int]]:
    """Several steps as one fragment, and for each of its rows which of the steps it belongs to."""
    whole = t.Fragment()
    places: list[int] = []
    for place, (kind, args) in enumerate(_parted(encoded)):
        fragment = _fragment(kind, _encode(args))
        whole.append(fragment)
        places += [place] * fragment.rows
    return whole, places


_PARTICULAR = frozenset({"exec", "hostname"})  # differ from container to container: keeping them would not pay
_ALONE = _PARTICULAR | {"check"}  # differs from program to program: a piece with it in it would be kept for each of them


@lru_cache(maxsize=8)
def _missing_stdio(given: frozenset[int]) -> t.Fragment:
    fragment = t.Fragment()
    for number in {0, 1, 2} - given:
        fragment.row("dup3", t.Special("null"), number, 0)
    return fragment


def _clone(
    steps: Sequence[Step], fds: list[int], *, confined: bool
) -> tuple[list[tuple[t.Fragment, int]], list[tuple[t.Fragment, int]], bool]:
    """The rows up to and including the leaf's clone, those that join in the leaf, and whether it is in its parent's pids.

    A nested container needs an intermediate: the launcher clones it into the parent's PID namespace, it enters the
    parent's other namespaces, clones the leaf as a child *of the launcher* (CLONE_PARENT) and leaves. It shares the
    launcher's descriptors (CLONE_FILES), so the leaf's pidfd lands there; its memory is a copy, so the number of
    that pidfd goes to a page which is shared. A confined launcher cannot step into the PID namespace and back, so there
    one more intermediate does: it enters, clones the one that then is inside, and waits for it; the leaf, whose parent
    it is for a moment, passes to the launcher, a subreaper, when it leaves.
    """
    flags, join_mid, join_leaf = 0, 0, 0
    host_mount = enter_pid = False
    cgroup: int | None = None
    clone_step = join_step = 0
    for index, step in enumerate(steps):
        if step.kind == "clone":
            clone_step = index
            for name in step.args["namespaces"]:
                flags |= c.NAMESPACE_FLAGS[name]
        elif step.kind == "join":
            join_step = index
            if step.args["of"] == "host":
                host_mount = host_mount or "mount" in step.args["namespaces"]
                continue
            for name in step.args["namespaces"]:
                if name == "pid":
                    enter_pid = True
                elif name == "mount":
                    join_leaf |= c.CLONE_NEWNS
                else:
                    join_mid |= c.NAMESPACE_FLAGS[name]
        elif step.kind == "into_cgroup":
            cgroup = len(fds)
            fds.append(int(step.args["fd"]))
    nested = bool(join_mid or join_leaf or enter_pid)
    before: list[tuple[t.Fragment, int]] = []
    if nested:
        mid = t.Fragment()
        arguments = _CLONE_ARGS.pack(c.CLONE_FILES | c.CLONE_CLEAR_SIGHAND, 0, 0, 0, _SIGCHLD, 0, 0, 0, 0, 0, 0)
        # Not Data, which would share its bytes with the next clone's: linking may change those of the first one.
        mid.row("clone3", t.Pointers(arguments, ()), _CLONE_ARGS.size, flags=t.RETURN_IF_ANY)
        if enter_pid and confined:
            mid.row("setns", t.Special("parent"), c.CLONE_NEWPID)
            mid.row("clone3", t.Data(arguments), _CLONE_ARGS.size, out=t.Slot(1), flags=t.JUMP_IF_ZERO, skip=2)
            mid.row("wait4", t.Slot(1), 0, c.WALL, 0)
            mid.row("exit_group", 0)
        if join_mid:
            mid.row("setns", t.Special("parent"), join_mid)
        before.append((mid, join_step))
    leaf = t.Fragment()
    flags |= c.CLONE_PIDFD | c.CLONE_CLEAR_SIGHAND | (c.CLONE_PARENT if nested else 0)
    flags |= c.CLONE_INTO_CGROUP if cgroup is not None else 0
    # CLONE_PARENT takes the exit signal of the intermediate: naming one is EINVAL.
    arguments = _CLONE_ARGS.pack(flags, 0, 0, 0, 0 if nested else _SIGCHLD, 0, 0, 0, 0, 0, 0)
    words: list[tuple[int, Any]] = [(8, t.Special("pidfd_slot"))]
    if cgroup is not None:
        words.append((80, t.Passed(cgroup)))
    leaf.row(
        "clone3", t.Pointers(arguments, tuple(words)), _CLONE_ARGS.size, flags=t.LEAVE_IF_PARENT if nested else t.RETURN_IF_ANY
    )
    before.append((leaf, clone_step))
    after: list[tuple[t.Fragment, int]] = []
    if join_leaf or host_mount:
        joins = t.Fragment()
        if host_mount:
            joins.row("setns", t.Special("host_mount"), c.CLONE_NEWNS)
        if join_leaf:
            joins.row("setns", t.Special("parent"), join_leaf)
        after.append((joins, join_step))
    return before, after, enter_pid


def spoil(compiled: Compiled, request: StageRequest) -> t.Table:
    """The table in which the row fails that a test's request names; LaunchError if there is none."""
    assert request.fault is not None
    kind, number = request.fault
    count = len(request.steps) if kind == "step" else len(compiled.row_steps)
    if not 1 <= number <= count:
        raise LaunchError(f"there is no {kind} {number} to fail", id=request.container_id, have=str(count), need=f"1 to {count}")
    if kind == "row":
        return t.spoiled(compiled.table, number - 1)
    # A step without rows of its own is an argument of the clone.
    steps = compiled.row_steps
    return t.spoiled(compiled.table, steps.index(number - 1) if number - 1 in steps else compiled.table.entry - 1)
