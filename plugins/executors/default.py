"""A group as a pod: one container that holds what is shared, and a nested container for each task.

What lives here: who is whose parent, and what one member's end means for the others. What does not: signals,
deadlines and the order of dying, which are the kernel's.

The rules, for every level alike:

* an essential member that fails (any end but exit 0) has failed its parent: what the parent holds ends too, and
  if that parent is essential itself, it has failed in turn, up to the pod. Each by its own kill policy;
* a member that finishes, or one that is not essential, ends nothing but what is nested in it;
* the pod's own container only waits: it goes when every task has; the last one's failure is the pod's, too;
* sidecars serve the others: when only they are left, the pod's container is asked to go, and they go first, each by its
  own kill policy. Without others to serve they are members like any.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesocosm.kernel import hookimpl
from mesocosm.kernel.contracts import ContainerSpec, Executor, GroupView, Kill, Pod
from mesocosm.kernel.core.containers import pod_container, task_container
from mesocosm.kernel.core.spec import Task

_CONSEQUENCES = frozenset({"group", "parent", "rolled_back"})  # ends that were decided on before: they decide nothing more


class DefaultExecutor:
    """Pods."""

    name = "default"

    def arrange(self, pod: Pod) -> Sequence[ContainerSpec]:
        """The pod's container, then each task before what is nested in it."""
        root = pod_container(pod)
        return [root, *_below(root, pod.tasks, "$")]

    def react(self, group: GroupView, ended: str) -> Sequence[Kill]:
        """What ends because `ended` did."""
        members = {member.id: member for member in group.members}
        root = group.members[0].id
        wait = group.waits.get(ended)
        if ended not in members or ended == root or wait is None:
            return []  # with the pod's own container all others go: no need to say so
        if wait.reason == "parent" and members[ended].parent not in group.waits:
            return []  # its parent's end, which decides, is told after it: the kernel kills what is nested first
        scope = ended
        if not wait.succeeded and wait.reason not in _CONSEQUENCES:
            while scope != root and members[scope].essential:
                scope = members[scope].parent or root
        if all(name in group.waits for name in _awaited(group)):
            return _kills(group, [root], ended if scope == root else None)
        if scope == ended:
            return []
        if scope != root:
            return _kills(group, [scope], ended)
        # Its tasks first: the pod's container is init of their process ids, and would take them along at once.
        # If none of them lives, the pod's container goes now, and the blame with it: what is left is below the one that failed.
        tasks = [name for name in members if members[name].parent == root]
        return _kills(group, tasks, ended) or ([] if _any_living(group, tasks) else _kills(group, [root], ended))


def _below(parent: ContainerSpec, tasks: Sequence[Task], path: str) -> list[ContainerSpec]:
    found = []
    for index, task in enumerate(tasks):
        at = f"{path}.tasks[{index}]"
        container = task_container(task, parent, at)
        found += [container, *_below(container, task.tasks, at)]
    return found


def _awaited(group: GroupView) -> list[str]:
    """The members whose end is the pod's."""
    tasks = group.members[1:]
    return [task.id for task in tasks if not task.sidecar] or [task.id for task in tasks]


def _any_living(group: GroupView, names: Sequence[str]) -> bool:
    return any(name not in group.waits for name in names)


def _kills(group: GroupView, names: Sequence[str], blame: str | None) -> list[Kill]:
    living = [name for name in names if name not in group.waits and name not in group.killed]
    return [Kill(name, "group", blame) for name in living]


@hookimpl
def executor() -> Executor:
    """The executor `default`."""
    return DefaultExecutor()
