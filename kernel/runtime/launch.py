"""Carries one launch transaction out: the hands to the mind of `core.transaction`.

What lives here: how each action is done. What must not: which action comes next. Theory: the launch belongs to the
agent and not to the client that asked for it, so it is shielded from the client's going away; a kill reaches it
through `cancel`, which takes effect at its next point of waiting. Everything before Commit may be given up at any
such point; from Commit on nothing is.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

import trio

from mesocosm.kernel.contracts import EffectContext, EffectKind
from mesocosm.kernel.core import states
from mesocosm.kernel.core.errors import ConflictError, InternalError, LaunchError, MesoError
from mesocosm.kernel.core.names import leaf_of
from mesocosm.kernel.core.plan import resolve_steps
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
    Stage,
    Transaction,
    Undo,
)
from mesocosm.kernel.launcher.contract import StageRequest
from mesocosm.kernel.runtime import codec, effects, notes
from mesocosm.kernel.runtime.endings import end_body, rolled_back_wait
from mesocosm.kernel.runtime.errands import do_slow
from mesocosm.kernel.runtime.ledger import Ledger, Parked
from mesocosm.kernel.runtime.patience import OvertimeError, Patience
from mesocosm.kernel.runtime.proof import Proof
from mesocosm.kernel.runtime.succession import end_left
from mesocosm.kernel.runtime.undoing import Entry, entries_of, undo_by
from mesocosm.kernel.runtime.world import Cell, Group, World

_ABORT_DEADLINE = 10.0
_NEWS = 1.0  # seconds
_AT_ONCE = 8  # members begun before others get a turn: effects wait for nothing, and a large group has hundreds


class Launch:
    """One group on its way up. `run` returns when it is RUNNING, or raises when nothing of it is left."""

    def __init__(self, world: World, group: Group, cells: Sequence[Cell], packed: Sequence[bytes]) -> None:
        self._world = world
        self.group = group
        self._cells = {cell.id: cell for cell in cells}
        self._packed = packed
        self._facts: dict[str, effects.Facts] = {cell.id: [{}] * len(cell.plan.effects) for cell in cells}
        self._shown: dict[str, int] = {}  # effects whose lines are in the event log
        self._done: dict[str, int] = dict.fromkeys(self._cells, 0)
        self._proof = Proof(world)  # which effects may have made something of ours: no others are undone
        self._context = {cell.id: EffectContext(world.host, cell.id) for cell in cells}
        self._parked: list[Parked] = []
        self._notes: dict[str, bytes] = {}
        self._note = ""
        self._undo_deadline = 0.0  # of the whole roll-back: what is left then is parked unseen
        self._scope = trio.CancelScope()
        self._launcher_died = False
        self.error: MesoError | None = None
        self.begun = False  # somebody runs it
        self.finished = trio.Event()
        members = [Member(cell.id, len(cell.plan.effects), effects.runs_of(cell.plan.effects, world.kinds)) for cell in cells]
        self.transaction = Transaction(world.tree, members)

    def cancel(self, error: MesoError) -> None:
        """A kill: before Commit the launch is given up with `error`; after it the caller ends what is running."""
        self.transaction.cancel()
        self._give_up(error)

    def member_ended(self, container_id: str, error: MesoError | None = None) -> None:
        """A member's process has ended, or is about to (of `error`); before Commit that is the end of the launch."""
        if not self.transaction.committed:
            self.transaction.fail()
            self._give_up(error or LaunchError("it ended while it was waiting for the others", id=container_id))

    def lose_launcher(self, error: MesoError) -> None:
        """The launcher died: whoever stands at the barrier leaves by itself, and there will be no answers; given up."""
        self._launcher_died = True
        self.error = self.error or error
        self.transaction.fail()
        self._give_up(error)

    def _give_up(self, error: MesoError) -> None:
        if self.transaction.rolling_back:
            self.error = self.error or error
            self._scope.cancel()

    async def run(self) -> None:
        """From Intend to Finish."""
        if self.begun:  # somebody else saw to it that it came to an end
            await self.finished.wait()
        else:
            self.begun = True
            await self._to_its_end()
        if self.group.state is State.ROLLED_BACK:
            raise self.error or InternalError("rolled back without a reason", id=self.group.event_id)

    async def _to_its_end(self) -> None:
        transaction = self.transaction
        with trio.CancelScope(shield=True):
            with self._scope:
                await self._forward()
            try:
                while actions := transaction.next():
                    for action in actions:
                        await self._conclude(action)
            finally:
                self._world.launching.over(self)
                await self._close_descriptors()
                self.finished.set()

    # -- forward ------------------------------------------------------------------------------------------------

    async def _forward(self) -> None:
        actions = self._advance()
        while len(actions) == 1:  # one container, or the root of a group: no need for tasks
            await self._perform(actions[0])
            actions = self._advance()
        if actions:
            async with trio.open_nursery() as nursery:
                for number, action in enumerate(actions, 1):
                    nursery.start_soon(self._perform_on, nursery, action)
                    if not number % _AT_ONCE:
                        # Not cancellable here: each action that has been handed out has to be told of.
                        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _perform_on(self, nursery: trio.Nursery, action: Action) -> None:
        """Performs an action and what becomes possible by it; the first of that here, the rest in tasks of their own."""
        while True:
            await self._perform(action)
            actions = self._advance()
            if not actions:
                return
            action = actions[0]
            for other in actions[1:]:
                nursery.start_soon(self._perform_on, nursery, other)

    def _advance(self) -> list[Action]:
        """The next actions that wait for something; Intend and Commit, which do not, are done here."""
        transaction = self.transaction
        while True:
            if transaction.rolling_back:
                self._scope.cancel()
                return []
            if transaction.committed:
                return []
            actions = transaction.next()
            if not actions or not isinstance(actions[0], (Intend, Commit)):
                return actions
            action = actions[0]
            try:
                self._world.faults.strike("ledger", "a transaction")
                if isinstance(action, Intend):
                    self._intend()
                else:
                    self._commit()
            except Exception as error:
                self._fail(action, error)
            else:
                transaction.tell(action, Outcome.DONE)

    async def _perform(self, action: Action) -> None:
        try:
            if isinstance(action, Do):
                await self._do(action)
            elif isinstance(action, Stage):
                await self._stage(self._cells[action.member])
        except trio.Cancelled:
            self.transaction.tell(action, Outcome.STOPPED)
            raise
        except (Exception, OvertimeError) as error:
            self._fail(action, error)
        else:
            self.transaction.tell(action, Outcome.DONE)

    def _fail(self, action: Action, error: BaseException) -> None:
        if not isinstance(error, MesoError):
            _tell_of_bug(error)
            error = InternalError(f"{type(error).__name__}: {error}", id=self.group.event_id)
        self.error = self.error or effects.with_limit(self._world.machine, error)
        self.transaction.tell(action, Outcome.FAILED)

    def _intend(self) -> None:
        with self._world.ledger.deciding() as ledger:
            self._write_down(ledger)
            self._world.journal.add(self.group.event_id, "admitted", self.group.event_body)
        self._packed = ()

    def _write_down(self, ledger: Ledger) -> None:
        world, group = self._world, self.group
        members, plans, entries = [], [], []
        for cell, packed in zip(self._cells.values(), self._packed, strict=True):
            cell.plan_key = world.ledger.next_plan()
            spec = codec.pack_struct(cell.spec)
            members.append((cell.id, group.id, cell.plan_key, spec, cell.base))
            plans.append((cell.plan_key, packed))
            cell.entries = entries_of(cell.plan)
            entries.append((cell.id, self._proof.intend(cell)))
            made = codec.pack_entries(cell.entries)  # all of it, once it stands at its barrier: before, nobody has the note
            self._notes[cell.id] = notes.write(group.id, group.executor, cell.plan_key, cell.base, spec, made)
        ledger.intend((group.id, group.barrier, group.executor), members, plans, entries)
        told = {**group.event_body, "containers": group.members}
        # Its members' plans have the keys from this one on: whoever copies this line finds them by it.
        world.journal.add(group.event_id, "planned", told, plan=plans[0][0])

    async def _do(self, action: Do) -> None:
        cell = self._cells[action.member]
        run = self.transaction.run(action)
        plan, facts, context, kinds = cell.plan, self._facts[cell.id], self._context[cell.id], self._world.kinds
        strike = self._world.faults.strike if self._world.faults.armed else None
        first = plan.effects[run.start]
        slow = effects.slow_kind(kinds[first.kind], first) if run.stop - run.start == 1 else None  # a slow one is a run of its own
        with nullcontext() if slow is not None else Patience(effects.QUICK_SECONDS):
            for index in range(run.start, run.stop):
                effect = plan.effects[index]
                kind = kinds[effect.kind]
                try:
                    if strike:
                        strike("effect", f"effect {index}")
                    self._proof.begin(cell, index)
                    if slow is not None:
                        self._show_effects(cell, index)
                        await do_slow(self._world, slow, effect, index, context, facts, cell.grants)
                    else:
                        effects.do_quick(cast(EffectKind, kind), effect, index, context, facts, cell.grants)
                except LaunchError as error:
                    raise effects.failure(error, effect, index, cell.id) from error
                except ConflictError:
                    self._proof.refused(cell, index)
                    raise
                self._proof.done(cell, index)
                self._done[cell.id] += 1

    def _show_effects(self, cell: Cell, upto: int) -> None:
        """Lines of the effects before `upto`, as far as all of them are done: a slow one should not hide them."""
        shown = self._shown.get(cell.id, 0)
        if self._done[cell.id] >= upto > shown:
            self._world.journal.add(cell.id, "", plan=cell.plan_key, span=(shown, upto, 0, 0))
            self._shown[cell.id] = upto

    async def _stage(self, cell: Cell) -> None:
        world = self._world
        if world.faults.armed:
            try:
                world.faults.strike("member", "staging")
            except LaunchError as error:
                raise error.with_fields(id=cell.id) from None
        try:
            steps = resolve_steps(cell.plan, self._facts[cell.id], cell.grants)
        except Exception as error:
            raise effects.unresolved(cell.plan, self._facts[cell.id], cell.grants, error) from error
        fault = world.faults.inside(leaf_of(cell.id)) if world.faults.armed else None
        request = StageRequest(cell.id, self.group.barrier, steps, cell.spec.parent, self._notes.pop(cell.id), fault)
        try:
            staged = await world.launcher.stage(request)
            cell.pid, cell.pidfd = staged.pid, staged.pidfd
            if world.precheck is not None:
                await world.precheck(staged.pid, steps)
        except MesoError as error:
            if error.fields.get("errno") == "ESRCH":  # its parent has ended at the barrier, and the news of why is on its way:
                with trio.move_on_after(_NEWS):  # they give the launch up, and this with it
                    await trio.sleep_forever()
            raise error.with_fields(id=cell.id) from error
        count = len(cell.plan.effects)
        world.journal.add(
            cell.id,
            "staged",
            {"pid": cell.pid},
            plan=cell.plan_key,
            span=(self._shown.get(cell.id, 0), count, 0, cell.barrier_step),
        )
        self._shown[cell.id] = count

    def _commit(self) -> None:
        world, group = self._world, self.group
        now = world.machine.time()
        started = []
        for cell in self._cells.values():
            if cell.pidfd is not None and cell.pid is not None:
                cell.birth = world.machine.identity(cell.pidfd, cell.pid)
            started.append((cell.pid or 0, cell.birth, now, cell.id))
        with world.ledger.deciding() as ledger:
            ledger.commit(group.id, started)
            world.journal.add(group.event_id, "committed", group.event_body)
        for cell in self._cells.values():
            cell.started = now

    # -- the end, either way ------------------------------------------------------------------------------------

    async def _conclude(self, action: Action) -> None:
        world, transaction = self._world, self.transaction
        outcome = Outcome.DONE
        match action:
            case Release():
                world.starting.released(self.group.id)  # before the first that could be heard of it
                try:
                    with trio.fail_after(states.DEADLINES[State.COMMITTED][0]):
                        await world.launcher.release(self.group.barrier, wait=False)
                except Exception as error:
                    _tell_of_bug(error)
                    if isinstance(error, MesoError):
                        self.group.error = self.group.error or error.with_fields(id=self.group.event_id).as_object()
                    outcome = Outcome.FAILED  # decided and yet not started: whoever supervises ends it
            case Abort():
                try:
                    with trio.fail_after(_ABORT_DEADLINE):
                        await world.launcher.abort(self.group.barrier)
                except Exception as error:
                    _tell_of_bug(error)
                    outcome = Outcome.FAILED
                if self._launcher_died:
                    await end_left(world, self._cells.values())
            case Undo(member, index):
                undo = self._cells[member].plan.effects[index].undo
                now = trio.current_time()
                self._undo_deadline = self._undo_deadline or now + states.DEADLINES[State.ROLLING_BACK][0]
                note = None
                if undo and self._proof.is_ours(member, index):
                    entry = Entry(index, "", undo, keep=False)
                    note = await undo_by(world.machine, entry, self._undo_deadline)
                    await trio.lowlevel.checkpoint()  # most wait for nothing, and a large group has thousands
                if note is not None:
                    self._note = note
                    outcome = Outcome.FAILED
            case Park(member, index):
                effect = self._cells[member].plan.effects[index]
                self._parked.append((member, Entry(index, effect.kind, effect.undo, effect.keep), self._note))
            case Finish(state):
                self.group.state = state
                if state is State.ROLLED_BACK:
                    self._record_rolled_back()
                return
        transaction.tell(action, outcome)

    def _record_rolled_back(self) -> None:
        world, group = self._world, self.group
        error = self.error.as_object() if self.error else None
        blob = codec.pack(error)
        now = world.machine.time()
        guilty = (error or {}).get("id")
        with world.ledger as ledger:
            if self._packed:  # given up before that could be written; it is shown all the same, and its end must have a row
                self._write_down(ledger)
            ledger.undone(self._cells, self._parked)
            for cell in reversed(self._cells.values()):
                cell.wait, cell.ended_at = rolled_back_wait(cell.id, error), now
                cell.error = error if cell.id == guilty else None
                cell.entries.clear()
                done = min(self._done[cell.id], len(cell.plan.effects))
                world.journal.add(cell.id, "", plan=cell.plan_key, span=(self._shown.get(cell.id, 0), done, 0, 0))
                for _, entry, note in (found for found in self._parked if found[0] == cell.id):
                    world.journal.add(cell.id, "parked", {"index": entry.position, "note": note})
                world.journal.add(cell.id, "undone", {"entries": done})
                ledger.dead(cell.id, now, codec.pack_struct(cell.wait), codec.pack(cell.error) if cell.error else None)
            world.journal.add(group.event_id, "rolled_back", {**group.event_body, "error": error})
            group.error = error
            ledger.end_group(group.id, State.ROLLED_BACK, None, blob)
            world.journal.add(group.event_id, "end", end_body(world, group))
        for cell in self._cells.values():
            if cell.pidfd is not None:
                world.machine.close(cell.pidfd)
                cell.pidfd = None
            world.ids.give_back(cell.base)
            if cell.status is not None:  # it died before the barrier opened, and the launcher keeps a record of that
                world.acknowledge_soon(cell.id)
            cell.gone.set()
            cell.dead.set()
        group.over.set()
        world.count(-len(self._cells))
        if self._parked:
            world.parked.set()

    async def _close_descriptors(self) -> None:
        """Closing what has been a mount takes a millisecond."""
        for number, facts in enumerate(self._facts.values(), 1):
            effects.close(self._world.machine, facts)
            if not number % _AT_ONCE:
                await trio.lowlevel.checkpoint()


def _tell_of_bug(error: BaseException) -> None:
    """Into the agent's log, unless it is an answer that may be expected."""
    if not isinstance(error, (MesoError, trio.TooSlowError)):
        traceback.print_exception(error)
