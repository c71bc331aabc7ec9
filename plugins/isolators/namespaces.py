"""Which namespaces a container owns, which it enters, and when.

What lives here: the decision, field by field, and the steps that follow from it. What does not: mounts (rootfs),
ids inside (hardening), the cgroups themselves.

Theory, in the order in which the steps act:

* `clone` makes what must exist from the first instruction: mounts, process ids, clock. The host's root makes
  them, so they belong to the host's users for good: root inside can neither mount nor unmount, ever.
* `join` enters the parent's namespaces. "parent" of a root container is the host, and entering where one already
  is would be an error (setns of a user namespace) or a waste, so a join is planned only for kinds in which the
  parent really differs from the host. One case is special: process ids nest, so a nested container that owns
  its own must be born inside its parent's; "pid" then stands in both steps.
* `unshare` makes the cgroup namespace once the process is in its cgroup, which so becomes the root of the view.
* `new_user` or `join_user` gives up all power over everything made so far.
* `own` makes network, IPC and host name last, inside the user namespace: they belong to its root, and its
  capabilities (NET_ADMIN, NET_BIND_SERVICE) mean something there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mesocosm.kernel import Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import Check, ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.errors import UnsupportedError
from mesocosm.kernel.core.spec import NAMESPACES

_AT_CLONE = ("mount", "pid", "time")
_AFTER_USER = ("net", "ipc", "uts")
_JOINABLE = ("mount", "pid", "uts", "ipc", "net", "cgroup", "time")


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan:
    """clone, join, unshare, users, own, host name, loopback, session."""
    apart = parent.unshared if parent else frozenset()
    shares = _shares(container, parent)
    _check_host(container, host, shares)
    steps = [Step("clone", {"namespaces": [kind for kind in _AT_CLONE if shares[kind] == "own"]})]
    entered = [kind for kind in _JOINABLE if shares[kind] == "parent" and kind in apart]
    if shares["pid"] == "own" and "pid" in apart:
        entered = [kind for kind in _JOINABLE if kind in entered or kind == "pid"]
    if entered:
        steps.append(Step("join", {"namespaces": entered, "of": container.parent}))
    if shares["mount"] == "host" or (shares["mount"] == "parent" and "mount" not in apart):
        steps.append(Step("join", {"namespaces": ["mount"], "of": "host"}))
    if shares["cgroup"] == "own":
        steps.append(Step("unshare", {"namespaces": ["cgroup"]}))
    steps += _users(container, shares["user"], apart, grants)
    if owned := [kind for kind in _AFTER_USER if shares[kind] == "own"]:
        steps.append(Step("own", {"namespaces": owned}))
    if shares["uts"] == "own":
        steps.append(Step("hostname", {"name": container.hostname}))
    if shares["net"] == "own":
        steps.append(Step("loopback"))
    steps.append(Step("session"))
    return Plan(setup=steps)


@hookimpl
def checks(host: HostFacts) -> Sequence[Check]:
    """Whether every kind of namespace is there, and ids for containers to have users of their own."""
    missing = [kind for kind in NAMESPACES if kind not in host.namespaces]
    ids = "your own id only" if host.rootless else f"{host.uid_ranges} ranges of {host.uid_count} ids"
    return [
        Check(
            "namespaces",
            ok=not missing,
            have=" ".join(kind for kind in NAMESPACES if kind in host.namespaces),
            need=" ".join(NAMESPACES),
            hint=f"this kernel was built without {' '.join(missing)}: share those with the host" if missing else "",
        ),
        Check(
            "users",
            ok=host.rootless or host.uid_ranges > 0,
            have=ids,
            need="a range of ids for each pod, or an ordinary user's own id",
            hint="" if host.rootless or host.uid_ranges else "give the agent a pool of ids that nobody on the host uses",
        ),
    ]


def _shares(container: ContainerSpec, parent: ContainerPlan | None) -> dict[str, str]:
    """own, parent or host for every kind; a root container's parent is the host."""
    shares = {kind: container.namespaces.get(kind, "own") for kind in NAMESPACES}
    if parent is None:
        return {kind: "host" if share == "parent" else share for kind, share in shares.items()}
    if shares["mount"] == "parent" and any(step.kind == "pause" for step in parent.setup):
        raise UnsupportedError(
            "a pod's own container has no files to share",
            path=f"{container.path}.namespaces.mount",
            have="parent",
            need="own or host",
            hint="use a shared volume: volumes = [{ source = 'shared:NAME', target = '/data' }]",
        )
    return shares


def _check_host(container: ContainerSpec, host: HostFacts, shares: Mapping[str, str]) -> None:
    for kind, share in shares.items():
        if share == "own" and kind not in host.namespaces:
            raise UnsupportedError(
                f"this kernel has no {kind} namespaces",
                path=f"{container.path}.namespaces.{kind}",
                have=" ".join(sorted(host.namespaces)),
                need=kind,
                hint=f'namespaces = {{ {kind} = "host" }} shares the host\'s; meso doctor shows what is there',
            )


def _users(container: ContainerSpec, share: str, apart: frozenset[str], grants: Mapping[str, Grant]) -> list[Step]:
    if share == "own" and "user" in apart:
        # The parent's range is all it has: a range within it would have to be cut, and its maps written from inside.
        raise UnsupportedError(
            "users of its own below a parent with users of its own",
            path=f"{container.path}.namespaces.user",
            have="own",
            need="parent",
            hint='leave it out: a nested container shares the users of its pod. Or give the pod namespaces = { user = "host" }',
        )
    if share == "own":
        return [Step("new_user", {"base": grants["uid_base"], "count": grants["uid_count"]})]
    if share == "parent" and "user" in apart:
        return [Step("join_user", {"of": container.parent, "count": grants["uid_count"]})]
    return []
