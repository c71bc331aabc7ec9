"""How the tests of planners ask: one plug-in, one container, a machine that need not exist."""

from __future__ import annotations

from types import ModuleType

import msgspec
import pytest

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts, Plan, Step
from mesocosm.kernel.core.containers import pod_container, task_container
from mesocosm.kernel.core.plan import merge
from mesocosm.kernel.core.spec import parse_pod
from mesocosm.kernel.testing import GRANTS, HOSTS
from mesocosm.plugins.isolators import cgroups, hardening, namespaces, program, rlimits, rootfs, sandbox, volumes

ISOLATORS: dict[str, ModuleType] = {
    "namespaces": namespaces, "sandbox": sandbox, "rootfs": rootfs, "cgroups": cgroups, "volumes": volumes,
    "hardening": hardening, "rlimits": rlimits, "program": program,
}  # fmt: skip


class Planning:
    """Containers as users write them, and what the default set makes of them on a machine of choice."""

    host = HOSTS["root, hybrid"]

    def pod(self, **fields: object) -> ContainerSpec:
        """The container of a pod named web."""
        return pod_container(parse_pod({"name": "web", "tasks": [{"name": "a", "command": ["true"]}], **fields}))

    def task(self, parent: ContainerSpec | None = None, **fields: object) -> ContainerSpec:
        """Its task `a`."""
        document = {"name": "web", "tasks": [{"name": "a", "command": ["true"], **fields}]}
        return task_container(parse_pod(document).tasks[0], parent or self.pod(), "$.tasks[0]")

    def single(self, **fields: object) -> ContainerSpec:
        """A root container that runs a program."""
        return msgspec.structs.replace(ContainerSpec(id="one", command=("true",), path="$.tasks[0]"), **fields)

    def whole(self, container: ContainerSpec, parent: ContainerPlan | None = None, host: HostFacts | None = None) -> ContainerPlan:
        """The merged plan of all isolators of the default set."""
        plans = [(name, module.plan(container, parent, host or self.host, GRANTS) or Plan()) for name, module in ISOLATORS.items()]
        return merge(container.id, container.namespaces, plans)

    def ask(
        self, isolator: ModuleType, container: ContainerSpec, *, host: HostFacts | None = None, parent: ContainerPlan | None = None
    ) -> Plan:
        """One isolator's part; the parent of a nested container is the pod, planned with the whole set, unless given."""
        if parent is None and container.parent:
            parent = self.whole(self.pod(), None, host)
        answer: Plan = isolator.plan(container, parent, host or self.host, GRANTS) or Plan()
        return answer

    def steps(self, plan: Plan | ContainerPlan, kind: str) -> list[Step]:
        """The steps of one kind."""
        return [step for step in plan.setup if step.kind == kind]

    def args(self, plan: Plan | ContainerPlan, kind: str) -> dict[str, object]:
        """The arguments of the only step of a kind."""
        (step,) = self.steps(plan, kind)
        return step.args


@pytest.fixture
def p() -> Planning:
    """The way to ask."""
    return Planning()
