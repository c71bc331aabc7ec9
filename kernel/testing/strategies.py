"""What planners are tried with: a few machines and containers chosen by hand, and any number by Hypothesis.

HOSTS are the kinds of machine that differ for planning. CONTAINERS are pairs (container, its parent or None).
`containers()` and `pods()` draw others. Nothing here looks at the machine it runs on.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import msgspec
from hypothesis import strategies as st

from mesocosm.kernel.core.containers import (
    CAPABILITIES,
    NESTED_SHARES,
    RLIMITS,
    UNLIMITED,
    ContainerSpec,
    VolumeMount,
)
from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.core.host import Account, CgroupFacts, HostFacts
from mesocosm.kernel.core.plan import ContainerPlan, Grant, Plan, Step, merge
from mesocosm.kernel.core.spec import NAMESPACES

GRANTS = {"uid_base": Grant("uid_base"), "uid_count": Grant("uid_count")}

_ALL = ("cpu", "memory", "pids")
_V1 = CgroupFacts(mode="v1", v1={name: f"/sys/fs/cgroup/{name}" for name in _ALL}, limits=_ALL)
_USER = "/sys/fs/cgroup/user.slice/user-1000.slice/agent.scope"
_ROOT = HostFacts(
    run_id="a1b2c3",
    namespaces=frozenset(NAMESPACES),
    capabilities=frozenset(CAPABILITIES) - {"SYS_RESOURCE"},
    cgroups=CgroupFacts(mode="v2", v2="/sys/fs/cgroup", limits=_ALL),
    uid_ranges=1000,
    uid_count=65_536,
    features=frozenset({"cgroup_kill", "overlay", "execve_check"}),
    listing={
        "/": {
            "bin": "-> usr/bin", "boot": "dir", "dev": "dir", "etc": "dir", "home": "dir", "lib": "-> usr/lib",
            "lib64": "-> usr/lib64", "opt": "dir",
            "proc": "dir", "root": "dir", "sbin": "-> usr/sbin", "sys": "dir", "usr": "dir", "work": "dir",
        },
        "/etc": {
            "alternatives": "dir", "group": "file", "hosts": "file", "ld.so.cache": "file",
            "localtime": "-> /usr/share/zoneinfo/UTC", "os-release": "-> ../usr/lib/os-release", "passwd": "file",
            "resolv.conf": "-> ../run/systemd/resolve/stub-resolv.conf",
            "shadow": "file", "ssh": "dir", "ssl": "dir", "sudoers": "file",
        },
    },
    rlimits={name: (1024, 524_288) if name == "nofile" else (-1, -1) for name in RLIMITS},
    accounts={"root": Account(0, 0, "/root"), "nobody": Account(65_534, 65_534, "/none"), "www": Account(33, 33, "/var/www")},
    memory=8 * 2**30,
    cpus=2,
)  # fmt: skip

HOSTS: dict[str, HostFacts] = {
    "root, cgroup v2": _ROOT,
    "root, cgroup v1": msgspec.structs.replace(_ROOT, cgroups=_V1),
    "root, hybrid": msgspec.structs.replace(
        _ROOT, cgroups=msgspec.structs.replace(_V1, mode="hybrid", v2="/sys/fs/cgroup/unified")
    ),
    "root, no cgroups": msgspec.structs.replace(_ROOT, cgroups=CgroupFacts(reason="no cgroup file system is mounted")),
    "root, old kernel": msgspec.structs.replace(_ROOT, namespaces=frozenset(NAMESPACES) - {"time", "cgroup"}, features=frozenset()),
    "user, delegated": msgspec.structs.replace(
        _ROOT, uid=1000, rootless=True, uid_ranges=0, uid_count=1, run_dir="/run/user/1000/mesocosm",
        cgroups=CgroupFacts(mode="v2", v2=_USER, limits=("memory", "pids"), reason="cpu is not delegated"),
    ),
    "user, nothing": msgspec.structs.replace(
        _ROOT, uid=1000, rootless=True, uid_ranges=0, uid_count=1, run_dir="/run/user/1000/mesocosm",
        cgroups=CgroupFacts(reason="not ours"),
    ),
    "nothing known": HostFacts(),
}  # fmt: skip


def _nested(container_id: str, path: str, **fields: Any) -> ContainerSpec:
    return ContainerSpec(
        **({"id": container_id, "path": path, "command": ("sleep", "9"), "namespaces": dict(NESTED_SHARES)} | fields)
    )


_POD = ContainerSpec(id="web", hostname="web", has_children=True)
_OUTER = _nested("web.app", "$.tasks[0]", has_children=True)
_VOLUMES = (
    VolumeMount("shared", "data", "/data"),
    VolumeMount("host", "/srv/site", "/srv/site", read_only=True),
    VolumeMount("tmpfs", "1MiB", "/tmp/cache", size=2**20),
)

CONTAINERS: dict[str, tuple[ContainerSpec, ContainerSpec | None]] = {
    "a pod": (_POD, None),
    "a task": (_nested("web.db", "$.tasks[1]", cpus=500, memory=64 * 2**20, pids=64), _POD),
    "a task with tasks": (_OUTER, _POD),
    "a task of a task": (_nested("web.app.helper", "$.tasks[0].tasks[0]", memory=2**20), _OUTER),
    "a single program": (ContainerSpec(id="one", command=("true",), path="$.tasks[0]"), None),
    "with volumes": (_nested("web.files", "$.tasks[2]", volumes=_VOLUMES), _POD),
    "as a user": (_nested("web.user", "$.tasks[3]", user="www", cwd="/tmp"), _POD),
    "with limits": (_nested("web.limits", "$.tasks[4]", rlimits={"nofile": (64, 128), "core": (0, 0)}), _POD),
    "with too high a limit": (_nested("web.high", "$.tasks[5]", rlimits={"nofile": (64, UNLIMITED)}), _POD),
    "with a directory": (_nested("web.dir", "$.tasks[6]", rootfs="/srv/root", read_only=True), _POD),
    "on the host's network": (
        ContainerSpec(id="net", command=("true",), namespaces={**ContainerSpec(id="x").namespaces, "net": "host"}),
        None,
    ),
    "in the host's users": (ContainerSpec(id="bare", command=("true",), namespaces=dict.fromkeys(NAMESPACES, "host")), None),
    "in its parent's mounts": (
        _nested("web.app.peek", "$.tasks[0].tasks[1]", namespaces=dict.fromkeys(NAMESPACES, "parent")),
        _OUTER,
    ),
    "with labels": (_nested("web.labelled", "$.tasks[7]", labels={"team": "a", "cache": "64MiB"}, env={"A": "1"}), _POD),
}


def parent_plan(isolator: ModuleType, parent: ContainerSpec | None, host: HostFacts) -> ContainerPlan | None:
    """The merged plan of a parent as an isolator would see it: namespaces made as its spec says, and the isolator's own part."""
    if parent is None:
        return None
    shares = parent.namespaces
    owned = [kind for kind in NAMESPACES if kind != "user" and shares.get(kind, "own") == "own"]
    steps = [Step("clone", {"namespaces": owned})]
    if shares.get("user") == "own":
        steps.append(Step("new_user", {"base": GRANTS["uid_base"], "count": GRANTS["uid_count"]}))
    elif shares.get("user") == "parent" and parent.parent:
        steps.append(Step("join_user", {"of": parent.parent, "count": GRANTS["uid_count"]}))
    try:
        grand = parent_plan(isolator, _POD if parent.parent == _POD.id else None, host)
        own = isolator.plan(container=parent, parent=grand, host=host, grants=GRANTS)
    except MesoError:
        own = None
    return merge(parent.id, shares, [("namespaces", Plan(setup=steps)), ("tried", own or Plan())])


_names = st.from_regex(r"[a-z][a-z0-9_-]{0,12}", fullmatch=True)
_paths = st.lists(_names, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
_share = st.sampled_from(["own", "parent", "host"])
_volumes = st.builds(
    VolumeMount, st.sampled_from(["shared", "host", "tmpfs", "volume"]), _names, _paths, st.booleans(), st.integers(1, 2**30)
)


def containers() -> st.SearchStrategy[tuple[ContainerSpec, ContainerSpec | None]]:
    """Any program's container, as a root container or nested in a pod: (container, parent)."""
    spec = st.builds(
        ContainerSpec,
        id=st.just("web.any"),
        path=st.just("$.tasks[0]"),
        command=st.lists(
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=4
        ).map(tuple),
        env=st.dictionaries(_names, _names, max_size=3),
        user=st.sampled_from(["0", "root", "nobody", "33", "33:33", "70000", "who"]),
        cwd=st.none() | _paths,
        rootfs=st.sampled_from(["host", "/srv/root"]),
        image=st.none() | st.just("debian:12"),
        read_only=st.booleans(),
        hostname=_names,
        namespaces=st.fixed_dictionaries(dict.fromkeys(NAMESPACES, _share)),
        cpus=st.none() | st.integers(1, 10**6),
        memory=st.none() | st.integers(1, 2**50),
        pids=st.none() | st.integers(1, 2**22 - 1),
        rlimits=st.dictionaries(st.sampled_from(RLIMITS), st.tuples(st.integers(0, 100), st.integers(100, UNLIMITED)), max_size=3),
        capabilities=st.lists(st.sampled_from(CAPABILITIES), unique=True, max_size=4).map(tuple),
        volumes=st.lists(_volumes, max_size=3).map(tuple),
        labels=st.dictionaries(_names, _names, max_size=2),
        has_children=st.booleans(),
    )
    nested = spec.map(lambda container: (container, _POD))
    alone = spec.map(lambda container: (msgspec.structs.replace(container, id="any"), None))
    return nested | alone


def pods(*, max_tasks: int = 4) -> st.SearchStrategy[dict[str, Any]]:
    """Documents of well-formed groups, with nested tasks, members that are not essential, and sidecars."""

    required = {"name": _names, "command": st.just(["true"])}
    optional = {"essential": st.booleans(), "sidecar": st.booleans()}

    def tasks(inner: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
        task = st.fixed_dictionaries(required, optional=optional if inner is None else {**optional, "tasks": inner})
        return st.lists(task, min_size=1, max_size=max_tasks, unique_by=lambda made: made["name"])

    return st.fixed_dictionaries({"name": _names, "tasks": tasks(tasks())})
