"""What is said about containers that have been: the lines of `history`, and why one that is long gone ended as it did.

What lives here: rows of the durable history as plain data. What must not: writing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mesocosm.kernel.core.errors import ConflictError, NotFoundError, UnsupportedError
from mesocosm.kernel.core.plan import plan_as_data
from mesocosm.kernel.runtime import chain, codec, status
from mesocosm.kernel.runtime.annals import Annals, AnnalsError, Line
from mesocosm.kernel.runtime.recording import Recorder
from mesocosm.kernel.runtime.world import World

MOST = 500  # lines in one answer


async def history(world: World, within: str | None, bounds: Mapping[str, Any]) -> dict[str, Any]:
    """{"history": lines, "next", "notes", "durable"}: what has been, up to now. `durable`: up to this event all of it is on disk,
    so it will be told again, whatever happens to the machine. UnsupportedError where no history is kept."""
    recorder = _recorder(world)
    answer: dict[str, Any] = await _ask(world, lambda annals: page(annals, within, **bounds))
    return {**answer, "notes": [*answer["notes"], *complaints(recorder)], "durable": recorder.cursor}


async def explain(world: World, container_id: str, life: int | None) -> dict[str, Any]:
    """As `status.explanation`, of one that is gone; NotFoundError if nobody remembers it."""
    if world.history is None:
        return status.explanation(world, container_id)
    answer: dict[str, Any] = await _ask(world, lambda annals: explanation(annals, container_id, life))
    return answer


def _recorder(world: World) -> Recorder:
    if world.history is None:
        raise UnsupportedError("this agent keeps no history", hint="it has no directory for durable state")
    return world.history


async def _ask(world: World, query: Callable[[Annals], Any]) -> Any:
    recorder = _recorder(world)
    world.ledger.flush()
    answers: list[Any] = []
    try:
        await recorder.beside(lambda: answers.append(recorder.read(query)))
    except AnnalsError as error:
        hint = "what runs, and what ended lately, is known all the same: meso ps -a"
        raise ConflictError(str(error), target=recorder.path, hint=hint) from error
    return answers[0]


def describe(annals: Annals, line: Line) -> dict[str, Any]:
    """One life as a line of `history`."""
    group = annals.group(line.grp)
    return {
        "id": line.id,
        "life": line.life,
        "group": group.id if group else line.id.partition(".")[0],
        "state": line.state,
        "planned": line.planned,
        "started": line.started,
        "ended": line.ended,
        "wait": _unpack(line.wait),
        "error": _unpack(line.error),
    }


def page(
    annals: Annals,
    within: str | None,
    *,
    at: float | None = None,
    since: float | None = None,
    cursor: int | None = None,
    limit: int = 100,
) -> dict[str, Any]:
    """{"history": lines, "next": what to go on with or None, "notes"}: of a moment oldest first, else latest first."""
    limit = max(1, min(limit, MOST))
    notes, following = forgotten(annals, at if at is not None else since), None
    if at is not None:
        found = annals.at(at, within, cursor or 0, limit + 1)
        lines = [{**describe(annals, line), "state": state, **_until(line, at)} for line, state in found[:limit]]
        following = found[limit - 1][0].key if len(found) > limit else None
    else:
        rows = annals.page(within, cursor, since, limit + 1)
        lines = [describe(annals, line) for line in rows[:limit]]
        following = rows[limit - 1].key if len(rows) > limit else None
    return {"history": lines, "next": following, "notes": notes}


def _until(line: Line, at: float) -> dict[str, Any]:
    """Of a moment nothing is told that came later."""
    later = {"wait": None, "error": None} if line.ended is None or line.ended > at else {}
    return {**later, **({"started": None} if line.started is not None and line.started > at else {})}


def forgotten(annals: Annals, moment: float | None) -> list[str]:
    """What is missing, in words, if what is asked for reaches back that far."""
    notes = []
    until, count = annals.meta("forgotten_until"), annals.meta("forgotten")
    if until is not None and (moment is None or moment <= float(until)):
        notes.append(f"{count} older ones have been forgotten, the last of which ended at {float(until):.0f}")
    if lost := annals.meta("lost"):
        notes.append(f"{lost} lines of the event log were forgotten before they could be copied: something may be missing")
    return notes


def complaints(recorder: Recorder) -> list[str]:
    """What is wrong with the history itself."""
    notes = [f"set aside: {words}" for words in recorder.set_aside]
    if recorder.trouble is not None:
        notes.append(f"nothing newer can be written ({recorder.failures} attempts failed): {recorder.trouble}")
    return notes


def explanation(annals: Annals, container_id: str, life: int | None) -> dict[str, Any]:
    """As `status.explanation`, of one that has been; NotFoundError if nobody remembers it."""
    line = annals.find(container_id, life)
    if line is None:
        latest = None if life is None else annals.find(container_id, None)
        if latest is not None:
            have, hint = f"{latest.life} is the latest", f"meso history {container_id} lists them"
            raise NotFoundError(f"{container_id!r} has no life {life}", id=container_id, have=have, hint=hint)
        hint = "meso history lists what is"
        raise NotFoundError(f"no container {container_id!r}, and none is remembered", id=container_id, hint=hint)
    record = _record(annals, line)
    members = {member.id: member for member in annals.members(line.grp)}

    def find(other: str) -> dict[str, Any] | None:
        found = members.get(other) or _around(annals, other, line)
        return None if found is None else _record(annals, found)

    plan = annals.read_text(line.plan, container_id)
    return {
        **{key: value for key, value in record.items() if key != "own_error"},
        **{key: value for key, value in describe(annals, line).items() if key in ("life", "planned", "started", "ended")},
        "lives": annals.life(container_id),
        "plan": plan_as_data(codec.unpack_plan(plan)) if plan else None,
        "parked": [],
        "changes": [{"time": change.time, "state": change.state} for change in annals.changes(line.key)],
        "chain": chain.make(record, find),
    }


def _around(annals: Annals, container_id: str, line: Line) -> Line | None:
    """The life of another id during which `line` was born: the parent of a nested group is none of its members."""
    life: int | None = None
    while (found := annals.find(container_id, life)) is not None and found.born > line.born and found.life > 1:
        life = found.life - 1
    return found


def _record(annals: Annals, line: Line) -> dict[str, Any]:
    group = annals.group(line.grp)
    wait = _unpack(line.wait)
    error = _unpack(group.error) if group else None
    return {
        "id": line.id,
        "state": line.state,
        "wait": wait,
        "error": _unpack(line.error) or error,
        "own_error": _unpack(line.error),
        "group": {
            "id": group.id if group else line.id, "state": group.state if group else line.state, "error": error,
            "exit": group.exit if group else None, "blame": group.blame if group else None,
        },
        "reason": (wait or {}).get("reason"),
    }  # fmt: skip


def _unpack(blob: bytes | None) -> Any:
    return None if blob is None else codec.unpack(blob)
