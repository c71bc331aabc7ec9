"""Repairing what an audit found: undoing what is proven ours and whose owner is dead. Nothing else.

What lives here: the undoing of findings, each attempt with its own look at who lives. What must not: deciding what is a leftover
(`audit`). Theory: an undo may take a second (a group that is busy), and in a second somebody may be launched by the same name. So
before each attempt it is asked again, in one step with it, whether anybody lives or is being made there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from mesocosm.kernel.runtime import parking
from mesocosm.kernel.runtime.claims import is_free, recorded_host
from mesocosm.kernel.runtime.undo import Attempt
from mesocosm.kernel.runtime.world import World

if TYPE_CHECKING:
    from mesocosm.kernel.runtime.audit import Finding

_TRIES = 100
_PAUSE = 0.02  # seconds between two tries of something that is busy


async def undo_findings(world: World, findings: Sequence[Finding]) -> tuple[list[Finding], list[str]]:
    """Undoes the leftovers; what was undone, and why the others were not.

    First what is parked, in the ledger's own way. Then processes, which stand in what is undone next; then all else, the innermost
    first.
    """
    await parking.retry_now(world)
    done: list[Finding] = []
    why: list[str] = []
    leftovers = [found for found in findings if found.verdict == "leftover"]
    order = [found for found in leftovers if found.sighting.end is not None]
    order += sorted((found for found in leftovers if found.sighting.end is None), key=lambda found: -len(found.sighting.target))
    for found in order:
        note = await _undo(world, found)
        if note is None:
            done.append(found)
        else:
            why.append(f"{found.sighting.kind} {found.sighting.target} was not undone: {note}")
        await trio.lowlevel.checkpoint()
    return done, why


async def _undo(world: World, found: Finding) -> str | None:
    sighting = found.sighting
    if not sighting.still():
        return None
    try:
        if sighting.end is not None:
            return await _end(world, found)
        if not found.undo:
            return "there is no way to undo it from here"
        for verb, target in found.undo:
            tries = 0
            while True:
                if not _nobody_lives(world, found):
                    return "somebody lives there by now"
                machine = world.machine
                attempt = await machine.undo_outside(verb, target) if machine.may_wait(target) else machine.undo(verb, target)
                if attempt is Attempt.GONE:
                    break
                tries += attempt is Attempt.BUSY
                if tries > _TRIES:
                    return f"{verb} {target}: still in use by {await world.machine.holders(verb, target) or 'somebody'}"
                await trio.sleep(_PAUSE if attempt is Attempt.BUSY else 0)
    except OSError as error:
        return str(error)
    return None


async def _end(world: World, found: Finding) -> str | None:
    """A process: told to end, and waited for."""
    assert found.sighting.end is not None
    if found.owner is not None and not is_free(world, found.owner):  # nobody's: `still` has asked for all that could have it
        return "its container lives by now"
    try:
        found.sighting.end()
    except ProcessLookupError:
        return None
    for _ in range(_TRIES):
        if not found.sighting.still():
            return None
        await trio.sleep(_PAUSE)
    return "it was killed, and has not ended"


def _nobody_lives(world: World, found: Finding) -> bool:
    """Of what is no single container's (the group of this run): that nobody lives or is on the way, and the ledger has no claim."""
    if found.owner is not None:
        return is_free(world, found.owner)
    if world.living or any(group.launch is not None for group in world.groups.values()):
        return False
    return not any(target == found.sighting.target for entry in recorded_host(world) for _, target in entry.undo)
