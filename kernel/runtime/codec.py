"""Values as bytes for the ledger, and back.

What lives here: msgspec for plans (whose references must survive) and flat structs, msgpack for the rest. Nothing
decides anything. A blob that does not decode raises LedgerRowError's cause, ValueError: the caller sets the row aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgpack
import msgspec

from mesocosm.kernel.contracts import Wait
from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.errors import InternalError
from mesocosm.kernel.core.plan import ContainerPlan, Effect, Fact, Grant, Step, Undo, Watch
from mesocosm.kernel.runtime.undoing import Entry

_spec_decoder = msgspec.msgpack.Decoder(ContainerSpec)
_wait_decoder = msgspec.msgpack.Decoder(Wait)
_encoder = msgspec.msgpack.Encoder()


def _default(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return list(msgspec.structs.astuple(value))
    if isinstance(value, (tuple, frozenset, set)):
        return list(value)
    return str(value)


_packer = msgpack.Packer(strict_types=True, default=_default)


def pack(value: Any) -> bytes:
    """Any plain value, with structs as lists of their fields."""
    packed: bytes = _packer.pack(value)
    return packed


def unpack(blob: bytes) -> Any:
    """What `pack` was given; structs come back as lists."""
    return msgpack.unpackb(blob, strict_map_key=False)


_Integer = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Span = tuple[_Integer, _Integer, _Integer, _Integer]


class _Told(msgspec.Struct):
    """What lines of the event log say that is read again, each if it says it."""

    group: str | None = None
    containers: list[str] | dict[str, dict[str, Any] | None] | None = None
    ended: float | None = None
    wait: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    state: str | None = None
    exit: _Integer | None = None
    blame: str | None = None
    asked: _Integer | None = None


_line_decoder = msgspec.msgpack.Decoder(tuple[_Span | None, dict[str, Any] | None])


def unpack_line(blob: bytes | None) -> tuple[_Span | None, dict[str, Any]]:
    """The span and the body of a line of the event log, which have no checksum: ValueError if they cannot be one's."""
    if not blob:
        return None, {}
    try:
        span, body = _line_decoder.decode(blob)
        if body:
            msgspec.convert(body, _Told)
    except (RecursionError, msgspec.MsgspecError) as error:
        raise ValueError(f"not the body of a line: {error}") from None
    return span, body or {}


def pack_entries(entries: Sequence[Entry]) -> bytes:
    """Entries of the ledger."""
    packed: bytes = msgpack.packb(entries)
    return packed


def unpack_entries(blob: bytes) -> list[Entry]:
    """Entries of the ledger; ValueError or TypeError if the blob is something else."""
    return [
        Entry(int(position), str(kind), tuple(Undo(str(verb), str(target)) for verb, target in undo), bool(keep))
        for position, kind, undo, keep in msgpack.unpackb(blob)
    ]


def pack_plan(plan: ContainerPlan) -> bytes:
    """A merged plan. References are lists that begin with their tag."""
    return _encoder.encode(plan)


PLAN_BYTES = 4 * 2**20  # of one container: a pod file fits sixteen times


def checked_plan(plan: ContainerPlan) -> bytes:
    """The same; InternalError names the plug-in whose part cannot be written down, or is too long to be."""
    try:
        blob = pack_plan(plan)
        if len(blob) <= PLAN_BYTES:
            return blob
        problem = f"{len(blob)} bytes; a container's plan has at most {PLAN_BYTES}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    parts: list[Effect | Step | Watch] = [*plan.effects, *plan.setup, *plan.watches]
    sizes = [(_size(part), part.plugin) for part in parts]
    plugin = max(sizes, default=(0, "?"))[1]
    hint = "a bug of this plug-in: report it to its author"
    raise InternalError(f"its plan cannot be written down: {problem[:500]}", plugin=plugin, id=plan.id, hint=hint)


def _size(part: Effect | Step | Watch) -> float:
    try:
        return len(_encoder.encode(part))
    except Exception:
        return float("inf")


def unpack_plan(blob: bytes) -> ContainerPlan:
    """A merged plan, references and all; ValueError or TypeError if the blob is something else."""
    plan = msgspec.msgpack.decode(blob)
    try:
        return ContainerPlan(
            plan["id"],
            plan["namespaces"],
            tuple(Effect(**{**each, "args": _referring(each["args"]), "undo": _undo(each["undo"])}) for each in plan["effects"]),
            tuple(Step(**{**each, "args": _referring(each["args"])}) for each in plan["setup"]),
            tuple(Watch(**{**each, "args": _referring(each["args"])}) for each in plan["watches"]),
            tuple(plan.get("referring", ())),
        )
    except (KeyError, AttributeError) as error:
        raise ValueError(f"not a plan: {error}") from None


def _undo(listed: list[list[str]]) -> tuple[Undo, ...]:
    return tuple(Undo(*each) for each in listed)


def _referring(value: Any) -> Any:
    """`value` with every list that stands for a reference turned back into one."""
    if isinstance(value, dict):
        # A new agent does this for every container: most values are what they are, and a call for each would be most of the time.
        return {key: item if type(item) in _PLAIN else _referring(item) for key, item in value.items()}
    if isinstance(value, list):
        match value:
            case ["\0fact", int(index), str(name)]:
                return Fact(index, name)
            case ["\0grant", str(name)]:
                return Grant(name)
        return [item if type(item) in _PLAIN else _referring(item) for item in value]
    return value


_PLAIN = frozenset((str, int, bool, bytes, float, type(None)))


def pack_struct(value: ContainerSpec | Wait) -> bytes:
    """A spec or a wait."""
    return _encoder.encode(value)


def unpack_spec(blob: bytes) -> ContainerSpec:
    """A container's spec; msgspec.ValidationError (a ValueError) if the blob is something else."""
    return _spec_decoder.decode(blob)


def unpack_wait(blob: bytes) -> Wait:
    """How a container ended; msgspec.ValidationError (a ValueError) if the blob is something else."""
    return _wait_decoder.decode(blob)
