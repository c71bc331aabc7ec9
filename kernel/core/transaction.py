"""The launch transaction as a state machine: says what to do next, is told what became of it, touches nothing.

The contract with whoever carries it out: `next` hands out actions; each action but Finish is answered exactly
once, by `tell(action, outcome)`, in any order. `cancel` and `fail` may be called at any time. After Finish
there are no more actions. Promises, all proven by a property-based test:

* Release comes after Commit, Commit after every member stands at the barrier;
* a member is staged when its own effects are done and its parent stands or runs;
* before Commit every failure and every cancel leads to ROLLED_BACK: everything in flight is answered first,
  what was staged is aborted, then every intended entry is undone once, in exact reverse order, going on past
  failures, which are parked;
* after Commit there is no way back: a cancel is remembered (`killed`) and is the business of whoever supervises.

Effects of one member come in *runs*: consecutive quick effects are one run, a slow one is a run of its own, so
that slow ones can go on beside each other (`Run.after`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from mesocosm.kernel.core import states
from mesocosm.kernel.core.errors import InternalError
from mesocosm.kernel.core.names import parent_of
from mesocosm.kernel.core.states import State
from mesocosm.kernel.core.tree import Tree


class Run(NamedTuple):
    """Effects start…stop-1 of a member, made one after another once the runs `after` (indexes) are done."""

    start: int
    stop: int
    after: tuple[int, ...] = ()


class Member(NamedTuple):
    """A container of the group: how many effects it has, and in which runs they are made."""

    id: str
    effects: int
    runs: tuple[Run, ...] = ()


def member(container_id: str, effects: int) -> Member:
    """A member whose effects are made one after another."""
    return Member(container_id, effects, (Run(0, effects),) if effects else ())


# Actions are structs and not tuples: two tuples of different classes are equal, two structs are not.
class Intend(msgspec.Struct, frozen=True):
    """Write all entries of all members into the ledger, in one transaction."""


class Do(msgspec.Struct, frozen=True):
    """Make the effects of one run."""

    member: str
    run: int


class Stage(msgspec.Struct, frozen=True):
    """Build the container up to its barrier."""

    member: str


class Commit(msgspec.Struct, frozen=True):
    """Write the one record that decides."""


class Release(msgspec.Struct, frozen=True):
    """Open the barrier."""


class Abort(msgspec.Struct, frozen=True):
    """End everything that stands at the barrier, and see it reaped."""


class Undo(msgspec.Struct, frozen=True):
    """Undo one entry."""

    member: str
    index: int


class Park(msgspec.Struct, frozen=True):
    """This entry could not be undone: name it, show it, have it retried."""

    member: str
    index: int


class Finish(msgspec.Struct, frozen=True):
    """It is over: RUNNING or ROLLED_BACK."""

    state: State


Action = Intend | Do | Stage | Commit | Release | Abort | Undo | Park | Finish


class Outcome(Enum):
    """What became of an action. STOPPED: given up because of a failure elsewhere; what it left is undone."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


class Transaction:
    """One launch. `state` is the group's; the members' states are kept in `tree`, where the members are PLANNED."""

    def __init__(self, tree: Tree, members: Sequence[Member]) -> None:
        self.state = State.PLANNED
        self.killed = False  # a kill came too late to stop the start: it is for whoever supervises the group
        self._tree = tree
        self._members = {found.id: found for found in members}
        self._outstanding: set[Action] = set()
        self._runs_left = {found.id: len(found.runs) for found in members}
        self._runs_done: dict[str, set[int]] = {found.id: set() for found in members}
        self._asked: set[Do | Stage] = set()
        self._staged: set[str] = set()
        self._moved: list[str] = []  # members that something may have become possible for
        self._failing = False
        self._abort = False  # something was staged: it has to be ended before anything is undone
        self._undo: list[Undo] = []  # still to be undone, the next one last
        self._then: Action | None = Intend()  # the one action of a phase that has just one
        self._finished = False

    @property
    def committed(self) -> bool:
        """Whether the decision has been written down: from here it only goes forward."""
        return self.state in (State.COMMITTED, State.RUNNING)

    @property
    def rolling_back(self) -> bool:
        """Whether it failed: whatever is in flight should be given up and answered with STOPPED."""
        return self._failing

    @property
    def finished(self) -> bool:
        """Whether Finish has been handed out."""
        return self._finished

    def states(self) -> list[tuple[str, State]]:
        """The state of each member, by id."""
        return [(container_id, self._tree.state(container_id)) for container_id in self._members]

    def run(self, action: Do) -> Run:
        """The run that a Do is about."""
        return self._members[action.member].runs[action.run]

    def next(self) -> list[Action]:
        """Everything that can be done now; empty while answers are outstanding, and after Finish."""
        if self._then is not None:
            action, self._then = self._then, None
            return [self._hand_out(action)]
        if self._finished or (self._failing and self._outstanding):
            return []
        if self._failing:
            return [self._roll_back()]
        if self.state is State.PREPARING:
            return self._prepare()
        return []

    def tell(self, action: Action, outcome: Outcome) -> None:
        """The answer to an action that `next` handed out; InternalError for any other."""
        if action not in self._outstanding:
            raise InternalError(f"{action} was not outstanding")
        self._outstanding.remove(action)
        if isinstance(action, Undo):
            if outcome is not Outcome.DONE:
                self._then = Park(action.member, action.index)
        elif isinstance(action, (Park, Abort)):
            pass  # an abort that fails leaves processes, which the undo of their cgroup ends
        elif isinstance(action, Release):
            self._step("released")
            for container_id in self._members:
                if self._tree.state(container_id) is State.STAGED:
                    self._tree.tell(container_id, "released")
            # A barrier that cannot be opened has lost its launcher; the decision stands, the group is to be ended.
            self.killed = self.killed or outcome is not Outcome.DONE
            self._then = Finish(self.state)
        elif outcome is not Outcome.DONE:
            self._fail()
        else:
            self._succeed(action)

    def cancel(self) -> None:
        """A kill. Before Commit: roll back. After it: remembered in `killed`. After the end: nothing."""
        if self._finished:
            return
        if self.committed:
            self.killed = True
        elif any(isinstance(action, Commit) for action in self._outstanding):
            self.killed = True  # the record may be written already: its answer decides
        else:
            self._fail("kill")

    def fail(self) -> None:
        """Something happened that makes this start impossible (a staged member died, time is up)."""
        if not self._finished and not self.committed and Commit() not in self._outstanding:
            self._fail()

    def _succeed(self, action: Action) -> None:
        if isinstance(action, Intend):
            self._step("admitted")
            if self._failing:
                self._begin_undo("failed")
                return
            self._step("prepare")
            for container_id in self._members:
                self._tree.tell(container_id, "prepare")
            self._moved = list(self._members)
        elif isinstance(action, Do):
            self._runs_left[action.member] -= 1
            self._runs_done[action.member].add(action.run)
            self._moved.append(action.member)
            if not self._runs_left[action.member]:
                self._moved += self._tree.children(action.member)
        elif isinstance(action, Stage):
            if not self._failing:
                self._tree.tell(action.member, "staged")
            self._staged.add(action.member)
            self._moved += self._tree.children(action.member)
            if not self._failing and len(self._staged) == len(self._members):
                self._step("all_staged")
                self._then = Commit()
        elif isinstance(action, Commit):
            self._step("committed")
            self._then = Release()

    def _prepare(self) -> list[Action]:
        found: list[Action] = []
        moved, self._moved = self._moved, []
        for container_id in moved:
            asked = self._members.get(container_id)
            parent = parent_of(container_id)
            if asked is None or (parent in self._members and self._runs_left[parent]):
                continue  # what is made for a child may lie in what is made for its parent
            if self._runs_left[container_id]:
                done = self._runs_done[container_id]
                for number, run in enumerate(asked.runs):
                    if number not in done and done.issuperset(run.after):
                        self._ask(Do(container_id, number), found)
            elif parent not in self._members or parent in self._staged:
                self._ask(Stage(container_id), found)
        return found

    def _ask(self, action: Do | Stage, found: list[Action]) -> None:
        if action not in self._asked:
            self._asked.add(action)
            found.append(self._hand_out(action))

    def _hand_out(self, action: Action) -> Action:
        if isinstance(action, Finish):
            self._finished = True
        else:
            self._outstanding.add(action)
        return action

    def _fail(self, event: str = "failed") -> None:
        if self._failing:
            return
        self._failing = True
        self._then = None
        if self.state is not State.PLANNED:
            self._begin_undo(event)
        # In PLANNED nothing is written yet, or its answer is outstanding and says whether there is something to undo.

    def _begin_undo(self, event: str) -> None:
        self._step(event)
        self._undo = [Undo(found.id, index) for found in self._members.values() for index in range(found.effects)]
        self._abort = any(isinstance(action, Stage) for action in self._asked)
        for container_id in self._members:
            self._tree.tell(container_id, "kill")

    def _roll_back(self) -> Action:
        if self._abort:
            self._abort = False
            return self._hand_out(Abort())
        if self._undo:
            return self._hand_out(self._undo.pop())
        self._step("undone" if self.state is State.ROLLING_BACK else "failed")
        self._end_members()
        return self._hand_out(Finish(self.state))

    def _end_members(self) -> None:
        for container_id in reversed(self._members):
            if self._tree.state(container_id) is State.PLANNED:
                self._tree.tell(container_id, "kill")
            self._tree.tell(container_id, "undone")

    def _step(self, event: str) -> None:
        self.state = states.step(states.GROUP, self.state, event, next(iter(self._members), "the group"))
