"""A container that the launcher has and the ledger has lost: known again by what its note says of it.

What lives here: making a cell out of a note, or out of nothing but a name. What must not: deciding which containers these
are (`recovery`).
"""

from __future__ import annotations

from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.names import parent_of, root_of
from mesocosm.kernel.core.plan import ContainerPlan
from mesocosm.kernel.core.states import ENDED, State
from mesocosm.kernel.launcher.contract import Launched
from mesocosm.kernel.runtime import codec, notes
from mesocosm.kernel.runtime.undoing import Entry
from mesocosm.kernel.runtime.world import Cell, Group, World

STRANGERS = "recovered"  # the executor of containers whose group the ledger does not know: nobody decides for them


def plan_of(world: World, key: int, spec: ContainerSpec) -> ContainerPlan:
    """The plan that is written down under that number; one without anything in it if it has been lost."""
    blob = world.ledger.plan(key)
    if blob:
        try:
            plan = codec.unpack_plan(blob)
            if plan.id == spec.id:
                return plan
        except (ValueError, TypeError) as problem:
            world.ledger.note_set_aside(f"plan {key} of {spec.id}: {problem}", blob)
    return ContainerPlan(spec.id, dict(spec.namespaces), (), ())


def adopt_stranger(world: World, line: Launched, ownerless: dict[str, list[Entry]]) -> None:
    """The launcher has a container that the ledger lost: it goes on as what its note says it is, and can be seen, killed and
    waited for."""
    note = notes.read(line.container_id, line.note)
    spec = note.spec if note is not None else ContainerSpec(id=line.container_id)
    parent = parent_of(spec.id)
    if parent is not None and (parent not in world.tree or world.tree.state(parent) is State.DEAD):
        if parent in world.tree:
            return  # its parent is dead: it is dying of that already
        adopt_stranger(world, Launched(parent, line.barrier, 0, "ended"), ownerless)
    group = _group_of(world, line, note)
    key = world.ledger.next_plan() if note is None else note.plan
    cell = Cell(spec, plan_of(world, key, spec), group, key, None if note is None else note.base)
    cell.entries = ownerless.pop(spec.id, []) if note is None else note.entries
    ownerless.pop(spec.id, None)
    if cell.base is not None:
        world.ids.occupy(cell.base)
    around = world.cells.get(parent or "")
    cell.grants = world.ids.grants(cell.base, around.grants if around else None)
    world.tree.adopt(spec.id, State.RUNNING)
    world.cells[spec.id] = cell
    group.members.append(spec.id)
    group.living += 1
    with world.ledger as ledger:
        packed = (
            codec.pack_struct(spec),
            (line.pid or None, None),
            cell.base,
            codec.pack_entries(cell.entries) if cell.entries else b"",
        )
        ledger.adopt((group.id, group.barrier, group.executor), spec.id, key, *packed)
    lost = "adopted without its plan" if note is None else "adopted by the launcher's note"
    world.ledger.note_set_aside(f"{spec.id} runs, but its record was lost: {lost}")


def _group_of(world: World, line: Launched, note: notes.Note | None) -> Group:
    """The group of a container without a record: its own, as far as that is known."""
    if note is not None:
        group_id, executor = note.group, note.executor
        group = world.groups.get(group_id)
        if group is None or group.barrier != line.barrier or group.state in ENDED:
            world.groups[group_id] = group = Group(group_id, line.barrier, executor, state=State.RUNNING)
        return group
    group = world.groups.get(root_of(line.container_id))
    if group is None or group.state in ENDED:
        group_id = f"{line.container_id}+0"
        group = world.groups[group_id] = Group(group_id, line.barrier, STRANGERS, state=State.RUNNING)
    return group
