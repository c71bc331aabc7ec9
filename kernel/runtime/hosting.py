"""Host effects: what all containers of an agent share, made before the first and undone after the last.

They have ledger entries without a container. An agent that finds entries of an earlier one makes them again (kinds
find their own half-made things), so that it has what it needs in whatever state the other left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import msgpack
import trio

from mesocosm.kernel.contracts import EffectContext, EffectKind, SlowEffectKind
from mesocosm.kernel.core.errors import ConflictError, DyingError
from mesocosm.kernel.core.plan import Effect
from mesocosm.kernel.runtime import codec, effects
from mesocosm.kernel.runtime.errands import do_slow
from mesocosm.kernel.runtime.ledger import HOST
from mesocosm.kernel.runtime.patience import Patience
from mesocosm.kernel.runtime.proof import HostProof
from mesocosm.kernel.runtime.undoing import Entry, undo_entries
from mesocosm.kernel.runtime.world import World

_SHOWN_AS = "host"  # the container that an error about a host effect names


class HostEffects:
    """Makes them once, at the first launch; a failure refuses that launch, and the next tries again."""

    def __init__(self, world: World, ask: Callable[[], Sequence[Effect]]) -> None:
        self._world = world
        self._ask = ask
        self._wanted: Sequence[Effect] | None = None  # not asked yet
        self._lock = trio.Lock()
        self._launchers = 0  # that there have been after the first
        self.made = False
        self._is_over = False

    async def ensure(self) -> None:
        """Makes all of them, if they are not made; MesoError of the one that fails, or if they are being undone for good."""
        async with self._lock:
            if self._is_over:
                raise DyingError("the agent is ending")
            if self.made:
                return
            launchers = -1
            while launchers != self._launchers:  # some of it has gone while the rest was made
                launchers = self._launchers
                await self._make()
            self.made = True

    async def _make(self) -> None:
        world = self._world
        if self._wanted is None:
            asked = self._ask()
            effects.check(asked, world.kinds, _SHOWN_AS)
            self._wanted = asked
        if not self._wanted:
            return
        wanted = [Entry(position, each.kind, each.undo, keep=True) for position, each in enumerate(self._wanted) if each.undo]
        proof = HostProof(world, _recorded(world), wanted)
        with world.ledger.deciding() as ledger:
            ledger.entries_are(HOST, proof.packed())
            # What an earlier agent could not undo, and is in use again, is nobody's remainder any more.
            again = {codec.pack_entries([entry]) for entry in wanted}
            ledger.drop_parked(row.seq for row in ledger.parked() if row.container == HOST and row.entry in again)
        facts: effects.Facts = [{}] * len(self._wanted)
        context = EffectContext(world.host, _SHOWN_AS)
        try:
            for index, effect in enumerate(self._wanted):
                kind = world.kinds[effect.kind]
                try:
                    if getattr(kind, "deadline", None) is None:
                        with Patience(effects.QUICK_SECONDS):
                            effects.do_quick(cast(EffectKind, kind), effect, index, context, facts, {})
                    else:
                        await do_slow(world, cast(SlowEffectKind, kind), effect, index, context, facts, {})
                except ConflictError:
                    proof.refused(effect.kind, effect.undo)
                    raise
                proof.done(index)
        finally:
            effects.close(world.machine, facts)

    def forget(self) -> None:
        """There is a new launcher: what was made in the old one has gone with it. The next launch makes all of it again."""
        self._launchers += 1
        self.made = False

    async def undo(self) -> None:
        """Undoes all that is recorded, the last first; what cannot be undone is parked. Nothing is made any more."""
        world = self._world
        self._is_over = True
        async with self._lock:
            self.made = False
            left = await undo_entries(world.machine, _recorded(world))
            with world.ledger as ledger:
                ledger.undone([HOST], [(HOST, *each) for each in left])


def _recorded(world: World) -> list[Entry]:
    """What this agent, or one before it, meant to make; nothing, if that cannot be read: making it again finds it."""
    blob = world.ledger.entries().get(HOST)
    try:
        return codec.unpack_entries(blob) if blob else []
    except (ValueError, TypeError, msgpack.UnpackException) as problem:
        world.ledger.note_set_aside(f"entries of the agent: {problem}")
        return []
