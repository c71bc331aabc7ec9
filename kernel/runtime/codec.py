"""Values as bytes for the ledger, and back.

What lives here: msgpack for plans (whose references must survive), msgspec for flat structs. Nothing decides
anything. A blob that does not decode raises LedgerRowError's cause, ValueError: the caller sets the row aside.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from mesocosm.kernel.contracts import Wait
from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.plan import ContainerPlan, Effect, Fact, Grant, Step, Undo, Watch

_FACT, _GRANT = 1, 2
_spec_decoder = msgspec.msgpack.Decoder(ContainerSpec)
_wait_decoder = msgspec.msgpack.Decoder(Wait)
_encoder = msgspec.msgpack.Encoder()


def _default(value: Any) -> Any:
    kind = type(value)
    if kind is Fact:
        return msgpack.ExtType(_FACT, msgpack.packb(list(value)))
    if kind is Grant:
        return msgpack.ExtType(_GRANT, value.name.encode())
    if isinstance(value, msgspec.Struct):
        return list(msgspec.structs.astuple(value))
    if isinstance(value, (tuple, frozenset, set)):
        return list(value)
    return str(value)


def _extension(code: int, data: bytes) -> Any:
    if code == _FACT:
        return Fact(*msgpack.unpackb(data))
    return Grant(data.decode()) if code == _GRANT else None


_packer = msgpack.Packer(strict_types=True, default=_default)


def pack(value: Any) -> bytes:
    """Any plain value, with references and structs (as lists of their fields)."""
    packed: bytes = _packer.pack(value)
    return packed


def unpack(blob: bytes) -> Any:
    """What `pack` was given; structs come back as lists."""
    return msgpack.unpackb(blob, ext_hook=_extension, strict_map_key=False)


def pack_undo(undo: tuple[Undo, ...]) -> bytes:
    """The undo of one effect."""
    packed: bytes = msgpack.packb(undo)
    return packed


def unpack_undo(blob: bytes) -> tuple[Undo, ...]:
    """The undo of one effect; ValueError if the blob is something else."""
    return tuple(Undo(str(verb), str(target)) for verb, target in msgpack.unpackb(blob))


def unpack_plan(blob: bytes) -> ContainerPlan:
    """A merged plan, references and all; ValueError or TypeError if the blob is something else."""
    container_id, namespaces, effects, setup, watches = unpack(blob)
    return ContainerPlan(
        container_id,
        namespaces,
        tuple(Effect(kind, args, tuple(Undo(*each) for each in undo), keep, plugin) for kind, args, undo, keep, plugin in effects),
        tuple(Step(*step) for step in setup),
        tuple(Watch(*watch) for watch in watches),
    )


def pack_struct(value: ContainerSpec | Wait) -> bytes:
    """A spec or a wait."""
    return _encoder.encode(value)


def unpack_spec(blob: bytes) -> ContainerSpec:
    """A container's spec; msgspec.ValidationError (a ValueError) if the blob is something else."""
    return _spec_decoder.decode(blob)


def unpack_wait(blob: bytes) -> Wait:
    """How a container ended; msgspec.ValidationError (a ValueError) if the blob is something else."""
    return _wait_decoder.decode(blob)
