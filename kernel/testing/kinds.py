"""What every kind of effects must keep, as a test class to inherit from: what `do` makes, `find` finds, until it is undone.

What lives here: the contract of an EffectKind on a real machine, since that is the only code of a plug-in that touches one. What
isolators keep while planning is in `contracts`. An audit believes `find`: a kind that does not find what it has made is
reported as missing all that it made, and one that finds too much as full of strangers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Mapping
from typing import Any

import pytest
import trio

from mesocosm.kernel.contracts import Descriptor, Effect, EffectContext, EffectKind, HostFacts, SlowEffectKind
from mesocosm.kernel.runtime.undo import VERBS, Attempt

_PATIENCE = 10.0  # seconds for an undo that is busy
_CONTEXT = EffectContext(HostFacts(), "contract")


async def _awaited(answer: Awaitable[Mapping[str, Any]], deadline: float) -> Mapping[str, Any]:
    with trio.fail_after(deadline):
        return await answer


class EffectKindContract:
    """Inherit, and override the two fixtures `kind` and `effect`."""

    @pytest.fixture
    def kind(self) -> EffectKind | SlowEffectKind:
        """The kind under test."""
        raise NotImplementedError("override the fixture `kind`")

    @pytest.fixture
    def effect(self) -> Effect:
        """An effect that can be made on this machine, with its arguments resolved and the undo that its plans record."""
        raise NotImplementedError("override the fixture `effect`")

    def test_what_is_made_is_found_until_it_is_undone(self, kind: Any, effect: Effect) -> None:
        targets = {target for _, target in effect.undo}
        assert targets, "without an undo there is no entry in the ledger, and nothing to find"
        assert not any(self.finds(kind, target) for target in targets), "it is there before it is made"
        try:
            for _ in range(2):  # again after a crash: it finds its own half-made things and goes on from there
                self.make(kind, effect)
                assert all(self.finds(kind, target) for target in targets)
        finally:
            self.undo(effect)
        assert not any(self.finds(kind, target) for target in targets)

    def finds(self, kind: Any, target: str) -> bool:
        """Whether it is found at its own place, as the first, and below the place around it; both must say the same."""
        at = next(iter(kind.find(target)), None) == target
        below = target in kind.find(os.path.dirname(target))
        assert at == below, f"find({target!r}) and find({os.path.dirname(target)!r}) do not agree"
        return at

    def test_it_looks_as_it_is_asked(self, kind: Any, effect: Effect) -> None:
        """An audit takes a few answers at a time, and lets others have their turn: a list of all would hold them up."""
        found = kind.find(os.path.dirname(effect.undo[0].target))
        assert iter(found) is found, "find() answers an iterator: make it a generator"

    def test_where_nothing_is_there_is_nothing_found(self, kind: Any, effect: Effect) -> None:
        assert list(kind.find("/nonexistent/mesocosm")) == []

    def make(self, kind: EffectKind | SlowEffectKind, effect: Effect) -> Mapping[str, Any]:
        """Makes it; what it has opened is closed."""
        answer: Any = kind.do(effect.args, _CONTEXT)
        facts: Mapping[str, Any] = trio.run(_awaited, answer, kind.deadline) if isinstance(kind, SlowEffectKind) else answer
        for value in facts.values():
            if type(value) is Descriptor:
                os.close(value)
        return facts

    def undo(self, effect: Effect) -> None:
        """Undoes it as the ledger would."""
        for verb, target in effect.undo:
            deadline = time.monotonic() + _PATIENCE
            while VERBS[verb](target) is not Attempt.GONE:
                assert time.monotonic() < deadline, f"{verb} {target}: still busy"
                time.sleep(0.01)
