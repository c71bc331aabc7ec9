"""Carrying effects out: which runs they form, how one is made, what goes wrong with it.

What lives here: the call of a kind's `do` with resolved arguments, quick or awaited, and the words of its failure.
What must not: the ledger (the entry has been written before anything here is called) and undoing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import trio

from mesocosm.kernel.contracts import Descriptor, EffectContext, EffectKind, SlowEffectKind
from mesocosm.kernel.core.errors import InternalError, MesoError, UnknownOutcomeError, UnsupportedError, from_oserror
from mesocosm.kernel.core.plan import ContainerPlan, Effect, Fact, resolve
from mesocosm.kernel.core.transaction import Run

Kinds = Mapping[str, EffectKind | SlowEffectKind]
Facts = list[Mapping[str, Any]]


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
        if getattr(kinds.get(effect.kind), "deadline", None) is None:
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


def _facts_in(value: Any) -> list[int]:
    if type(value) is Fact:
        return [value.index]
    if isinstance(value, Mapping):
        return [found for item in value.values() for found in _facts_in(item)]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _facts_in(item)]
    return []


def check_kinds(plan: ContainerPlan, kinds: Kinds) -> None:
    """UnsupportedError for the first effect of a kind that nobody has registered."""
    for effect in plan.effects:
        if effect.kind not in kinds:
            raise UnsupportedError(
                f"nobody can make effects of kind {effect.kind!r}",
                id=plan.id,
                plugin=effect.plugin,
                need=effect.kind,
                hint="the plug-in that makes it is not in this set; see meso plugins",
            )


def do_quick(kind: EffectKind, effect: Effect, index: int, context: EffectContext, facts: Facts, grants: Mapping[str, Any]) -> None:
    """Makes one quick effect; its facts take their place in `facts`. MesoError with plug-in, step and container."""
    try:
        facts[index] = kind.do(resolve(effect.args, facts, grants), context)
    except Exception as error:
        raise failure(error, effect, index, context.container_id) from error


async def do_slow(
    kind: SlowEffectKind, effect: Effect, index: int, context: EffectContext, facts: Facts, grants: Mapping[str, Any]
) -> None:
    """Awaits one slow effect within its deadline; UnknownOutcomeError when that passes."""
    try:
        with trio.fail_after(kind.deadline):
            answer: Awaitable[Mapping[str, Any]] = kind.do(resolve(effect.args, facts, grants), context)
            facts[index] = await answer
    except trio.TooSlowError:
        raise failure(
            UnknownOutcomeError(
                f"no answer within {kind.deadline:g} s: it may have happened", hint="it is being undone; try again when it answers"
            ),
            effect, index, context.container_id,
        ) from None  # fmt: skip
    except Exception as error:
        raise failure(error, effect, index, context.container_id) from error


def failure(error: Exception, effect: Effect, index: int, container_id: str) -> MesoError:
    """Any exception out of an effect kind as an error that says which effect of whom it was."""
    where = {"id": container_id, "plugin": effect.plugin, "step": {"index": index, "stage": "effect", "kind": effect.kind}}
    if isinstance(error, MesoError):
        return error.with_fields(**where)
    if isinstance(error, OSError):
        target = str(error.filename) if error.filename else _target(effect)
        return from_oserror(error, syscall=getattr(error, "syscall", None), doing=effect.kind, target=target, **where)
    return InternalError(f"{type(error).__name__}: {error}", hint="a bug of this plug-in: please report it to its author", **where)


def _target(effect: Effect) -> str | None:
    found = effect.args.get("path") or effect.args.get("source")
    return str(found) if isinstance(found, str) else None


def descriptors(facts: Facts) -> list[int]:
    """The open descriptors among facts."""
    return [value for fact in facts for value in fact.values() if type(value) is Descriptor]
