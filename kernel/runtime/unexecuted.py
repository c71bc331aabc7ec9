"""A program that could not be executed behind its barrier: its group did start, and that is the group's error.

What lives here: writing that down, once, whoever heard of it first: an agent that the launcher told, or one that found it in
the launcher's inventory because the other did not live to write. What must not: ending the group (`supervisor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesocosm.kernel.core.errors import ExecError, from_object
from mesocosm.kernel.launcher.contract import Launched
from mesocosm.kernel.launcher.diagnosis import explain_late
from mesocosm.kernel.runtime import codec
from mesocosm.kernel.runtime.world import Cell, World


def blame(world: World, cell: Cell, error: Mapping[str, Any]) -> None:
    """This error is the container's, and its group's unless that has one."""
    group = cell.group
    if cell.error is None:
        # Also of one that ended at its barrier while that was being opened: what others did, they may have done.
        cell.error = from_object({**error, "code": ExecError.code}).with_fields(id=cell.id).as_object()
    if group.error is None:
        group.error, group.blame = cell.error, cell.id
        with world.ledger as ledger:
            ledger.blame(group.id, group.blame, codec.pack(group.error))


def find(world: World, cell: Cell, line: Launched) -> bool:
    """Whether the inventory tells that of a container; then it is written down."""
    if line.failed is None or line.barrier != cell.group.barrier:
        return False
    blame(world, cell, explain(cell, line.failed))
    return True


def explain(cell: Cell, failed: Mapping[str, Any]) -> dict[str, Any]:
    """The error object, from what the launcher keeps and the plan."""
    return explain_late(failed, cell.plan.setup, cell.id).as_object()
