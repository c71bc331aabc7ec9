"""From a document to containers that may be launched: translating, arranging, planning, the checks before any change.

What lives here: everything of a launch that touches nothing. Each function raises a MesoError that names the field, or
answers values. Theory: what can be refused is refused here, where refusing is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, Executor, Translation
from mesocosm.kernel.core import names, rights
from mesocosm.kernel.core.containers import task_container
from mesocosm.kernel.core.errors import MesoError, NotFoundError, SpecError
from mesocosm.kernel.core.spec import Pod, Task, parse_pod
from mesocosm.kernel.runtime import patience

_POD_FIELDS = frozenset({"network", "role", "hostname"})


class Planning(Protocol):
    """What the agent needs of a plug-in set (kernel.sets.Planner)."""

    @property
    def executors(self) -> Mapping[str, Executor]:
        """Executors by name."""
        ...

    def translate(self, document: Mapping[str, Any], name: str) -> Translation | None:
        """The document in our own words, if a front-end knows its format."""
        ...

    def plan(self, spec: ContainerSpec, parent: ContainerPlan | None) -> ContainerPlan:
        """The merged plan of one container."""
        ...


def read_group(planner: Planning, document: Any, name: str) -> tuple[Pod, tuple[str, ...]]:
    """A pod out of any document that somebody understands, and the paths of what was left out of it."""
    if not isinstance(document, Mapping):
        raise SpecError(f"a pod file is a table, not {type(document).__name__}", path="$")
    translation = planner.translate(document, name)
    if translation is None:
        return parse_pod(document), ()
    return parse_pod(translation.pod), translation.ignored


def arrange(planner: Planning, pod: Pod) -> list[ContainerSpec]:
    """The containers of a pod, by its executor: the root first, parents before children."""
    executor = planner.executors.get(pod.executor)
    if executor is None:
        raise SpecError(
            f"there is no executor {pod.executor[:63]!r}",
            path="$.executor",
            have=pod.executor[:63],
            need=" or ".join(sorted(planner.executors)),
        )

    def arranged() -> list[ContainerSpec]:
        specs = list(executor.arrange(pod))
        _check_arrangement(specs, pod.name)
        return specs

    found: list[ContainerSpec] = patience.ask(pod.executor, "arrange", arranged)
    return found


def _check_arrangement(specs: Sequence[ContainerSpec], name: str) -> None:
    """The root first, parents before children, each once: ids of others are nobody's to give away."""
    seen: set[str] = set()
    for spec in specs:
        if type(spec) is not ContainerSpec:
            raise TypeError(f"a group is made of ContainerSpecs, not of {type(spec).__name__}")
        names.parse_id(spec.id)
        if spec.id in seen or (spec.parent not in seen if seen else spec.id != name):
            raise ValueError(f"{spec.id!r} has no place in the group {name}")
        seen.add(spec.id)
    if not seen:
        raise ValueError("a group without containers")


def plan_all(planner: Planning, specs: Sequence[ContainerSpec], above: ContainerPlan | None = None) -> list[ContainerPlan]:
    """The plans of containers whose parents come first; `above` is the plan of the one that all of them live in."""
    plans: dict[str, ContainerPlan] = {}
    for spec in specs:
        parent = spec.parent
        plans[spec.id] = planner.plan(spec, plans.get(parent or "", above))
    return list(plans.values())


def nested_containers(tasks: Sequence[Task], parent: ContainerSpec, path: str = "$") -> list[ContainerSpec]:
    """The containers of tasks (and of those nested in them) below `parent`, parents first."""
    found: list[ContainerSpec] = []
    for index, task in enumerate(tasks):
        at = f"{path}.tasks[{index}]"
        spec = task_container(task, parent, at)
        found.append(spec)
        found.extend(nested_containers(task.tasks, spec, at))
    return found


def check_rights(specs: Sequence[ContainerSpec], parent: ContainerSpec) -> list[ContainerSpec]:
    """The same containers with limits filled in; DeniedError for the first that asks for more than its parent has."""
    known = {parent.id: parent}
    for spec in specs:
        above = known[spec.parent or parent.id]
        known[spec.id] = rights.effective(spec, above)
        violations = rights.exceeds(known[spec.id], above)
        if violations:
            raise violations[0]
    return [known[spec.id] for spec in specs]


def single_document(document: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """LAUNCH_CONTAINER's {"container_id", fields of a task, fields of a pod}: the id, the task, the pod's fields."""
    if not isinstance(document, Mapping):
        raise SpecError(f"a container is a table, not {type(document).__name__}", path="$")
    container_id = document.get("container_id")
    if not isinstance(container_id, str):
        raise SpecError("'container_id' is missing", path="$.container_id")
    names.parse_id(container_id)
    task = {key: value for key, value in document.items() if key != "container_id"}
    around = {key: task.pop(key) for key in _POD_FIELDS if key in task}
    return container_id, {"name": names.leaf_of(container_id), **task}, around


def at_top(error: MesoError) -> MesoError:
    """An error about a document's only task as one about the document itself, which has no `tasks`."""
    path = error.fields.get("path")
    if isinstance(path, str) and path.startswith("$.tasks[0]"):
        error.fields["path"] = "$" + path.removeprefix("$.tasks[0]")
    return error


def known(cells: Mapping[str, Any], container_id: str) -> Any:
    """The cell of an id; SpecError for no id at all, NotFoundError for one that nobody has."""
    found = cells.get(container_id)
    if found is None:
        names.parse_id(container_id)
        raise NotFoundError(f"there is no container {container_id}", id=container_id, hint="meso ps -a shows all that are known")
    return found
