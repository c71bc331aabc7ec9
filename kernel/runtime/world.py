"""What an agent knows, in memory: cells, groups, and what all parts of the runtime share.

What lives here: records without behaviour. A `Cell` is a container as the runtime sees it, a `Group` one launch. Their
states are in the tree and nowhere else; everything that must survive the agent is in the ledger as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from mesocosm.kernel.contracts import EffectKind, Executor, SlowEffectKind, Wait
from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.host import HostFacts
from mesocosm.kernel.core.plan import ContainerPlan, Step
from mesocosm.kernel.core.states import State
from mesocosm.kernel.core.supervision import Ending
from mesocosm.kernel.core.tree import Tree
from mesocosm.kernel.launcher.contract import Ended, Launcher
from mesocosm.kernel.runtime.events import Journal
from mesocosm.kernel.runtime.faults import Faults
from mesocosm.kernel.runtime.grants import IdPool
from mesocosm.kernel.runtime.launching import Launching
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.runtime.machine import Machine
from mesocosm.kernel.runtime.starting import Starting
from mesocosm.kernel.runtime.undoing import Entry

if TYPE_CHECKING:
    from mesocosm.kernel.runtime.budgets import Budgets
    from mesocosm.kernel.runtime.launch import Launch
    from mesocosm.kernel.runtime.recording import Recorder

Precheck = Callable[[int, Sequence[Step]], Awaitable[None]]


@dataclass(slots=True, eq=False)
class Cell:
    """One container. `status` is what the launcher said (None: nobody saw it end), `ended` is set when it has."""

    spec: ContainerSpec
    plan: ContainerPlan
    group: Group
    plan_key: int = 0
    base: int | None = None  # first id of a range of its own
    grants: dict[str, int] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    pid: int | None = None
    pidfd: int | None = None
    birth: str = ""  # which process that is: its pid may be another's one day (linux.pidfds.identity)
    started: float | None = None
    ended_at: float | None = None
    status: Ended | None = None
    wait: Wait | None = None
    error: dict[str, Any] | None = None
    reason: str | None = None  # why it was told to end, if it was
    stuck: str | None = None  # what keeps it from ending, although it was killed
    ending: Ending | None = None
    patience: trio.CancelScope | None = None  # of the stop under way: its deadline is when SIGKILL follows
    nursery: trio.Nursery | None = None  # its children's supervisors and its own stop run in it
    supervised: bool = False
    exit_written: bool = False  # the ledger has how it ended, and the line that tells it
    gone: trio.Event = field(default_factory=trio.Event)  # the process has ended
    dead: trio.Event = field(default_factory=trio.Event)  # nothing of it is left (but what is kept)
    launches: set[Launch] = field(default_factory=set)  # nested groups on their way up

    @property
    def id(self) -> str:
        """The container's id."""
        return self.spec.id

    @property
    def barrier_step(self) -> int:
        """How many of the plan's steps have been done when it stands at the barrier."""
        count = len(self.plan.setup)
        while count and self.plan.setup[count - 1].stage == "exec":
            count -= 1
        return count


@dataclass(slots=True, eq=False)
class Group:
    """One launch: a pod, or a nested group (whose id, PARENT+N, is no container's)."""

    id: str
    barrier: str
    executor: str
    members: list[str] = field(default_factory=list)
    state: State = State.PLANNED
    blame: str | None = None
    error: dict[str, Any] | None = None
    killed: set[str] = field(default_factory=set)
    launch: Launch | None = None
    living: int = 0  # members that are not dead
    over: trio.Event = field(default_factory=trio.Event)

    @property
    def event_id(self) -> str:
        """The container id that events about the group carry: the root, or the parent of a nested group."""
        return self.id.partition("+")[0]

    @property
    def event_body(self) -> dict[str, Any]:
        """What such events carry besides: the group's own id, if that is another."""
        return {"group": self.id} if "+" in self.id else {}


@dataclass(slots=True, eq=False)
class World:
    """Everything shared by the parts of one agent."""

    host: HostFacts
    ledger: Ledger
    journal: Journal
    launcher: Launcher
    machine: Machine
    kinds: Mapping[str, EffectKind | SlowEffectKind]
    executors: Mapping[str, Executor]
    ids: IdPool
    faults: Faults
    budgets: Budgets
    precheck: Precheck | None = None
    history: Recorder | None = None  # none where there is no directory for it
    tree: Tree = field(default_factory=Tree)
    cells: dict[str, Cell] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    nursery: trio.Nursery | None = None  # root containers' supervisors run in it
    unacknowledged: list[str] = field(default_factory=list)
    parked: trio.Event = field(default_factory=trio.Event)  # set while something could not be undone
    starting: Starting = field(default_factory=Starting)
    launching: Launching = field(default_factory=Launching)
    turns: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(8))  # members of large groups undone in one turn
    removing: set[str] = field(default_factory=set)
    strays: dict[str, list[str]] = field(default_factory=dict)  # container → plug-ins still busy for it, though nobody waits
    auditing: trio.Lock = field(default_factory=trio.Lock)  # one audit at a time
    pruning: bool = False  # the oldest dead groups are being forgotten
    launcher_gone: bool = False  # until the next one serves, and knows whom the last one left
    taking_over: bool = False  # whoever is gone went before this agent came
    unsure: dict[str, float] = field(default_factory=dict)  # groups whose launcher died before anybody was seen to run; until when
    barriers: int = 0  # used by this agent so far: part of the next one's name
    living: int = 0  # containers that are not dead, launches included
    idle_since: float | None = None

    def living_cells(self, container_ids: Sequence[str]) -> list[Cell]:
        """The cells of those that are not DEAD."""
        return [self.cells[found] for found in container_ids if found in self.cells and self.tree.state(found) is not State.DEAD]

    def acknowledge_soon(self, container_id: str) -> None:
        """This one's end is in the ledger, or about to be: the launcher may forget it with the next lot."""
        self.unacknowledged.append(container_id)
        self.journal.wake()

    def count(self, change: int) -> None:
        """Counts the living; idle begins when the last has gone."""
        self.living += change
        self.idle_since = None if self.living else trio.current_time()
