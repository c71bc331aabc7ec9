"""The last three steps of every container: is the program there, wait for the others, become it.

What lives here: argv, the environment's base, `pause`. What does not: who the process is by then (hardening).

The environment starts empty: nothing of the agent's own leaks into a container. PATH, HOME, HOSTNAME and TERM
are given; a task's own variables win over all of them. HOME is root's home for root and the sandbox for
everybody else, because that is the one directory that is certainly there and certainly theirs.
"""

from __future__ import annotations

from collections.abc import Mapping

from mesocosm.kernel import Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.errors import SpecError, UnsupportedError

_ARG_MAX = 128 * 1024  # what execve(2) takes however small the stack may be
_POINTER = 8
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


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
    _check_length(container, host)
    path = container.env.get("PATH", DEFAULT_PATH)
    is_root = container.user.partition(":")[0] in ("0", "root")
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


def _check_length(container: ContainerSpec, host: HostFacts) -> None:
    """Refuses what execve(2) would refuse as too long once the barrier is open.

    Strings, and a pointer to each, get a quarter of the stack limit, at least 128 KiB and at most 6 MiB.
    """
    texts = [*container.command, *(f"{name}={value}" for name, value in container.env.items())]
    length = sum(len(text.encode()) + 1 + _POINTER for text in texts)
    stack = container.rlimits["stack"][0] if "stack" in container.rlimits else host.rlimits.get("stack", (-1, -1))[0]
    most = min(6 * 2**20, max(_ARG_MAX, stack // 4)) if stack >= 0 else 6 * 2**20
    if length > most:
        raise SpecError(
            "command and environment are longer than execve takes",
            path=f"{container.path}.command",
            have=f"{length} bytes, with {_POINTER} for each string's address",
            need=f"≤ {most}, which is what a stack limit of {'any size' if stack < 0 else stack} allows",
            hint="put it into a file, or raise limits.stack",
        )
