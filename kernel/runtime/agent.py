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
from mesocosm.kernel.core.errors import ConflictError, DyingError, LaunchError, MesoError
from mesocosm.kernel.core.host import HostFacts
from mesocosm.kernel.core.spec import parse_tasks
from mesocosm.kernel.core.states import State
from mesocosm.kernel.launcher.contract import Launcher
from mesocosm.kernel.launcher.precheck import precheck
from mesocosm.kernel.runtime import (
    admission,
    admitting,
    codec,
    effects,
    logs,
    parking,
    past,
    recovery,
    removal,
    status,
    stuck,
    supervisor,
)  # fmt: skip
from mesocosm.kernel.runtime.budgets import Budgets
from mesocosm.kernel.runtime.events import Journal
from mesocosm.kernel.runtime.faults import Faults
from mesocosm.kernel.runtime.grants import IdPool
from mesocosm.kernel.runtime.hearing import hear
from mesocosm.kernel.runtime.hosting import HostEffects
from mesocosm.kernel.runtime.kinds import kernel_kinds
from mesocosm.kernel.runtime.launch import Launch
from mesocosm.kernel.runtime.ledger import Ledger
from mesocosm.kernel.runtime.machine import LinuxMachine, Machine
from mesocosm.kernel.runtime.outside import Outside
from mesocosm.kernel.runtime.recording import Recorder
from mesocosm.kernel.runtime.succession import Succession
from mesocosm.kernel.runtime.world import Cell, Precheck, World
from mesocosm.kernel.sets.loading import Plugins
from mesocosm.kernel.sets.planning import Planner

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
        history: Callable[[Ledger], Recorder] | None = None,
        machine: Machine | None = None,
        precheck: Precheck | None = partial(precheck, elsewhere=Outside().ask),  # noqa: B008 - one for each process will do
        fault: str | None = None,
    ) -> None:
        book = Ledger(ledger or f"{host.run_dir}/ledger.db")
        machine = machine or LinuxMachine(host.run_dir)
        planner = Planner(plugins, host)
        kinds = {kind.name: kind for kind in kernel_kinds(launcher)}
        self._planner = planner
        self.world = World(
            host=host,
            ledger=book,
            journal=Journal(book, machine.time),
            history=history(book) if history else None,
            launcher=launcher,
            machine=machine,
            kinds={**kinds, **planner.kinds},
            executors=planner.executors,
            ids=IdPool(host),
            faults=Faults(os.environ.get("MESOCOSM_FAULT", "") if fault is None else fault),
            precheck=precheck,
            budgets=Budgets(host.run_dir),
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
                world.budgets.take_over(world)
                supervisor.start(world, living)
                supervisor.resume(world)
                nursery.start_soon(hear, world, self._succession.lost)
                nursery.start_soon(world.journal.keep_writing, partial(admitting.acknowledge, world))
                nursery.start_soon(parking.keep_retrying, world)
                nursery.start_soon(world.launching.watch, lambda launch: nursery.start_soon(self._launch_quietly, launch))
                nursery.start_soon(self._succession.keep_current)
                if world.history is not None:
                    world.history.begin(
                        {cell.id: cell.plan_key for cell in living}, {cell.id for cell in living if cell.gone.is_set()}
                    )
                    nursery.start_soon(world.history.run, world.journal.changed)
                nursery.start_soon(world.budgets.keep)
                nursery.start_soon(world.starting.watch, partial(supervisor.never_started, world))
                task_status.started()
        finally:
            world.nursery = None
            if world.history is not None:
                world.ledger.flush()
                await world.history.finish()
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

    async def _admit_group(self, document: Mapping[str, Any], name: str) -> tuple[Launch, tuple[str, ...]]:
        pod, ignored = admission.read_group(self._planner, document, name)
        specs = admission.arrange(self._planner, pod)
        plans = admission.plan_all(self._planner, specs)
        return await self._admit(pod.name, pod.executor, specs, plans), ignored

    async def _admit(self, group_id: str, executor: str, specs: Sequence[ContainerSpec], plans: Sequence[ContainerPlan]) -> Launch:
        world = self.world
        self._check_open()
        if world.launcher_gone:
            await self._succession.ensure()
        world.ledger.check_writable()
        packed = []
        for plan in plans:
            effects.check(plan.effects, world.kinds, plan.id)
            packed.append(codec.checked_plan(plan))
        if not self._hosting.made:
            await self._hosting.ensure()
        await admitting.make_room(world, [spec.id for spec in specs], plans)
        self._check_open()  # asked again after all that was waited for: whoever ends the agent has seen no launch
        return admitting.admit(world, group_id, executor, specs, plans, packed)

    def _check_open(self) -> None:
        if self._closing:
            raise DyingError("the agent is ending", hint=_AFRESH)

    async def _admit_nested(self, parent_id: str, tasks: Sequence[Any], principal: str | None = None) -> Launch:
        parent = admitting.parent(self.world, parent_id)
        specs = admission.nested_containers(parse_tasks(tasks, parent_id), parent.spec)
        if principal is not None:
            specs = admission.check_rights(specs, parent.spec)
        plans = admission.plan_all(self._planner, specs, parent.plan)
        launch = await self._admit(f"{parent.id}+", admitting.executor_inside(self.world, parent), specs, plans)
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
        with suppress(MesoError):  # the event log tells it
            await self._launch(launch)

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
        await removal.remove(self.world, container_id)

    def begin_removal(self, container_id: str) -> Coroutine[Any, Any, None] | None:
        """The same, done if None is answered; else begun, and what is answered must be awaited."""
        return removal.begin(self.world, container_id)

    def get_containers(self, include_dead: bool = False) -> list[dict[str, Any]]:  # noqa: FBT001, FBT002 - the wire's own signature
        """`ps` lines, parents before children."""
        return status.ps_lines(self.world, include_dead=include_dead)

    def explain(self, container_id: str, life: int | None = None) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """Why a container is as it is: state, wait, error, its group's state and error, its plan, what is parked, the chain of
        causes. Of one that is gone, or of another `life` of its id, what the history knows: that is to be awaited."""
        if life is None and container_id in self.world.cells:
            return status.explanation(self.world, container_id)
        return past.explain(self.world, container_id, life)

    def history(self, container_id: str | None = None, **bounds: Any) -> Awaitable[dict[str, Any]]:
        """Lines about what has been, as far as it is remembered; see `past.page`."""
        return past.history(self.world, container_id, bounds)

    async def audit(self, repair: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - the wire's own signature
        """The ledger compared with the machine: `leftover`, `missing`, `strangers`, `notes`; with `repair`, after it."""
        from mesocosm.kernel.runtime.audit import audit  # few agents are ever asked

        return await audit(self.world, repair=repair)

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
        self, container_id: str, stream: str, offset: int = 0, *, follow: bool = False, previous: bool = False
    ) -> AsyncIterator[logs.Piece]:
        """Pieces of a container's output, or of its predecessor's; with `follow` until it is dead and all is read."""
        cell: Cell = admission.known(self.world.cells, container_id)
        return logs.read(self.world.host, cell, stream, offset, follow=follow, previous=previous)

    async def stop_agent(self) -> None:
        """Ends every container, undoes what they shared, ends the launcher; then `stopped` is set."""
        await self.stop_all()
        await self.retire()

    async def stop_all(self) -> None:
        """Ends every container by its kill policy; returns when the last is dead. Nothing new starts any more.

        ConflictError, when only such are left that nothing can end now: they are shown, and killed again and again.
        """
        world = self.world
        self._closing = True
        for group in list(world.groups.values()):
            if group.launch is not None:
                group.launch.cancel(LaunchError("the agent is ending", id=group.event_id))
            elif not group.over.is_set():
                supervisor.end_group(world, group, "killed")
        for group in list(world.groups.values()):
            while not group.over.is_set():
                with trio.move_on_after(1):
                    await group.over.wait()
                stuck.refuse(world)

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
        try:
            await self._succession.stop()
        except MesoError as error:
            traceback.print_exception(error)
        self.stopped.set()
