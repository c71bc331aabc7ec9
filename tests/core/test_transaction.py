"""The launch transaction: hand-made stories, and every history that a state machine test can think of."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mesocosm.kernel.core.errors import InternalError
from mesocosm.kernel.core.names import parent_of
from mesocosm.kernel.core.states import State
from mesocosm.kernel.core.transaction import (
    Abort,
    Action,
    Commit,
    Do,
    Finish,
    Intend,
    Member,
    Outcome,
    Park,
    Release,
    Run,
    Stage,
    Transaction,
    Undo,
    member,
)
from mesocosm.kernel.core.tree import Tree

DONE, FAILED, STOPPED = Outcome.DONE, Outcome.FAILED, Outcome.STOPPED


def start(*members: Member, living: tuple[str, ...] = ()) -> Transaction:
    tree = Tree()
    for container_id in living:
        tree.adopt(container_id, State.RUNNING)
    for found in members:
        tree.adopt(found.id)
    return Transaction(tree, members)


def play(transaction: Transaction, *, fail: tuple[Action, ...] = ()) -> list[Action]:
    """Carries everything out in the order handed out; the actions in `fail` fail."""
    history: list[Action] = []
    while actions := transaction.next():
        for action in actions:
            history.append(action)
            if not isinstance(action, Finish):
                transaction.tell(action, FAILED if action in fail else DONE)
    return history


def test_a_group_goes_straight_through() -> None:
    history = play(start(member("web", 2), member("web.a", 1), member("web.b", 0)))
    assert history[0] == Intend()
    assert history[-3:] == [Commit(), Release(), Finish(State.RUNNING)]
    assert history.index(Do("web", 0)) < history.index(Do("web.a", 0)) < history.index(Stage("web.a"))
    assert history.index(Stage("web")) < history.index(Stage("web.b"))


def test_a_failing_stage_aborts_and_undoes_everything_in_reverse() -> None:
    history = play(start(member("web", 2), member("web.a", 1)), fail=(Stage("web.a"),))
    assert history[-5:] == [Abort(), Undo("web.a", 0), Undo("web", 1), Undo("web", 0), Finish(State.ROLLED_BACK)]


def test_a_failing_intend_leaves_nothing_to_undo() -> None:
    assert play(start(member("web", 2)), fail=(Intend(),)) == [Intend(), Finish(State.ROLLED_BACK)]


def test_a_failing_undo_is_parked_and_the_rest_goes_on() -> None:
    history = play(start(member("web", 2)), fail=(Do("web", 0), Undo("web", 1)))
    assert history == [Intend(), Do("web", 0), Undo("web", 1), Park("web", 1), Undo("web", 0), Finish(State.ROLLED_BACK)]


def test_slow_effects_go_on_beside_each_other() -> None:
    transaction = start(Member("web", 4, (Run(0, 1), Run(1, 2, (0,)), Run(2, 3, (0,)), Run(3, 4, (0, 1, 2)))))
    transaction.tell(transaction.next()[0], DONE)
    assert transaction.next() == [Do("web", 0)]
    transaction.tell(Do("web", 0), DONE)
    assert transaction.next() == [Do("web", 1), Do("web", 2)]
    transaction.tell(Do("web", 2), DONE)
    assert transaction.next() == []
    transaction.tell(Do("web", 1), DONE)
    assert transaction.next() == [Do("web", 3)]


def test_a_cancel_after_commit_is_a_kill_of_a_running_group() -> None:
    transaction = start(member("web", 0))
    for expected in (Intend(), Stage("web"), Commit()):
        assert transaction.next() == [expected]
        transaction.tell(expected, DONE)
    transaction.cancel()
    assert play(transaction) == [Release(), Finish(State.RUNNING)]
    assert transaction.killed


def test_a_cancel_while_the_record_is_being_written_waits_for_its_answer() -> None:
    for outcome, end in ((DONE, State.RUNNING), (FAILED, State.ROLLED_BACK)):
        transaction = start(member("web", 0))
        for expected in (Intend(), Stage("web")):
            assert transaction.next() == [expected]
            transaction.tell(expected, DONE)
        assert transaction.next() == [Commit()]
        transaction.cancel()
        transaction.tell(Commit(), outcome)
        assert play(transaction)[-1] == Finish(end)


def test_a_cancel_before_anything_was_asked_ends_at_once() -> None:
    transaction = start(member("web", 3))
    transaction.cancel()
    assert transaction.next() == [Finish(State.ROLLED_BACK)]


def test_a_nested_group_is_staged_below_a_running_parent() -> None:
    history = play(start(member("web.a.x", 1), living=("web", "web.a")))
    assert history == [Intend(), Do("web.a.x", 0), Stage("web.a.x"), Commit(), Release(), Finish(State.RUNNING)]


def test_an_answer_nobody_asked_for_is_a_bug() -> None:
    with pytest.raises(InternalError, match="outstanding"):
        start(member("web", 0)).tell(Commit(), DONE)


IDS = ("g", "g.a", "g.b", "g.a.x", "g.b.y", "g.c")


class Launch(RuleBasedStateMachine):
    """Answers in any order, failures and kills anywhere; the promises hold in every history."""

    @initialize(
        count=st.integers(1, len(IDS)),
        effects=st.lists(st.integers(0, 3), min_size=len(IDS), max_size=len(IDS)),
        slow=st.booleans(),
    )
    def begin(self, count: int, effects: list[int], slow: bool) -> None:  # noqa: FBT001
        ids = [found for found in IDS[:count] if parent_of(found) is None or parent_of(found) in IDS[:count]]
        self.members = [
            Member(name, n, tuple(Run(i, i + 1) for i in range(n))) if slow else member(name, n)
            for name, n in zip(ids, effects, strict=False)
        ]
        self.tree = Tree()
        for found in self.members:
            self.tree.adopt(found.id)
        self.transaction = Transaction(self.tree, self.members)
        self.history: list[Action] = []
        self.answers: list[tuple[Action, Outcome]] = []
        self.open: list[Action] = []
        self.cancelled_before_commit = False
        self.pump()

    def pump(self) -> None:
        actions = self.transaction.next()
        ended = bool(self.history) and isinstance(self.history[-1], Finish)
        assert not (ended and actions), "no action after the end"
        for action in actions:
            done = {a for a, outcome in self.answers if outcome is DONE}
            match action:
                case Release():
                    assert Commit() in done
                case Commit():
                    assert {Stage(m.id) for m in self.members} <= done
                case Stage(name):
                    mine = next(m for m in self.members if m.id == name)
                    assert {Do(name, run) for run in range(len(mine.runs))} <= done
                    parent = parent_of(name)
                    assert parent is None or Stage(parent) in done
                case Do():
                    assert Intend() in done
                case Undo() | Abort():
                    assert not self.open, "nothing is undone while something is in flight"
                    assert Commit() not in done
                case _:
                    pass
            if self.transaction.rolling_back:
                assert not isinstance(action, (Do, Stage, Commit, Release, Intend))
            self.history.append(action)
            if not isinstance(action, Finish):
                self.open.append(action)

    def answer(self, number: int, outcome: Outcome) -> None:
        action = self.open.pop(number % len(self.open))
        self.answers.append((action, outcome))
        self.transaction.tell(action, outcome)
        self.pump()

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 20))
    def it_is_done(self, number: int) -> None:
        self.answer(number, DONE)

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 20), outcome=st.sampled_from([FAILED, STOPPED]))
    def it_is_not(self, number: int, outcome: Outcome) -> None:
        self.answer(number, outcome)

    @rule()
    def kill(self) -> None:
        self.transaction.cancel()
        self.pump()

    @rule()
    def something_breaks(self) -> None:
        self.transaction.fail()
        self.pump()

    @invariant()
    def it_never_hangs(self) -> None:
        assert self.open or isinstance(self.history[-1], Finish)

    def teardown(self) -> None:
        if not hasattr(self, "members"):
            return
        while self.open:
            self.answer(0, DONE)
        finish = self.history[-1]
        assert isinstance(finish, Finish)
        done = {a for a, outcome in self.answers if outcome is DONE}
        undone = [a for a in self.history if isinstance(a, Undo)]
        if finish.state is State.RUNNING:
            assert not undone
            assert {self.tree.state(m.id) for m in self.members} == {State.RUNNING}
            assert Release() in self.history
        else:
            assert Release() not in self.history
            intended = [Undo(m.id, i) for m in self.members for i in range(m.effects)] if Intend() in done else []
            assert undone == intended[::-1]
            failed = [a for a, outcome in self.answers if isinstance(a, Undo) and outcome is not DONE]
            assert [a for a in self.history if isinstance(a, Park)] == [Park(a.member, a.index) for a in failed]
            assert {self.tree.state(m.id) for m in self.members} == {State.DEAD}
            if any(isinstance(a, Stage) for a in self.history):
                assert Abort() in self.history


Launch.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestEveryHistory = Launch.TestCase
