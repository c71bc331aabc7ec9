"""Slow effects on their way: within their deadline, and given up when nobody wants them any more, even if they do not stop.

Theory: a kill must win over whatever a plug-in does, and a task that shields itself, or swallows its cancellation, would make
whoever waits for it wait for ever. So nobody waits for it directly: it runs in a task of the agent's, is told to stop, has
some last words, and is left behind if it goes on. What it makes then is undone once it is through; until that, its container's
id is not given to anybody else (`World.strays`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import trio

from mesocosm.kernel.contracts import Effect, EffectContext, SlowEffectKind
from mesocosm.kernel.core.errors import ConflictError, InternalError, UnknownOutcomeError
from mesocosm.kernel.core.plan import resolve
from mesocosm.kernel.runtime import effects
from mesocosm.kernel.runtime.undoing import Entry, undo_one
from mesocosm.kernel.runtime.world import World

log = logging.getLogger("mesocosm.errands")
LAST_WORDS = 2.0  # seconds between being told to stop and being left behind


async def do_slow(
    world: World,
    kind: SlowEffectKind,
    effect: Effect,
    index: int,
    context: EffectContext,
    facts: effects.Facts,
    grants: Mapping[str, Any],
) -> None:
    """Makes one slow effect; its facts take their place in `facts`. UnknownOutcomeError when its deadline has passed."""
    assert world.nursery is not None
    errand = _Errand(world, kind, effect, index, context, facts)
    try:
        world.nursery.start_soon(errand.run, resolve(effect.args, facts, grants))
        with trio.fail_after(kind.deadline):
            await errand.over()
    except trio.TooSlowError:
        hint = "it is being undone; try again when it answers"
        late = UnknownOutcomeError(f"no answer within {kind.deadline:g} s: it may have happened", hint=hint)
        raise effects.failure(late, effect, index, context.container_id) from None
    except Exception as error:
        raise effects.failure(error, effect, index, context.container_id) from error


class _Errand:
    """One call of a slow kind's `do`."""

    def __init__(
        self, world: World, kind: SlowEffectKind, effect: Effect, index: int, context: EffectContext, facts: effects.Facts
    ) -> None:
        self._world, self._kind, self._effect, self._index = world, kind, effect, index
        self._context, self._facts = context, facts
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._error: Exception | None = None
        self._is_left = False

    async def run(self, args: dict[str, Any]) -> None:
        """The task. It ends when `do` does, whoever still waits for that."""
        found: Mapping[str, Any] = {}
        try:
            with self._scope:
                found = effects.checked(await self._kind.do(args, self._context))
        except BaseException as error:
            if isinstance(error, trio.Cancelled) or (isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled)):
                raise
            # It must not end more than its own launch, whatever it is.
            self._error = error if isinstance(error, Exception) else InternalError(f"{type(error).__name__}: {error}")
        finally:
            self._facts[self._index] = found
            self._ended.set()
        if self._is_left:
            await self._tidy_up()

    async def over(self) -> None:
        """Returns when it is through; raises what it raised. Cancelled, it is told to stop, and left behind if it does not."""
        try:
            await self._ended.wait()
        finally:
            if not self._ended.is_set():
                self._scope.cancel()
                with trio.CancelScope(shield=True), trio.move_on_after(LAST_WORDS):
                    await self._ended.wait()
            if not self._ended.is_set():
                self._leave()
        if self._error is not None:
            raise self._error
        if self._scope.cancelled_caught:  # by nobody here: the plug-in has made off with our scope
            raise InternalError("it stopped without having been told to")

    def _leave(self) -> None:
        self._is_left = True
        container_id = self._context.container_id
        self._world.strays.setdefault(container_id, []).append(self._effect.plugin)
        what = f"effect {self._index} ({self._effect.kind})"
        log.warning("%s: %s of plug-in %s does not stop: left behind", container_id, what, self._effect.plugin)

    async def _tidy_up(self) -> None:
        """Whoever wanted it has gone, and has undone what there was then."""
        world, effect, container_id = self._world, self._effect, self._context.container_id
        effects.close(world.machine, [self._facts[self._index]])
        is_anothers = isinstance(self._error, ConflictError)  # what is there: it stays
        note = None if is_anothers else await undo_one(world.machine, effect.undo)
        if note is not None:
            with world.ledger as ledger:
                ledger.park(container_id, Entry(self._index, effect.kind, effect.undo, effect.keep), note)
            world.parked.set()
        world.strays[container_id].remove(effect.plugin)
        if not world.strays[container_id]:
            del world.strays[container_id]
