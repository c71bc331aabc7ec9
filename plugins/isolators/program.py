"""The last three steps of every container: is the program there, wait for the others, become it.

What lives here: argv, the environment's base, `pause`. What does not: who the process is by then (hardening).

The environment starts empty: nothing of the agent's own leaks into a container. PATH, HOME, HOSTNAME and TERM
are given; a task's own variables win over all of them. HOME is root's home for root and the sandbox for
everybody else, because that is the one directory that is certainly there and certainly theirs.

Arguments and environment that execve would refuse (E2BIG) are refused here, since execve comes when the other members
of the group are running already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mesocosm.kernel import Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.containers import UNLIMITED
from mesocosm.kernel.core.errors import SpecError, UnsupportedError
from mesocosm.kernel.core.resources import show_size

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# fs/exec.c, bprm_stack_limits: a quarter of the stack limit, not more than _MOST, and _LEAST in any case.
_MOST, _LEAST = 6 * 2**20, 128 * 2**10
_RESERVE = 4096  # for what `#!` lines add, the variables of other isolators and the name of the program


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan:
    """check, barrier, exec; for a pod's own container barrier and pause."""
    for field, what in (("init", "an init process"), ("api", "a socket of its own")):
        if getattr(container, field):
            raise UnsupportedError(
                f"this build cannot give a container {what} yet",
                path=f"{container.path}.{field}",
                have="true",
                need="false",
                hint=f"leave {field} out",
            )
    if container.is_pause:
        return Plan(setup=[Step("barrier"), Step("pause")])
    argv = list(container.command)
    path = container.env.get("PATH", DEFAULT_PATH)
    is_root = container.user.partition(":")[0] in ("0", "root")
    _check_size(container, host)
    return Plan(
        setup=[
            Step("check", {"argv": argv[:1], "path": path, "execve_check": host.has("execve_check")}),
            Step("barrier"),
            Step("exec", {"argv": argv, "env": dict(container.env)}),
        ],
        env={
            "PATH": DEFAULT_PATH,
            "HOME": "/root" if is_root else "/sandbox",
            "HOSTNAME": container.hostname,
            "TERM": "dumb",  # output goes to a file: nobody is there to interpret escape sequences
        },
    )


def _check_size(container: ContainerSpec, host: HostFacts) -> None:
    """SpecError if arguments and environment are more than execve takes with the container's stack limit."""
    size = _size(container.command) + _size(f"{key}={value}" for key, value in container.env.items())
    stack = (container.rlimits.get("stack") or host.rlimits.get("stack") or (-1, -1))[0]
    if stack < 0:
        stack = UNLIMITED
    most = min(stack, max(_LEAST, min(_MOST, stack // 4)) - _RESERVE)
    if size > most:
        raise SpecError(
            "arguments and environment are longer together than execve takes",
            path=f"{container.path}.command",
            have=show_size(size),
            need=f"≤ {show_size(most)}" + ("" if stack == UNLIMITED else f", with a stack limit of {show_size(stack)}"),
            hint="raise limits.stack, of which a quarter may be taken by them; or put them into a file",
        )


def _size(strings: Iterable[str]) -> int:
    """Bytes on the new stack: each string with its NUL, and its pointer."""
    return sum(len(text.encode()) + 9 for text in strings)
