"""Carrying effects out: which runs they form, how one is made, what goes wrong with it.

What lives here: the call of a quick kind's `do` with resolved arguments, and the words of a failure.
What must not: the ledger (the entry has been written before anything here is called), undoing, and waiting (`errands`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

from mesocosm.kernel.contracts import Descriptor, EffectContext, EffectKind, SlowEffectKind
from mesocosm.kernel.core.advice import ADVICE
from mesocosm.kernel.core.errors import InternalError, MesoError, UnknownOutcomeError, UnsupportedError, from_oserror
from mesocosm.kernel.core.plan import ContainerPlan, Effect, Fact, Undo, resolve
from mesocosm.kernel.core.transaction import Run
from mesocosm.kernel.runtime.machine import Machine
from mesocosm.kernel.runtime.patience import OvertimeError
from mesocosm.kernel.runtime.undo import VERBS

Kinds = Mapping[str, EffectKind | SlowEffectKind]
Facts = list[Mapping[str, Any]]
QUICK_SECONDS = 30.0  # for an effect that takes less than a millisecond, on a file system that is full of leftovers


def runs_of(effects: Sequence[Effect], kinds: Kinds) -> tuple[Run, ...]:
    """Effects as runs: quick neighbours together, slow ones each alone, beside each other as far as references allow.

    A quick run waits for everything before it. A slow effect waits for the quick ones before it, and for those slow
    ones whose facts it uses.
    """
    runs: list[Run] = []
    quick: list[int] = []  # numbers of the quick runs so far
    start = 0
    run_of: dict[int, int] = {}
    for index, effect in enumerate(effects):
        if effect.kind not in kinds or slow_kind(kinds[effect.kind], effect) is None:
            continue
        if start < index:
            quick.append(len(runs))
            runs.append(Run(start, index, tuple(range(len(runs)))))
        used = {run_of[found] for found in _facts_in(effect.args) if found in run_of}
        run_of[index] = len(runs)
        runs.append(Run(index, index + 1, tuple(sorted({*quick, *used}))))
        start = index + 1
    if start < len(effects):
        runs.append(Run(start, len(effects), tuple(range(len(runs)))))
    return tuple(runs)


def slow_kind(kind: EffectKind | SlowEffectKind, effect: Effect) -> SlowEffectKind | None:
    """Who makes an effect that has to be waited for; None for a quick one. A kind may have another one for its slow cases."""
    # isinstance of a Protocol costs more than most effects do: the deadline tells them apart.
    if getattr(kind, "deadline", None) is not None:
        return cast(SlowEffectKind, kind)
    choose = getattr(kind, "slow", None)
    return None if choose is None else cast("SlowEffectKind | None", choose(effect.args))


def _facts_in(value: Any) -> list[int]:
    if type(value) is Fact:
        return [value.index]
    if isinstance(value, Mapping):
        return [found for item in value.values() for found in _facts_in(item)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _facts_in(item)]
    return []


def check(effects: Sequence[Effect], kinds: Kinds, container_id: str) -> None:
    """UnsupportedError for the first effect that nobody can make, or undo; InternalError for one that is none."""
    for effect in effects:
        kind, where = effect.kind, {"id": container_id, "plugin": effect.plugin}
        if type(kind) is not str or type(effect.args) is not dict or not isinstance(effect.undo, (tuple, list)):
            raise InternalError(f"not an effect: {effect!r}"[:200], hint="a bug of this plug-in: report it to its author", **where)
        if kind not in kinds:
            hint = "the plug-in that makes it is not in this set; see meso plugins"
            raise UnsupportedError(f"nobody can make effects of kind {kind[:80]!r}", need=kind[:80], hint=hint, **where)
        for undo in effect.undo:
            if type(undo) is not Undo or undo.verb not in VERBS or type(undo.target) is not str:
                hint = f"a bug of this plug-in; the verbs are {' '.join(VERBS)}"
                raise UnsupportedError(f"nobody can undo an effect of kind {kind!r} by {undo!r}"[:200], hint=hint, **where)


def do_quick(kind: EffectKind, effect: Effect, index: int, context: EffectContext, facts: Facts, grants: Mapping[str, Any]) -> None:
    """Makes one quick effect, within its caller's patience; its facts take their place in `facts`. MesoError says whose it is."""
    try:
        facts[index] = checked(kind.do(resolve(effect.args, facts, grants), context))
    except BaseException as error:  # as patience.ask
        raise failure(error, effect, index, context.container_id) from error


def checked(found: Any) -> Mapping[str, Any]:
    """What an effect answers, if it is facts at all."""
    if type(found) is not dict and not isinstance(found, Mapping):
        raise TypeError(f"an effect answers facts by name, not {type(found).__name__}")
    return found


def failure(error: BaseException, effect: Effect, index: int, container_id: str) -> MesoError:
    """Any exception out of an effect kind as an error that says which effect of whom it was."""
    where = {"id": container_id, "plugin": effect.plugin, "step": {"index": index, "stage": "effect", "kind": effect.kind}}
    if isinstance(error, MesoError):
        return error.with_fields(**where)
    if isinstance(error, OSError):
        target = str(error.filename) if error.filename else _target(effect)
        return from_oserror(error, syscall=getattr(error, "syscall", None), doing=effect.kind, target=target, **where)
    if isinstance(error, OvertimeError):
        return UnknownOutcomeError(
            f"{error}: it may have happened", hint="it is being undone; a quick effect must not wait", **where
        )
    return InternalError(f"{type(error).__name__}: {error}", hint="a bug of this plug-in: please report it to its author", **where)


def _target(effect: Effect) -> str | None:
    found = effect.args.get("path") or effect.args.get("source")
    return str(found) if isinstance(found, str) else None


def close(machine: Machine, facts: Facts) -> None:
    """Closes the descriptors among facts. One that is not open was never anybody's."""
    for fact in facts:
        for value in fact.values():
            if type(value) is Descriptor:
                with suppress(OSError):
                    machine.close(value)


def unresolved(plan: ContainerPlan, facts: Facts, grants: Mapping[str, Any], error: Exception) -> MesoError:
    """Whose step it is that refers to what nobody found out."""
    for index in plan.referring:
        step = plan.setup[index]
        try:
            resolve(step.args, facts, grants)
        except Exception as own:
            where = {"plugin": step.plugin, "step": {"index": index, "stage": step.stage, "kind": step.kind}}
            return InternalError(f"it refers to what nobody found out: {type(own).__name__}: {own}", id=plan.id, **where)
    return InternalError(f"{type(error).__name__}: {error}", id=plan.id)


def with_limit(machine: Machine, error: MesoError) -> MesoError:
    """The error with the numbers of the limit that it is about, if it is about one; whoever met it did not know that."""
    kind = error.fields.get("step", {}).get("kind", "")
    limit = machine.limit(error.fields.get("errno"), kind)
    if limit is None:
        return error
    have = f"{limit.used} of {limit.most} {limit.of}"
    told = {"have": have, "need": f"room for one more: {limit.name}"}
    if error.fields.get("hint") in (None, *ADVICE.values()):  # nobody closer knew better
        told["hint"] = f"raise {limit.name}, or run fewer at once"
    return type(error)(error.message, **error.fields | told)
