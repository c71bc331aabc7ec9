"""What the kernel hands out when a container is admitted: ranges of user ids.

Every container with users of its own gets a range that nobody else has, so that a process that got out of one
container is a stranger to the next. Which ranges are in use is not stored anywhere of its own: it follows from
the containers that live, and after a restart from their rows in the ledger.
"""

from __future__ import annotations

from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.errors import OverBudgetError
from mesocosm.kernel.core.host import HostFacts

POOL_BASE = 0x70000000


class IdPool:
    """Disjoint ranges of `host.uid_count` ids each, `host.uid_ranges` of them."""

    def __init__(self, host: HostFacts) -> None:
        self._host = host
        self._size = host.uid_count
        self._used: set[int] = set()
        self._held: dict[str, int] = {}  # dead container → first id of a range that somebody it left behind may still have
        self._given_back: set[int] = set()  # of those
        # Agents with other run directories draw from the same pool, and know nothing of each other: each begins elsewhere.
        self._first = int(host.run_id, 16) % max(1, host.uid_ranges)

    def needs_range(self, spec: ContainerSpec) -> bool:
        """Whether a container has users of its own (and the host has a pool)."""
        return self._host.uid_ranges > 0 and not self._host.rootless and spec.namespaces.get("user", "own") == "own"

    def take(self, container_id: str) -> int:
        """The first id of a free range; OverBudgetError with have and need when there is none."""
        ranges = self._host.uid_ranges
        # The first that is free, so that plans that differ in nothing but their ids stay the same few and are compiled
        # once. What is kept of the dead (logs, sandbox) may still carry the ids of a range in use again; nobody inside
        # can reach it, since the directory around it is closed to all but the agent.
        for offset in range(ranges):
            number = (self._first + offset) % ranges
            if number not in self._used:
                self._used.add(number)
                return POOL_BASE + number * self._size
        raise OverBudgetError(
            "no range of user ids is left",
            id=container_id,
            have=str(ranges),
            need=str(ranges + 1),
            hint="end some containers first",
        )

    def occupy(self, base: int) -> None:
        """A range that the ledger says is in use."""
        self._used.add((base - POOL_BASE) // self._size)

    def give_back(self, base: int | None) -> None:
        """The container is dead and what it owned is gone. A range that is held is free when it is not any more."""
        if base is None:
            return
        if base in self._held.values():
            self._given_back.add(base)
        else:
            self._used.discard((base - POOL_BASE) // self._size)

    def hold(self, container_id: str, base: int) -> None:
        """This container is dead, but perhaps not all of its processes, which have ids of this range."""
        self._held[container_id] = base

    @property
    def held(self) -> set[int]:
        """First ids of the ranges that are."""
        return set(self._held.values())

    def let_go(self, container_id: str) -> None:
        """They are gone now."""
        base = self._held.pop(container_id, None)
        if base in self._given_back and base not in self._held.values():
            self._given_back.discard(base)
            self.give_back(base)

    def grants(self, base: int | None, parent: dict[str, int] | None) -> dict[str, int]:
        """What a container's plan may refer to: its own range, its parent's, or the ids as they are."""
        if base is not None:
            return {"uid_base": base, "uid_count": self._size}
        if parent is not None:
            return parent
        return {"uid_base": 0, "uid_count": max(1, self._host.uid_count)}
