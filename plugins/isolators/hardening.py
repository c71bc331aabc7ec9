"""What a process may do: capabilities, identity, the dangerous corners of /proc, its keys.

What lives here: everything that takes power away just before the program starts. What does not: the user
namespace (namespaces), the view of the host's files (rootfs).

Five capability sets decide (capabilities(7)): the bounding set loses all that is not granted, so no program
with file capabilities brings it back; permitted and effective become what is granted; inheritable and ambient
end empty. A user other than root has none after execve: giving it some would take the ambient set, which this
build refuses rather than pretends.

The steps of the stage `identity` keep the order in which they stand here, because each needs power that the
next one gives up: bounding (needs SETPCAP), identity (SETUID), the working directory (as the user, who may be
refused), capabilities, no_new_privileges.

An ordinary user's agent has one id to give, and any number can be its name inside: who is to be somebody else than
root gets one more user namespace at that moment, which says so. It comes with a full bounding set, so there `bounding`
stands behind `identity`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel import Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import Check, ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.containers import DEFAULT_CAPABILITIES
from mesocosm.kernel.core.errors import SpecError, UnsupportedError
from mesocosm.kernel.core.plan import is_apart

# Docker's lists (moby, oci/defaults.go): files of /proc that show or steer the whole machine. Absent ones are skipped.
# Nothing of /sys is in the lists: the view of rootfs shows two harmless corners of it and no more.
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
)  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# Under memory pressure of the whole machine tasks go before agent and launcher, without whom nobody would tell.
OOM_SCORE = 100
_NUMBER = re.compile(r"[0-9]{1,10}")


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan:
    """Masks, identity, capabilities and the rest."""
    if container.is_pause:
        nothing: dict[str, Any] = {"keep": []}
        return Plan(setup=[Step("keyring"), Step("bounding", nothing), Step("capabilities", nothing), Step("no_new_privileges")])
    has_users = is_apart("user", container.namespaces.get("user", "own"), parent)
    identity = _identity(container, host, has_users=has_users)
    if host.rootless:
        identity["only"] = _only(parent) if has_users and container.namespaces.get("user") == "parent" else [0, 0]
    granted = _granted(container, host, is_root=identity["uid"] == 0, has_users=has_users)
    has_mounts = container.namespaces.get("mount", "own") == "own"
    become = [Step("bounding", {"keep": granted}), Step("identity", identity)]
    steps = [Step("oom_score", {"value": OOM_SCORE})]
    if has_mounts:
        steps += [Step("mask", {"paths": list(MASKED)}), Step("read_only", {"paths": list(READ_ONLY)})]
    steps += [
        Step("keyring"),
        *(become if "only" not in identity else reversed(become)),
        Step("working_directory", {"path": container.cwd or ("/sandbox" if has_mounts else None)}),
        Step("capabilities", {"keep": granted if identity["uid"] == 0 else []}),
        Step("no_new_privileges"),
    ]
    return Plan(setup=steps)


@hookimpl
def checks(host: HostFacts) -> Sequence[Check]:
    """Whether the agent has what it takes to hand out the default capabilities."""
    missing = [name for name in DEFAULT_CAPABILITIES if name not in host.capabilities]
    return [
        Check(
            "capabilities",
            ok=not missing,
            have=f"{len(host.capabilities)} capabilities",
            need=" ".join(DEFAULT_CAPABILITIES),
            hint=f"the agent itself lacks {' '.join(missing)}" if missing else "",
        )
    ]


def _identity(container: ContainerSpec, host: HostFacts, *, has_users: bool) -> dict[str, Any]:
    """The step's arguments: numbers, found in the host's passwd(5) when that is what the container sees."""
    path = f"{container.path}.user"
    name, colon, group = container.user.partition(":")
    if _NUMBER.fullmatch(name):
        uid = int(name)
        accounts = host.accounts.values() if container.rootfs == "host" else ()
        gid = next((account.gid for account in accounts if account.uid == uid), uid)
    elif name == "root":
        uid = gid = 0
    elif container.rootfs != "host":
        raise UnsupportedError("a user's name in a root directory that is not the host's", path=path, have=name, need="a number")
    elif name in host.accounts:
        uid, gid = host.accounts[name].uid, host.accounts[name].gid
    else:
        raise SpecError(f"{name[:40]!r} is no user here", path=path, hint="a name of /etc/passwd, or UID, or UID:GID")
    if colon:
        if not _NUMBER.fullmatch(group):
            raise SpecError(f"{group[:40]!r} is not the number of a group", path=path, hint="UID:GID")
        gid = int(group)
    if not colon and uid == 0:
        gid = 0
    count = host.uid_count if has_users and not host.rootless else 2**32 - 1
    if max(uid, gid) >= count:
        raise UnsupportedError(
            "that id does not exist in the container", path=path, have=f"0 to {count - 1}", need=str(max(uid, gid))
        )
    return {"user": container.user, "uid": uid, "gid": gid, "groups": []}


def _only(parent: ContainerPlan | None) -> list[int]:
    """[uid, gid] that the one id has in the parent's users."""
    steps = parent.setup if parent else ()
    return next(([step.args["uid"], step.args["gid"]] for step in steps if step.kind == "identity"), [0, 0])


def _granted(container: ContainerSpec, host: HostFacts, *, is_root: bool, has_users: bool) -> list[str]:
    path = f"{container.path}.capabilities"
    asked = container.capabilities
    if not is_root:
        if asked and asked != DEFAULT_CAPABILITIES:
            raise UnsupportedError(
                "capabilities for a user other than root",
                path=path,
                have=f"user {container.user}",
                need="user 0",
                hint="execve leaves only root's; run as root inside the container's own users, or ask for none",
            )
        return []
    # In users of its own a container may have any: they reach no further than those. On the host's, only the agent's.
    lacking = [] if has_users else [name for name in asked if name not in host.capabilities]
    if lacking and asked != DEFAULT_CAPABILITIES:
        have = " ".join(name for name in asked if name in host.capabilities)
        need = " ".join(lacking)
        raise UnsupportedError("the agent does not have them itself", path=path, have=have, need=need, hint="meso doctor")
    return [name for name in asked if name not in lacking]
