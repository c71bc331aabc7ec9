"""What every isolator and every executor must keep, as test classes to inherit from.

A contract is tried on machines that the author does not have (see strategies.HOSTS) and on specs nobody would
write. It needs no root, no agent and no plug-in but the one under test, because planning needs none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mesocosm.kernel.contracts import Check, ContainerSpec, EffectKind, Executor, GroupView, HostFacts, SlowEffectKind, Wait
from mesocosm.kernel.core import names
from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.core.plan import STEPS, Effect, Fact, Grant, Plan, as_data, merge, plan_as_data
from mesocosm.kernel.core.spec import Pod, parse_pod
from mesocosm.kernel.runtime.undo import VERBS
from mesocosm.kernel.testing.strategies import CONTAINERS, GRANTS, HOSTS, containers, parent_plan, pods

KERNEL_KINDS = frozenset({"directory", "log", "mount_tree", "view"})  # kinds of effects that are there without any plug-in
_any = settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None, max_examples=60)
_hosts = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)


class IsolatorContract:
    """Inherit and set `isolator` to the module with the hookimpls."""

    isolator: ClassVar[ModuleType]

    def planned(self, container: ContainerSpec, parent: ContainerSpec | None, host: HostFacts) -> Plan:
        """The isolator's part; an empty Plan where it has none. A refusal must name the field that caused it."""
        above = parent_plan(self.isolator, parent, host)
        try:
            plan = self.isolator.plan(container=container, parent=above, host=host, grants=GRANTS)
        except MesoError as error:
            _check_refusal(error, container.path)
            raise
        assert plan is None or isinstance(plan, Plan)
        return plan or Plan()

    @_hosts
    def test_the_same_question_has_the_same_answer_and_touches_nothing(self, host: HostFacts) -> None:
        for name, (container, parent) in CONTAINERS.items():
            given_before = msgspec.json.encode((container, parent, host))
            first = _bytes(self, container, parent, host)
            with _watched() as touched:
                second = _bytes(self, container, parent, host)
            assert first == second, name
            assert not touched, f"planning {name} looked at the machine: {touched}"
            assert msgspec.json.encode((container, parent, host)) == given_before, name

    @_hosts
    def test_its_plan_keeps_to_the_closed_vocabularies(self, host: HostFacts) -> None:
        for container, parent in CONTAINERS.values():
            try:
                plan = self.planned(container, parent, host)
            except MesoError:
                continue
            self.check(plan, container)

    @_any
    @given(pair=containers(), host=st.sampled_from(list(HOSTS.values())))
    def test_any_container_is_planned_or_refused(self, pair: tuple[ContainerSpec, ContainerSpec | None], host: HostFacts) -> None:
        container, parent = pair
        try:
            plan = self.planned(container, parent, host)
        except MesoError:
            return
        self.check(plan, container)

    def check(self, plan: Plan, container: ContainerSpec) -> None:
        """Kinds are known, references lead somewhere, undo is of the vocabulary, names are the container's, all of it is data."""
        kinds = KERNEL_KINDS | {kind.name for kind in self.kinds()}
        for index, effect in enumerate(plan.effects):
            assert effect.kind in kinds, f"no such kind of effect: {effect.kind}"
            for reference in _references(effect.args):
                if isinstance(reference, Fact):
                    assert 0 <= reference.index < index, f"effect {index} refers to a later one: {reference}"
            _check_undo(effect, container)
        for step in plan.setup:
            assert step.kind in STEPS, f"no such step: {step.kind}"
        for reference in _references([step.args for step in plan.setup] + [watch.args for watch in plan.watches]):
            if isinstance(reference, Fact):
                assert 0 <= reference.index < len(plan.effects), f"no such effect: {reference}"
            else:
                assert reference.name in GRANTS, f"no such grant: {reference}"
        assert all(type(key) is str and type(value) is str for key, value in plan.env.items())
        json.dumps(plan_as_data(merge(container.id, container.namespaces, [("tried", plan)])))

    def kinds(self) -> list[EffectKind | SlowEffectKind]:
        """The effect kinds of the plug-in itself."""
        return list(self.isolator.effect_kinds()) if hasattr(self.isolator, "effect_kinds") else []

    def test_its_kinds_of_effects_have_the_methods_the_kernel_calls(self) -> None:
        for kind in self.kinds():
            assert isinstance(kind, EffectKind)
            assert kind.name not in KERNEL_KINDS
            assert list(kind.find("/nonexistent/mesocosm")) == []

    @_hosts
    def test_what_it_shares_between_containers_and_checks_is_data_too(self, host: HostFacts) -> None:
        kinds = KERNEL_KINDS | {kind.name for kind in self.kinds()}
        if hasattr(self.isolator, "host_effects"):
            first, second = self.isolator.host_effects(host=host), self.isolator.host_effects(host=host)
            assert _effects_bytes(first) == _effects_bytes(second)
            assert all(effect.kind in kinds and {undo.verb for undo in effect.undo} <= VERBS.keys() for effect in first)
            assert not list(_references([effect.args for effect in first])), "nobody has found out or granted anything yet"
        if hasattr(self.isolator, "checks"):
            for check in self.isolator.checks(host=host):
                assert isinstance(check, Check)
                assert check.ok or check.hint, f"a failed check says what to do: {check}"


class ExecutorContract:
    """Inherit and set `executor` to the module with the hookimpl."""

    executor: ClassVar[ModuleType]

    def arranged(self, document: Mapping[str, Any]) -> tuple[Executor, Pod, list[ContainerSpec]]:
        """The executor, the group, its containers. A group that it refuses with a path does not count."""
        found: Executor = self.executor.executor()
        pod = parse_pod(document)
        try:
            members = list(found.arrange(pod))
        except MesoError as error:
            _check_refusal(error, "$")
            assume(condition=False)
            raise
        return found, pod, members

    def test_it_has_a_name(self) -> None:
        names.check_name(self.executor.executor().name, "$.executor")

    @_any
    @given(document=pods(max_tasks=2) | pods(max_tasks=1))
    def test_a_group_is_arranged_the_same_way_every_time_parents_first(self, document: dict[str, Any]) -> None:
        found, pod, members = self.arranged(document)
        assert members == list(found.arrange(pod))
        assert members[0].id == pod.name
        assert members[0].parent is None
        seen: set[str] = set()
        for member in members:
            assert names.parse_id(member.id)
            assert member.id not in seen
            assert member.parent is None or member.parent in seen
            assert member.path.startswith("$")
            seen.add(member.id)

    @_any
    @given(document=pods(max_tasks=2) | pods(max_tasks=1), data=st.data())
    def test_in_whatever_order_members_end_nobody_is_left_over(self, document: dict[str, Any], data: st.DataObject) -> None:
        found, _, arranged = self.arranged(document)
        members = {member.id: member for member in arranged}
        waits: dict[str, Wait] = {}
        killed: set[str] = set()
        while len(waits) < len(members):
            can_end = [name for name in members if name not in waits and (name in killed or not members[name].is_pause)]
            assert can_end, f"only waiting containers are left, and nobody ends them: {members.keys() - waits.keys()}"
            ended = data.draw(st.sampled_from(can_end))
            code = data.draw(st.sampled_from([0, 1]))
            _end(
                members,
                waits,
                ended,
                Wait(ended, reason="group", signal=15) if ended in killed else Wait(ended, reason="exited", exit=code),
            )
            view = GroupView(arranged[0].id, tuple(arranged), dict(waits), frozenset(killed))
            kills = list(found.react(view, ended))
            assert kills == list(found.react(view, ended))
            for kill in kills:
                assert kill.id in members, "only members of the group are its business"
                assert kill.id not in waits, "what has ended is not told to end"
                assert kill.id not in killed, "what is told to end is told once"
                killed |= {name for name in members if names.is_within(name, kill.id)}


def _check_refusal(error: MesoError, path: str) -> None:
    assert str(error.fields.get("path", "")).startswith(path), f"a refusal names the field: {error!r}"
    json.dumps(error.as_object())


def _end(members: Mapping[str, ContainerSpec], waits: dict[str, Wait], ended: str, wait: Wait) -> None:
    """A container ends, and all below it with it."""
    for name in members:
        if name != ended and names.is_within(name, ended) and name not in waits:
            waits[name] = Wait(name, signal=9, reason="parent")
    waits[ended] = wait


def _bytes(contract: IsolatorContract, container: ContainerSpec, parent: ContainerSpec | None, host: HostFacts) -> bytes:
    try:
        plan = contract.planned(container, parent, host)
    except MesoError as error:
        return json.dumps(error.as_object()).encode()
    return json.dumps(plan_as_data(merge(container.id, container.namespaces, [("tried", plan)]))).encode()


def _effects_bytes(effects: Iterable[Effect]) -> bytes:
    return json.dumps([[effect.kind, as_data(effect.args), effect.undo] for effect in effects]).encode()


def _references(value: Any) -> Iterator[Fact | Grant]:
    if isinstance(value, (Fact, Grant)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)


def _check_undo(effect: Effect, container: ContainerSpec) -> None:
    for undo in effect.undo:
        assert undo.verb in VERBS, f"no such undo: {undo.verb}"
        assert undo.target.startswith("/"), f"an undo has an absolute path: {undo.target}"
        own = container.id in undo.target.split("/") or container.id.replace(".", "/") in undo.target
        assert own, f"only what is the container's own is undone when it ends: {undo.target}"


_TOUCHING = ("open", "os.", "socket.", "subprocess.", "shutil.", "ctypes.dlopen", "sqlite3.")
_log: list[str] | None = None
_installed = False


@contextmanager
def _watched() -> Iterator[list[str]]:
    """The audit events (sys.audit) of looking at or changing the machine while the block runs."""
    global _log, _installed
    if not _installed:  # an audit hook stays for good: one, which mostly sleeps
        sys.addaudithook(_hear)
        _installed = True
    found: list[str] = []
    _log = found
    try:
        yield found
    finally:
        _log = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _log is not None and event.startswith(_TOUCHING):
        _log.append(f"{event} {arguments}")
