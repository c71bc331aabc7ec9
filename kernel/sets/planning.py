"""Asking isolators for plans, and merging their answers.

What lives here: the order of asking, and whose fault an exception is. Theory: planning is on the path of every
launch, and pluggy's own call costs more than most isolators, so the functions are looked up once, in the set's order.
Neither this nor anything it calls touches the machine: `meso plan` and a launch use the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pluggy

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, EffectKind, Executor, HostFacts, SlowEffectKind, Translation
from mesocosm.kernel.core.plan import Effect, Grant, Plan, merge, plan_as_data
from mesocosm.kernel.runtime import admission, patience
from mesocosm.kernel.runtime.patience import Patience
from mesocosm.kernel.sets.loading import Plugins, ask

_STRETCH = 16  # containers that are planned at once: some milliseconds
GRANTS: Mapping[str, Grant] = {name: Grant(name) for name in ("uid_base", "uid_count")}
PARTS = 10_000  # of one isolator for one container: twenty times what a pod file can ask for
PlanFunction = Callable[[ContainerSpec, "ContainerPlan | None", HostFacts, Mapping[str, Grant]], "Plan | None"]


class Planner:
    """A set's plug-ins on one host."""

    def __init__(self, plugins: Plugins, host: HostFacts) -> None:
        self._plugins = plugins
        self._host = host
        self.executors: Mapping[str, Executor] = plugins.executors
        self.kinds: Mapping[str, EffectKind | SlowEffectKind] = plugins.kinds
        self.report: Sequence[dict[str, Any]] = plugins.report
        self._functions = [
            (loaded.name, _in_order(implementation))
            for loaded in plugins.isolators
            for implementation in plugins.implementations(loaded, "plan")
        ]

    def plan(self, spec: ContainerSpec, parent: ContainerPlan | None) -> ContainerPlan:
        """The merged plan of one container; a MesoError names the plug-in that refused, and the container."""
        plans: list[tuple[str, Plan]] = []
        name = ""
        try:
            with Patience(patience.HOOK_SECONDS):  # for all of them together: it costs as much as a quick one of them
                for name, function in self._functions:
                    answer = function(spec, parent, self._host, GRANTS)
                    if answer is not None:
                        if type(answer) is not Plan:
                            raise TypeError(f"an isolator answers a Plan or None, not {type(answer).__name__}")
                        if len(answer.effects) + len(answer.setup) > PARTS:
                            raise ValueError(f"more than {PARTS} effects and steps for one container")
                        plans.append((name, answer))
                name = ""
                return merge(spec.id, spec.namespaces, plans)
        except BaseException as error:  # as patience.ask
            raise patience.blamed(error, name or _unmergeable(spec, plans), "plan", id=spec.id) from error

    def plan_document(self, document: Any, name: str = "pod") -> dict[str, Any]:
        """``plan --json`` of a document in any format that a front-end of the set knows."""
        *_, planned = self.plan_by_and_by(document, name)
        return planned

    def plan_by_and_by(self, document: Any, name: str = "pod") -> Iterator[dict[str, Any]]:
        """The same as it grows, a stretch at a time, for a caller that others wait for: what comes last is whole."""
        pod, ignored = admission.read_group(self, document, name)
        planned: dict[str, Any] = {"v": 1, "group": pod.name, "containers": []}
        if ignored:
            planned["ignored"] = list(ignored)
        for number, plan in enumerate(admission.plan_each(self, admission.arrange(self, pod)), 1):
            planned["containers"].append(plan_as_data(plan))
            if number % _STRETCH == 0:
                yield planned
        yield planned

    def translate(self, document: Mapping[str, Any], name: str) -> Translation | None:
        """The first front-end's answer; None if none knows the format (ours, then)."""
        for loaded in self._plugins.frontends:
            for implementation in self._plugins.implementations(loaded, "translate"):
                call = partial(_translation, implementation, {"document": document, "name": name})
                answer: Translation | None = patience.ask(loaded.name, "translate", call)
                if answer is not None:
                    return answer
        return None

    def host_effects(self) -> list[Effect]:
        """What all containers share, in the set's order; a MesoError names the plug-in that could not say."""
        found: list[Effect] = []
        for loaded in self._plugins.isolators:
            for implementation in self._plugins.implementations(loaded, "host_effects"):
                call = partial(_shared, implementation, {"host": self._host}, loaded.name)
                found += patience.ask(loaded.name, "host_effects", call)
        return found


def _translation(implementation: pluggy.HookImpl, given: Mapping[str, Any]) -> Translation | None:
    answer = ask(implementation, given)
    if answer is not None and not (type(answer) is Translation and type(answer.pod) is dict):
        raise TypeError(f"a front-end answers a Translation or None, not {type(answer).__name__}")
    return answer


def _shared(implementation: pluggy.HookImpl, given: Mapping[str, Any], plugin: str) -> list[Effect]:
    return [Effect(effect.kind, effect.args, effect.undo, effect.keep, plugin) for effect in ask(implementation, given)]


def _unmergeable(spec: ContainerSpec, plans: Sequence[tuple[str, Plan]]) -> str:
    """Whose plan it is that cannot be merged. Asked when that has happened."""
    for count, (name, _) in enumerate(plans, 1):
        try:
            merge(spec.id, spec.namespaces, plans[:count])
        except Exception:
            return name
    return "?"


def _in_order(implementation: Any) -> PlanFunction:
    """A hookimpl that may take fewer arguments, as a function of all four."""
    function: PlanFunction = implementation.function
    names = tuple(implementation.argnames)
    if names == ("container", "parent", "host", "grants"):
        return function

    def call(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
        given = {"container": container, "parent": parent, "host": host, "grants": grants}
        return implementation.function(*[given[name] for name in names])  # type: ignore[no-any-return]

    return call
