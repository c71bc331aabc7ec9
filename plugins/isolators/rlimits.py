"""Resource limits of setrlimit(2).

What lives here: limits the kernel counts per process or per user. Limits of a whole container are cgroups'.

A hard limit can only be lowered (raising it takes CAP_SYS_RESOURCE on the host, which no container has), so one
above the agent's own is refused while planning. What is not asked for is inherited, except core files: a
program may raise the soft limit back, but by default a crash leaves nothing behind in a directory or with the
host's crash handler; and open files, of which the agent and its launcher allow themselves more than programs expect.
"""

from __future__ import annotations

from collections.abc import Mapping

from mesocosm.kernel import Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.containers import RLIMITS, UNLIMITED
from mesocosm.kernel.core.errors import UnsupportedError

SOFT_FILES = 1024  # what select(2) can take, and what every login has: programs that want more raise it


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
    """One rlimit step for each limit that was asked for, and for core and nofile."""
    if container.is_pause:
        return None
    asked = dict(container.rlimits)
    if "core" not in asked and "core" in host.rlimits:
        asked["core"] = (0, _unsigned(host.rlimits["core"][1]))
    if "nofile" not in asked and "nofile" in host.rlimits:
        most = _unsigned(host.rlimits["nofile"][1])
        asked["nofile"] = (min(SOFT_FILES, most), most)
    steps = []
    for name in sorted(asked, key=RLIMITS.index):
        soft, hard = asked[name]
        most = _unsigned(host.rlimits[name][1]) if name in host.rlimits else UNLIMITED
        if hard > most:
            raise UnsupportedError(
                f"the limit {name} is above what the agent itself has",
                path=f"{container.path}.limits.{name}",
                have=_show(most),
                need=_show(hard),
                hint=f"raise it for the agent (its service's Limit…= setting, or ulimit -H) or ask for {_show(most)} or less",
            )
        steps.append(Step("rlimit", {"resource": name, "soft": soft, "hard": hard}))
    return Plan(setup=steps)


def _unsigned(value: int) -> int:
    """getrlimit(2) of Python says -1 for no limit."""
    return UNLIMITED if value < 0 else value


def _show(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)
