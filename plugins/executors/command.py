"""One program, one container, no pod around it: `meso run -- CMD` and standalone containers.

What lives here: the group of one. What does not: groups of more, which need somebody to hold what they share.
"""

from __future__ import annotations

from collections.abc import Sequence

from mesocosm.kernel import hookimpl
from mesocosm.kernel.contracts import ContainerSpec, Executor, GroupView, Kill, Pod
from mesocosm.kernel.core.containers import single_container
from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.core.spec import Resources

_HINT = 'executor = "default" makes a pod of them'


class CommandExecutor:
    """Single programs."""

    name = "command"

    def arrange(self, pod: Pod) -> Sequence[ContainerSpec]:
        """The container of the only task, named like the group. SpecError for more than one."""
        if len(pod.tasks) != 1:
            raise SpecError("the command executor runs one task", path="$.tasks", have=str(len(pod.tasks)), need="1", hint=_HINT)
        if pod.tasks[0].tasks:
            raise SpecError("the command executor nests nothing", path="$.tasks[0].tasks", need="no nested tasks", hint=_HINT)
        if pod.resources != Resources():
            hint = "write them into the task: they are the same container"
            raise SpecError("the command executor has no pod to limit", path="$.resources", hint=hint)
        return [single_container(pod, pod.tasks[0], "$.tasks[0]")]

    def react(self, group: GroupView, ended: str) -> Sequence[Kill]:
        """Nothing: there is nobody else."""
        return []


@hookimpl
def executor() -> Executor:
    """The executor `command`."""
    return CommandExecutor()
