"""The container tree: who lives in whom, and in which state each one is.

What lives here: adoption, removal, the two walks, and `tell`, the only way a state changes. Theory: the first
promise (no container outlives its parent) is kept by three refusals of this class: a child is not adopted by
a parent that is dying, a container is not DEAD while a child lives, a container with children is not detached.
Everything else is `states`: its tables decide what an event means, `settle` pulls children along.
"""

from __future__ import annotations

from collections.abc import Iterator

from mesocosm.kernel.core import states
from mesocosm.kernel.core.errors import ConflictError, DyingError, NotFoundError
from mesocosm.kernel.core.names import parent_of
from mesocosm.kernel.core.states import State

_PULLS = frozenset(parent for parent, _ in states.JOINT)  # only these states of a parent move its children


class Tree:
    """Container ids with their states and parents. Ids are unique; a parent is in the tree before its children."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}
        self._children: dict[str, dict[str, None]] = {}  # a dict, because it keeps the order of adoption

    def __contains__(self, container_id: object) -> bool:
        return container_id in self._states

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def state(self, container_id: str) -> State:
        """The state of a container; NotFoundError if there is none of that id."""
        try:
            return self._states[container_id]
        except KeyError:
            raise NotFoundError(f"there is no container {container_id}", id=container_id) from None

    def children(self, container_id: str) -> list[str]:
        """Direct children in the order of adoption, dead ones included."""
        return list(self._children.get(container_id, ()))

    def living_children(self, container_id: str) -> list[str]:
        """Direct children that are not DEAD yet."""
        return [child for child in self._children.get(container_id, ()) if self._states[child] is not State.DEAD]

    def down(self, container_id: str) -> Iterator[str]:
        """The container and all below it, parents first: the order of starting."""
        pending = [container_id]
        while pending:
            found = pending.pop()
            yield found
            pending.extend(reversed(self._children.get(found, {})))

    def up(self, container_id: str) -> Iterator[str]:
        """The container and all below it, children first: the order of stopping."""
        return reversed(list(self.down(container_id)))

    def adopt(self, container_id: str, state: State = State.PLANNED) -> None:
        """Adds a container below its parent. ConflictError: the id is taken. DyingError: the parent is on its way out."""
        if container_id in self._states:
            raise ConflictError(
                f"there is already a container {container_id}", id=container_id, have=self._states[container_id].value
            )
        parent = parent_of(container_id)
        if parent is not None:
            parent_state = self.state(parent)
            if parent_state in states.DYING and state is not State.DEAD:
                raise DyingError(
                    f"{parent} is {parent_state}: nothing new may start in it", id=parent, have=parent_state.value, need="RUNNING"
                )
            self._children.setdefault(parent, {})[container_id] = None
        self._states[container_id] = state

    def detach(self, container_id: str) -> None:
        """Forgets a container. ConflictError unless it is DEAD or only PLANNED, and has no children."""
        state = self.state(container_id)
        if state not in (State.DEAD, State.PLANNED) or self._children.get(container_id):
            raise ConflictError(f"{container_id} is still in use", id=container_id, have=state.value, need="DEAD, without children")
        del self._states[container_id]
        self._children.pop(container_id, None)
        parent = parent_of(container_id)
        if parent is not None:
            siblings = self._children[parent]
            del siblings[container_id]
            if not siblings:
                del self._children[parent]

    def tell(self, container_id: str, event: str) -> list[tuple[str, str]]:
        """Applies an event and what follows from it below; the (id, event) that were applied, this one first.

        ConflictError, and no change anywhere, if the state does not know the event or a child is in the way of DEAD.
        """
        after = states.step(states.CONTAINER, self.state(container_id), event, container_id)
        below = self._children.get(container_id)
        if below and after is State.DEAD:
            living = self.living_children(container_id)
            if living:
                raise ConflictError(f"{container_id} cannot be DEAD before its children", id=container_id, have=", ".join(living))
        self._states[container_id] = after
        applied = [(container_id, event)]
        if below and after in _PULLS:
            subtree = {found: self._states[found] for found in self.down(container_id)}
            applied += states.settle(subtree, {found: parent_of(found) for found in subtree})
            self._states.update(subtree)
        return applied
