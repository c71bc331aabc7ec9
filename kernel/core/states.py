"""The life of a container and of a group, as tables.

Two rules of this file: everything that decides a change of state is here, and nothing here does anything.
EVENTS says what each event means in each state; an event that a state does not list is a ConflictError and
changes nothing. JOINT says how containers and their groups pull each other along; `settle` applies it until
nothing moves. The diagrams of the manual are drawn from these tables.

DEADLINES gives every state that must not last a limit in seconds, and the event that ends it then; UNTIMED
says what bounds the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from mesocosm.kernel.core.errors import ConflictError


class State(StrEnum):
    """Of a container; a group also goes through those of the second part."""

    PLANNED = "PLANNED"
    PREPARING = "PREPARING"
    STAGED = "STAGED"
    RUNNING = "RUNNING"
    STOPPING = "STOPPING"
    DESTROYING = "DESTROYING"
    DEAD = "DEAD"

    ADMITTED = "ADMITTED"
    COMMITTED = "COMMITTED"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLED_BACK = "ROLLED_BACK"


S = State

# Container. A kill is accepted in every state but DEAD; what it does there is to go on dying.
CONTAINER: Mapping[State, Mapping[str, State]] = {
    S.PLANNED: {"prepare": S.PREPARING, "kill": S.DESTROYING},
    S.PREPARING: {"staged": S.STAGED, "failed": S.DESTROYING, "kill": S.DESTROYING, "exited": S.DESTROYING},
    S.STAGED: {"released": S.RUNNING, "failed": S.DESTROYING, "kill": S.DESTROYING, "exited": S.DESTROYING},
    S.RUNNING: {"stop": S.STOPPING, "kill": S.DESTROYING, "exited": S.DESTROYING},
    S.STOPPING: {"stop": S.STOPPING, "kill": S.DESTROYING, "exited": S.DESTROYING},
    S.DESTROYING: {"kill": S.DESTROYING, "exited": S.DESTROYING, "failed": S.DESTROYING, "undone": S.DEAD},
    S.DEAD: {},
}

GROUP: Mapping[State, Mapping[str, State]] = {
    S.PLANNED: {"admitted": S.ADMITTED, "failed": S.ROLLED_BACK, "kill": S.ROLLED_BACK},
    S.ADMITTED: {"prepare": S.PREPARING, "failed": S.ROLLING_BACK, "kill": S.ROLLING_BACK},
    S.PREPARING: {"all_staged": S.STAGED, "failed": S.ROLLING_BACK, "kill": S.ROLLING_BACK},
    S.STAGED: {"committed": S.COMMITTED, "failed": S.ROLLING_BACK, "kill": S.ROLLING_BACK},
    S.COMMITTED: {"released": S.RUNNING, "kill": S.STOPPING},
    S.RUNNING: {"stop": S.STOPPING, "kill": S.STOPPING, "all_dead": S.DEAD},
    S.STOPPING: {"stop": S.STOPPING, "kill": S.STOPPING, "all_dead": S.DEAD},
    S.DEAD: {},
    S.ROLLING_BACK: {"kill": S.ROLLING_BACK, "failed": S.ROLLING_BACK, "undone": S.ROLLED_BACK},
    S.ROLLED_BACK: {},
}

# (state of the parent, state of the child): what the child is told. Applied downwards until nothing changes.
JOINT: Mapping[tuple[State, State], str] = {
    (S.DESTROYING, S.PLANNED): "kill",
    (S.DESTROYING, S.PREPARING): "kill",
    (S.DESTROYING, S.STAGED): "kill",
    (S.DESTROYING, S.RUNNING): "kill",
    (S.DESTROYING, S.STOPPING): "kill",
}

# state: (seconds it may last, event when they are over). Running has none: that is what a container is for.
DEADLINES: Mapping[State, tuple[float, str]] = {
    S.PLANNED: (30.0, "kill"),
    S.ADMITTED: (30.0, "failed"),
    S.PREPARING: (60.0, "failed"),
    S.STAGED: (60.0, "failed"),
    S.COMMITTED: (10.0, "kill"),
    S.DESTROYING: (30.0, "undone"),  # what is still there then is parked, named and retried
    S.ROLLING_BACK: (30.0, "undone"),
}

# Why there is no timer for the others.
UNTIMED: Mapping[State, str] = {
    S.RUNNING: "its program ends it: that is what a container is for",
    S.STOPPING: "its own kill policy: SIGKILL when the grace is over, and with it DESTROYING; a group ends with its last member",
    S.DEAD: "it has ended",
    S.ROLLED_BACK: "it has ended",
}

# Seconds that containers stand at a barrier without any agent. Then the launcher aborts it: nobody will ever claim it.
UNCLAIMED = 300.0

ENDED = frozenset({S.DEAD, S.ROLLED_BACK})
DYING = frozenset({S.STOPPING, S.DESTROYING, S.ROLLING_BACK, S.DEAD, S.ROLLED_BACK})


def step(table: Mapping[State, Mapping[str, State]], state: State, event: str, container_id: str) -> State:
    """The state after `event`; ConflictError, and no change, where the table does not list it."""
    after = table[state].get(event)
    if after is None:
        raise ConflictError(
            f"{container_id} is {state}: it cannot be told {event!r}",
            id=container_id,
            have=state.value,
            need=" or ".join(before for before, events in table.items() if event in events),
        )
    return after


def settle(states: dict[str, State], parents: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Pulls children along with their dying parents until nothing moves; the (id, event) that were applied.

    `states` (container id → state) is changed in place. Cost is linear: parents come before children.
    """
    applied: list[tuple[str, str]] = []
    for container_id in sorted(states, key=lambda name: name.count(".")):
        parent = parents.get(container_id)
        event = JOINT.get((states[parent], states[container_id])) if parent in states and parent is not None else None
        if event is not None:
            states[container_id] = step(CONTAINER, states[container_id], event, container_id)
            applied.append((container_id, event))
    return applied
