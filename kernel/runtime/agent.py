"""The agent: what the socket serves. Every public method is a verb of the wire; every error is a MesoError.

What lives here: the verbs, and the agent's own tasks (notices of the launcher, lazy writing, retrying what is parked).
What must not: how a launch is carried out (`launch`), how things end (`supervisor`), how an agent begins (`recovery`).

A verb that starts something never belongs to the client that asked: if the client goes away, the launch completes or
rolls back as it would have.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import trio
from trio import TaskStatus

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec
from mesocosm.kernel.core.containers import signal_number
from mesocosm.kernel.core.errors import ConflictError, DyingError, LaunchError, MesoError, from_object
from mesocosm.kernel.core.host import HostFacts
from mesocosm.kernel.core.spec import parse_tasks
from mesocosm.kernel.core.states import State
from mesocosm.kernel.launcher.contract import Ended, ExecFailed, Launcher, LauncherGone, Notice, NotReleased, Started
from mesocosm.kernel.launcher.precheck import precheck
from mesocosm.kernel.runtime import admission, admitting, codec, effects, recovery, removal, status, supervisor
from mesocosm.kernel.runtime.events import Journal
from mesocosm.kernel.runtime.faults import Faults
from mesocosm.kernel.runtime.grants import IdPool
from mesocosm.kernel.runtime.hosting import HostEffects
from mesocosm.kernel.runtime.kinds import kernel_kinds
from mesocosm.kernel.runtime.launch import Launch
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.runtime.logs import read_log
from mesocosm.kernel.runtime.machine import LinuxMachine, Machine
from mesocosm.kernel.runtime.succession import Succession
from mesocosm.kernel.runtime.world import Cell, Precheck, World
from mesocosm.kernel.sets.loading import Plugins
from mesocosm.kernel.sets.planning import Planner

_AT_ONCE = 16  # notices heard before others get a turn: what follows from each is done in the next
_AFRESH = "meso agent --stop ends what runs; then the next verb starts anew"


class Agent:
    """One agent on one ledger. `run` must be running (as a task) for the verbs to work.

    `launcher` and `machine` are the seams to the system; `precheck` looks at a staged container's program. `fault`: None
    takes MESOCOSM_FAULT from the environment, from which an agent without --allow-faults has removed it.
    """

    def __init__(
        self,
        *,
        host: HostFacts,
        plugins: Plugins,
        launcher: Launcher,
        ledger: str | None = None,
        machine: Machine | None = None,
        precheck: Precheck | None = precheck,
        fault: str | None = None,
    ) -> None:
        book = Ledger(ledger or f"{host.run_dir}/ledger.db")
        planner = Planner(plugins, host)
        kinds = {kind.name: kind for kind in kernel_kinds(launcher)}
        self._planner = planner
        self.world = World(
            host=host,
            ledger=book,
            journal=Journal(book),
            launcher=launcher,
            machine=machine or LinuxMachine(host.run_dir),
            kinds={**kinds, **planner.kinds},
            executors=planner.executors,
            ids=IdPool(host),
            faults=Faults(os.environ.get("MESOCOSM_FAULT", "") if fault is None else fault),
            precheck=precheck,
        )
        self._hosting = HostEffects(self.world, planner.host_effects)
        self._succession = Succession(self.world, self._hosting.forget)
        self._closing = False
        self.stopped = trio.Event()  # set when `stop_agent` has ended everything: nothing is left to serve

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recovers, then keeps everything going. Cancelling it ends no container."""
        world = self.world
        try:
            async with trio.open_nursery() as nursery:
                world.nursery = nursery
                living = await recovery.recover(world)
                supervisor.start(world, living)
                supervisor.resume(world)
                nursery.start_soon(self._hear)
                nursery.start_soon(world.journal.keep_writing, partial(admitting.acknowledge, world))
                nursery.start_soon(recovery.keep_retrying, world)
                nursery.start_soon(world.starting.watch, partial(supervisor.never_started, world))
                task_status.started()
        finally:
            world.nursery = None
            world.ledger.close()

    @property
    def idle_since(self) -> float | None:
        """Since when (trio's clock) there has been no living container; None while there is one."""
        return self.world.idle_since

    @property
    def is_idle(self) -> bool:
        """Whether nothing lives and nothing is being launched."""
        return self.world.living == 0

    # -- launching ----------------------------------------------------------------------------------------------

    async def launch_group(self, document: Mapping[str, Any], *, name: str = "pod") -> dict[str, Any]:
        """Launches a pod: {"id", "state", "containers": [ids]} once it runs; an error if nothing of it is left."""
        launch, ignored = await self._admit_group(document, name)
        return await self._launch(launch, ignored)

    def run_group(self, document: Mapping[str, Any], *, name: str = "pod") -> AsyncIterator[dict[str, Any]]:
        """Launches a pod and yields its event lines; the last has type `end`. Closing this early ends nothing."""

        async def admit() -> Launch:
            return (await self._admit_group(document, name))[0]

        return self._run(admit)

    async def _run(self, admit: Callable[[], Awaitable[Launch]]) -> AsyncIterator[dict[str, Any]]:
        self.world.ledger.flush()
        launch = await admit()
        since = self.world.ledger.seq
        assert self.world.nursery is not None
        self.world.nursery.start_soon(self._launch_quietly, launch)
        group = launch.group
        mark, roots = group.event_body.get("group"), supervisor.roots(group)
        async with aclosing(self.world.journal.follow_group(since, group.event_id, mark, roots)) as lines:
            async for line in lines:
                yield line

    async def plan_group(self, document: Mapping[str, Any], *, name: str = "pod") -> dict[str, Any]:
        """What launching would do, as ``plan --json``; touches nothing, and lets others have their turn."""
        planned: dict[str, Any] = {}
        for planned in self._planner.plan_by_and_by(document, name):  # noqa: B007 - the last one is whole
            await trio.lowlevel.checkpoint()
        return planned

    async def launch_nested_group(self, container_id: str, tasks: Sequence[Any], *, principal: str | None = None) -> dict[str, Any]:
        """Launches tasks behind one barrier inside a running container: {"id", "state", "containers"}.

        `principal`: the container that asks through its own socket (None: a host user). It gets at most what it has.
        """
        return await self._launch(await self._admit_nested(container_id, tasks, principal))

    def run_nested_group(self, container_id: str, tasks: Sequence[Any]) -> AsyncIterator[dict[str, Any]]:
        """Launches tasks inside a running container and yields the event lines of these alone; the last has type `end`."""
        return self._run(lambda: self._admit_nested(container_id, tasks))

    async def launch_container(self, document: Mapping[str, Any], *, principal: str | None = None) -> dict[str, Any]:
        """Launches one container: `container_id` and the fields of a task. A dotted id names the parent."""
        container_id, task, around = admission.single_document(document)
        try:
            parent_id = container_id.rpartition(".")[0]
            if not parent_id:
                return await self.launch_group({"name": container_id, "tasks": [task], "executor": "command", **around})
            return await self._launch(await self._admit_nested(parent_id, [task], principal))
        except MesoError as error:
            raise admission.at_top(error) from None

    def _parent(self, container_id: str) -> Cell:
        parent: Cell = admission.known(self.world.cells, container_id)
        state = self.world.tree.state(container_id)
        if state is not State.RUNNING:
            kind = DyingError if state in (State.STOPPING, State.DESTROYING, State.DEAD) else ConflictError
            raise kind(f"{container_id} is {state}: nothing can start in it", id=container_id, have=state.value, need="RUNNING")
        return parent

    async def _admit_group(self, document: Mapping[str, Any], name: str) -> tuple[Launch, tuple[str, ...]]:
        pod, ignored = admission.read_group(self._planner, document, name)
        specs = admission.arrange(self._planner, pod)
        plans = admission.plan_all(self._planner, specs)
        return await self._admit(pod.name, pod.executor, specs, plans), ignored

    async def _admit(self, group_id: str, executor: str, specs: Sequence[ContainerSpec], plans: Sequence[ContainerPlan]) -> Launch:
        world = self.world
        if self._closing:
            raise DyingError("the agent is ending", hint=_AFRESH)
        if world.launcher_gone:
            await self._succession.ensure()
        world.ledger.check_writable()
        packed = []
        for plan in plans:
            effects.check(plan.effects, world.kinds, plan.id)
            packed.append(codec.checked_plan(plan))
        if not self._hosting.made:
            await self._hosting.ensure()
        return await admitting.admit(world, group_id, executor, specs, plans, packed)

    async def _admit_nested(self, parent_id: str, tasks: Sequence[Any], principal: str | None = None) -> Launch:
        parent = self._parent(parent_id)
        specs = admission.nested_containers(parse_tasks(tasks, parent_id), parent.spec)
        if principal is not None:
            specs = admission.check_rights(specs, parent.spec)
        plans = admission.plan_all(self._planner, specs, parent.plan)
        launch = await self._admit(f"{parent.id}+", parent.group.executor, specs, plans)
        parent.launches.add(launch)
        return launch

    async def _launch(self, launch: Launch, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
        group = launch.group
        members = tuple(group.members)
        try:
            await launch.run()
        finally:
            group.launch = None
            if (parent := self.world.cells.get(group.event_id)) is not None:
                parent.launches.discard(launch)
        world = self.world
        supervisor.start(world, [world.cells[member] for member in members])
        if launch.transaction.killed:
            supervisor.end_group(world, group, "killed")
        answer = {"id": group.id, "state": group.state.value, "containers": list(members)}
        return {**answer, "ignored": list(ignored)} if ignored else answer

    async def _launch_quietly(self, launch: Launch) -> None:
        try:
            await self._launch(launch)
        except MesoError:
            return  # the event log tells it

    # -- the living ---------------------------------------------------------------------------------------------

    async def wait_container(self, container_id: str) -> dict[str, Any]:
        """WAIT, once the container is dead. For a pod's own container also {"group": {"state", "exit", "error"}}."""
        cell: Cell = admission.known(self.world.cells, container_id)
        await cell.dead.wait()
        if cell.group.id == container_id:
            await cell.group.over.wait()
        return status.end_of(self.world, cell)

    def ended(self, container_id: str) -> dict[str, Any] | None:
        """What `wait_container` answers, if it need not wait."""
        cell: Cell = admission.known(self.world.cells, container_id)
        if not cell.dead.is_set() or (cell.group.id == container_id and not cell.group.over.is_set()):
            return None
        return status.end_of(self.world, cell)

    async def kill_container(self, container_id: str, signal: int | str | None = None, *, grace_ms: int | None = None) -> None:
        """Without `signal`: begins to end it and all below it, by their kill policies (`grace_ms`: no longer than that).

        With one: sends it to the first process. A container on its way up is given up in either case.
        """
        await trio.lowlevel.checkpoint()  # not later: the name could be another container's by then, and this one be killed in vain
        cell: Cell = admission.known(self.world.cells, container_id)
        number = None if signal is None else signal_number(signal, "$.signal")
        launch = cell.group.launch
        if launch is not None and not launch.finished.is_set():
            launch.cancel(LaunchError("killed during the launch", id=container_id))
            return
        if self.world.tree.state(container_id) is State.DEAD:
            raise ConflictError(f"{container_id} is dead", id=container_id, have="DEAD", need="RUNNING")
        if number is None:
            supervisor.kill(self.world, cell, grace_ms=grace_ms)
        else:
            supervisor.send_signal(self.world, cell, number)

    async def remove_container(self, container_id: str) -> None:
        """Forgets a dead container and all below it, logs and sandbox too; ConflictError while one of them lives."""
        admission.known(self.world.cells, container_id)
        await removal.remove(self.world, container_id)

    def begin_removal(self, container_id: str) -> Coroutine[Any, Any, None] | None:
        """The same, done if None is answered; else begun, and what is answered must be awaited."""
        admission.known(self.world.cells, container_id)
        return removal.begin(self.world, container_id)

    def get_containers(self, include_dead: bool = False) -> list[dict[str, Any]]:  # noqa: FBT001, FBT002 - the wire's own signature
        """`ps` lines, parents before children."""
        return status.ps_lines(self.world, include_dead=include_dead)

    def explain(self, container_id: str) -> dict[str, Any]:
        """Why a container is as it is: state, wait, error, its group's state and error, its plan, what is parked."""
        return status.explanation(self.world, container_id)

    def plugins(self) -> list[dict[str, Any]]:
        """`plugins` lines."""
        return list(self._planner.report)

    def set_aside(self, forget: bool) -> dict[str, Any]:  # noqa: FBT001 - the wire's own signature
        """What of the ledger could not be read, and whether it can be written: {"path", "trouble", "set_aside"}."""
        return status.set_aside(self.world.ledger, forget=forget)

    def events(self, since: int, container_id: str | None = None) -> AsyncIterator[dict[str, Any]]:
        """Event lines numbered above `since`, of one container and all below it or of all; never ends by itself."""
        return self.world.journal.follow(since, container_id)

    def read_logs(
        self, container_id: str, stream: str, offset: int = 0, *, follow: bool = False
    ) -> AsyncIterator[tuple[int, bytes]]:
        """(offset, bytes) of a container's output; with `follow` until it is dead and all is read."""
        cell: Cell = admission.known(self.world.cells, container_id)
        return read_log(self.world.host.container_dir(container_id), cell, stream, offset, follow=follow)

    async def stop_agent(self) -> None:
        """Ends every container, undoes what they shared, ends the launcher; then `stopped` is set."""
        await self.stop_all()
        await self.retire()

    async def stop_all(self) -> None:
        """Ends every container by its kill policy; returns when the last is dead. Nothing new starts meanwhile."""
        world = self.world
        self._closing = True
        for group in list(world.groups.values()):
            if group.launch is not None:
                group.launch.cancel(LaunchError("the agent is ending", id=group.event_id))
            elif not group.over.is_set():
                supervisor.end_group(world, group, "killed")
        for group in list(world.groups.values()):
            await group.over.wait()

    async def close(self) -> None:
        """The last thing before this process ends: if nothing lives, nothing stays behind (`retire`)."""
        if self.is_idle and not self.stopped.is_set():
            await self.retire()

    async def retire(self) -> None:
        """Undoes what containers share and ends the launcher. Only with no living container; for the idle exit, too."""
        if self.world.living:
            raise ConflictError("containers are alive", have=str(self.world.living), need="0")
        self._closing = True
        await admitting.acknowledge(self.world)
        await self._hosting.undo()
        self.world.machine.forget_ends()
        if not self.world.launcher_gone:
            try:
                await self.world.launcher.stop()
            except MesoError as error:
                traceback.print_exception(error)
        self.stopped.set()

    # -- the agent's own tasks ----------------------------------------------------------------------------------

    async def _hear(self) -> None:
        notices = self.world.launcher.notices
        async for notice in notices:
            self._heard(notice)
            with suppress(trio.WouldBlock, trio.EndOfChannel):  # what came with it in the same turn, unless that is very much
                for _ in range(_AT_ONCE):
                    self._heard(notices.receive_nowait())

    def _heard(self, notice: Notice) -> None:
        if isinstance(notice, LauncherGone):
            self._succession.lost()
            return
        if isinstance(notice, NotReleased):
            for group in [found for found in self.world.groups.values() if found.barrier == notice.barrier]:
                supervisor.never_started(self.world, group.id, notice.message)
            return
        cell = self.world.cells.get(notice.container_id)
        if cell is not None:
            self.world.starting.heard_of(cell.group.id)
        if cell is None or cell.dead.is_set():
            if isinstance(notice, Ended):
                self.world.acknowledge_soon(notice.container_id)
        elif isinstance(notice, Ended):
            if cell.gone.is_set():
                return  # told again: it is in the ledger, or about to be
            supervisor.tell_ended(self.world, cell, notice)
        elif isinstance(notice, Started):
            first, count = cell.barrier_step, len(cell.plan.setup)
            self.world.journal.add(cell.id, "started", {"pid": cell.pid}, plan=cell.plan_key, span=(0, 0, first, count))
        elif isinstance(notice, ExecFailed):
            if cell.group.launch is not None and not cell.group.launch.transaction.committed:
                cell.group.launch.member_ended(cell.id, from_object(notice.error))
            else:
                supervisor.exec_failed(self.world, cell, notice.error)
