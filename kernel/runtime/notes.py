"""What the launcher keeps about a container for us: enough to go on with it, should the ledger have lost its record.

What lives here: the note's form. What must not: what follows from it (`recovery`). Theory: the launcher lives as long as the
container does and keeps its note in memory, so what happens to a file does not happen to it. A note has what cannot be found
out otherwise: whose group it is, its range of ids, its spec, and how to undo what was made for it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgpack

from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.undoing import Entry

_LONGEST = 16 * 1024  # bytes: it travels in one message with the table, and every container begins as a copy of the launcher


class Note(NamedTuple):
    """What was written down: `spec` is bare (an id, and defaults) if the real one was too long."""

    group: str
    executor: str
    plan: int
    base: int | None
    spec: ContainerSpec
    entries: list[Entry]


def write(group: str, executor: str, plan: int, base: int | None, spec: bytes, entries: bytes) -> bytes:
    """A note; spec and entries as `codec` packs them. Without the spec if it is too long, empty if that does not help."""
    for kept in (spec, b""):
        note: bytes = msgpack.packb((group, executor, plan, base, kept, entries))
        if len(note) <= _LONGEST:
            return note
    return b""


def read(container_id: str, note: bytes) -> Note | None:
    """The note of a container; None if it has none, or none of this form (an earlier version's)."""
    try:
        group, executor, plan, base, spec, entries = msgpack.unpackb(note)
        found = codec.unpack_spec(spec) if spec else ContainerSpec(id=container_id)
        if found.id != container_id:
            return None
        base = None if base is None else int(base)
        return Note(str(group), str(executor), int(plan), base, found, codec.unpack_entries(entries))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
