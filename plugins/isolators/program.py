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
from mesocosm.kernel.core.errors import UnsupportedError

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
