"""The audit: the ledger compared with the machine, both ways.

What lives here: the comparison and its answer. What must not: reading the machine (`sightings` and the looks beside it), the
ledger's side (`claims`), undoing (`repair`).

    leftover    there, and ours by proof, and its owner is not alive: an entry of the ledger of one that is dead or parked, born of
                our launcher and in no container, or empty and in a place where nobody else makes anything
    missing     not there, and the ledger says it has to be
    strangers   there, called or placed like ours, and nothing proves it: said, never touched

Theory: the ledger and the machine cannot be looked at in one moment, so what the looks find is only suspicion. Each suspicion is
judged at the end, alone and in one step, by what is so then: how its owner stands, whether the thing is still there. What somebody
is working on at that moment is no finding. Everything before that is done in pieces, since others wait for this thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import trio

from mesocosm.kernel.contracts import EffectKind, SlowEffectKind
from mesocosm.kernel.core.plan import Undo
from mesocosm.kernel.runtime.claims import SHARED, Claim, Claims, Standing, recorded_host, standing
from mesocosm.kernel.runtime.ledger import HOST
from mesocosm.kernel.runtime.patience import HOOK_SECONDS, Patience, blamed
from mesocosm.kernel.runtime.sightings import Scene, Sighting
from mesocosm.kernel.runtime.undoing import Entry
from mesocosm.kernel.runtime.world import World

log = logging.getLogger("mesocosm.audit")
PIECE = 0.002  # seconds of work between two chances for others
_BY_TARGET = frozenset(
    {"directory", "log", "mount_tree", "view"}
)  # kinds of our own whose places are looked at by `sightings.files`
_MOST = 100_000  # answers of one `find`: beyond it there is no end of them
_SHOWN = 5_000  # findings of one class in an answer
_END: Any = object()
Kind = EffectKind | SlowEffectKind


class Finding(NamedTuple):
    """One line of the answer, and how it could be undone."""

    verdict: str  # leftover, missing, strangers
    sighting: Sighting
    owner: str | None
    note: str
    undo: tuple[Undo, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """X of the contract, and why."""
        owner = SHARED if self.owner == HOST else self.owner
        return {"kind": self.sighting.kind, "target": _text(self.sighting.target), "ledger": owner, "note": _text(self.note)}


async def audit(world: World, *, repair: bool = False) -> dict[str, Any]:
    """AUDIT's answer: leftover, missing, strangers, and in `notes` what could not be looked at. With `repair`, after it."""
    from mesocosm.kernel.runtime.repair import undo_findings

    async with world.auditing:
        findings, notes = await _compare(world)
        done: list[Finding] = []
        if repair and any(found.verdict == "leftover" for found in findings):
            done, why = await undo_findings(world, findings)
            findings, notes = await _compare(world)
            notes += why
    return _answer(findings, notes, done if repair else None)


async def _compare(world: World) -> tuple[list[Finding], list[str]]:
    turns = Turns()
    claims = Claims()
    scene = Scene(world, claims)
    async for _ in turns.pieces(claims.collect(world)):
        pass
    sightings: list[Sighting] = []
    for look in world.machine.looks():
        try:
            async for sighting in turns.pieces(look(scene)):
                if sighting is not None:
                    sightings.append(sighting)
        except Exception as error:
            log.exception("a look at the machine failed")
            scene.note(f"{look.__name__} could not be looked at: {type(error).__name__}: {error}")
    found = Found(world, scene, turns)
    await found.look()
    sightings += found.unclaimed()
    findings: dict[str, Finding] = {}
    for sighting in sightings:
        await turns.turn()
        if (finding := judge(scene, sighting)) is not None:
            findings.setdefault(sighting.target, finding)
    missing = await found.missing()
    return [*findings.values(), *missing], scene.notes


class Turns:
    """Lets others have their turn whenever enough has been done."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    async def turn(self) -> None:
        """A chance for others, if it is time."""
        if time.perf_counter() - self._since > PIECE:
            await trio.lowlevel.checkpoint()
            self._since = time.perf_counter()

    async def pieces(self, steps: Iterator[Any]) -> Any:
        """What a generator yields, with chances for others in between."""
        for step in steps:
            yield step
            await self.turn()


class Found:
    """What the kinds of effects themselves find, and what is not among it."""

    def __init__(self, world: World, scene: Scene, turns: Turns) -> None:
        self._world, self._scene, self._turns = world, scene, turns
        self._targets: dict[str, set[str]] = {}
        self._blind: set[str] = set()  # kinds that did not answer

    async def look(self) -> None:
        """Asks every kind for what is below the places where this agent makes things."""
        for name, kind in self._world.kinds.items():
            found = self._targets.setdefault(name, set())
            if name in _BY_TARGET:
                continue
            for place in {*self._scene.places, *self._scene.claims.tops.get(name, ())}:
                if not await self._ask(name, kind, place, found):
                    break

    async def _ask(self, name: str, kind: Kind, prefix: str, found: set[str], wanted: Iterable[str] = ()) -> bool:
        """Adds what `find` answers, up to the first of `wanted`; False, and a note that names the plug-in, if it does not."""
        end = frozenset(wanted)
        answers = None
        for _ in range(_MOST):
            try:
                with Patience(HOOK_SECONDS):
                    answers = iter(kind.find(prefix)) if answers is None else answers
                    target = next(answers, _END)
                if target is not _END and type(target) is not str:
                    raise TypeError(f"it answers targets, which are text, not {type(target).__name__}")
            except BaseException as error:  # as patience.ask: whatever it is, it is that plug-in's trouble
                problem = blamed(error, _plugin(kind), f"find of the effect kind {name!r}")
                self._blind.add(name)
                self._scene.note(f"what there is of kind {name} is not known: {problem.message}")
                return False
            if target is _END:
                return True
            found.add(target)
            if target in end:
                return True
            await self._turns.turn()
        self._blind.add(name)
        self._scene.note(f"what there is of kind {name} is not known: find() of {_plugin(kind)} does not end")
        return False

    def unclaimed(self) -> Iterator[Sighting]:
        """What kinds have found and nobody else has seen."""
        claims = self._scene.claims
        groups = [f"/mesocosm-{self._world.host.run_id}/"]
        for name, targets in self._targets.items():
            for target in targets:
                if claims.covering(target) is None and not any(group in target for group in groups):
                    kind = self._world.kinds[name]
                    still = _still(kind, target)
                    yield Sighting(name, target, f"found by the effect kind {name}; the ledger has no entry for it", still=still)
                elif (claim := claims.by_target.get(target)) is not None and not claim.due:
                    yield Sighting(name, target, "", owner=claim.container, still=_still(self._world.kinds[name], target))

    async def missing(self) -> list[Finding]:
        """Entries of which nothing is there, though it has to be."""
        lacking: list[Finding] = []
        for container, entry in self._scene.claims.entries:
            await self._turns.turn()
            targets = {target for _, target in entry.undo}
            if not targets or targets & self._targets.get(entry.kind, set()) or entry.kind in self._blind:
                continue
            kind = self._world.kinds.get(entry.kind)
            if kind is None:
                self._scene.note(
                    f"nobody here knows effects of kind {entry.kind}: what {container or SHARED} has of it is not looked at"
                )
                continue
            if await self._is_there(entry.kind, kind, targets) or entry.kind in self._blind or not self._is_due(container, entry):
                continue
            target = min(targets)
            note = "shared by all containers" if container == HOST else f"{container} is {self._world.tree.state(container)}"
            lacking.append(Finding("missing", Sighting(entry.kind, target, note), container, note))
        return lacking

    async def _is_there(self, name: str, kind: Kind, targets: set[str]) -> bool:
        for target in sorted(targets):
            found: set[str] = set()
            await self._ask(name, kind, target, found, targets)
            if targets & found:
                return True
        return False

    def _is_due(self, container: str, entry: Entry) -> bool:
        if standing(self._world, container) not in (Standing.LIVING, Standing.DEAD):
            return False
        if container == HOST:
            return entry in recorded_host(self._world)
        return entry in self._world.cells[container].entries


def judge(scene: Scene, sighting: Sighting) -> Finding | None:
    """What one sighting comes to, at this moment; None for what is as it should be, gone, or being worked on."""
    world = scene.world
    claim = scene.claims.now(world, sighting.target)
    owner = claim.container if claim is not None else sighting.owner
    state = standing(world, owner) if owner is not None else Standing.UNKNOWN
    if state is Standing.MOVING and not (owner == HOST and _is_parked(claim)):
        return None
    verdict = "strangers"
    if state is Standing.LIVING:
        if not sighting.alien and (claim is None or claim.due or not _is_parked(claim)):
            return None
    elif claim is not None and claim.due:
        return None  # kept
    elif (_is_parked(claim) or state is Standing.DEAD or sighting.proven) and not sighting.alien:
        verdict = "leftover"
    if not sighting.still():
        return None
    if claim is not None:
        sighting = sighting._replace(kind=claim.kind)
    undo = claim.undo if claim is not None and claim.undo else sighting.undo
    if not _is_parked(claim):  # who stands there and is proven ours is a finding of its own, and the others are not ours to end
        undo = tuple(each for each in undo if each.verb != "kill_cgroup")
    return Finding(verdict, sighting, owner, _why(claim, state, sighting, owner), undo if verdict == "leftover" else ())


def _is_parked(claim: Claim | None) -> bool:
    return claim is not None and claim.parked is not None


def _why(claim: Claim | None, state: Standing, sighting: Sighting, owner: str | None) -> str:
    if claim is not None and claim.parked is not None:
        return f"parked: {claim.parked}"
    known = f"{owner} is dead" if state is Standing.DEAD and owner is not None and owner not in sighting.note else ""
    return "; ".join(part for part in (known, sighting.note) if part)


def _still(kind: Kind, target: str) -> Any:
    def look() -> bool:
        try:
            with Patience(HOOK_SECONDS):
                return target in kind.find(target)
        except BaseException:  # it was named before
            return False

    return look


def _plugin(kind: Kind) -> str:
    """Whose code that is: the module's own name."""
    return type(kind).__module__.removeprefix("mesocosm.plugins.").removeprefix("mesocosm.kernel.")


def _text(words: str) -> str:
    """A name of the machine's as text that can be sent: bytes that are none are written out."""
    return words.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _answer(findings: Iterable[Finding], notes: list[str], repaired: Iterable[Finding] | None) -> dict[str, Any]:
    lists: dict[str, list[dict[str, Any]]] = {"leftover": [], "missing": [], "strangers": []}
    for finding in findings:
        lists[finding.verdict].append(finding.as_data())
    for verdict, lines in lists.items():
        if len(lines) > _SHOWN:
            notes = [*notes, f"{verdict}: {len(lines) - _SHOWN} more"]
            del lines[_SHOWN:]
    answer: dict[str, Any] = {**lists, "notes": [_text(note) for note in dict.fromkeys(notes)]}
    if repaired is not None:
        answer["repaired"] = [finding.as_data() for finding in repaired]
    return answer
