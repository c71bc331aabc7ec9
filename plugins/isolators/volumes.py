"""Volumes: directories that outlive a program's own files, or come from elsewhere.

What lives here: shared, host and tmpfs volumes. What does not: where a volume may appear (rootfs knows the
tree) and volumes made by providers, which come with them.

A shared volume is a directory of the pod's own container. Every member that names it plans the same directory,
and making it twice is making it once. It has no undo of its own: one member's end must not take it from the
others, and the last to go is the pod, whose directory is removed with everything in it.

All sources are opened before the container exists, so an absent one refuses the group while nothing has run.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from mesocosm.kernel import Effect, Fact, Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.containers import VolumeMount
from mesocosm.kernel.core.errors import SpecError, UnsupportedError
from mesocosm.kernel.core.names import root_of
from mesocosm.kernel.core.plan import is_apart


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
    """One mount for each volume, outer targets before inner ones."""
    if not container.volumes:
        return None
    if container.namespaces.get("mount", "own") != "own":
        raise SpecError("volumes need mounts of their own", path=f"{container.path}.volumes", hint='namespaces.mount = "own"')
    has_users = is_apart("user", container.namespaces.get("user", "own"), parent)
    uid: Any = grants["uid_base"] if has_users else 0
    effects: list[Effect] = []
    steps: list[Step] = []
    given: list[str] = []  # the host's own directories: nothing is made in them, not even a place to mount on
    for _, target, volume, path in _in_order(container):
        may_create = not any(target.startswith(f"{outer}/") for outer in given)
        match volume.kind:
            case "tmpfs":
                steps.append(_tmpfs(volume, target, uid, may_create=may_create))
            case "shared":
                effects += _shared(container, host, volume.value, uid)
                source = _shared_path(container, host, volume.value)
                steps.append(_bind(effects, source, target, volume, is_foreign=False, may_create=may_create))
            case "host":
                steps.append(_bind(effects, volume.value, target, volume, is_foreign=True, may_create=may_create))
                given.append(target)
            case _:
                raise UnsupportedError(
                    "this build has no provider of volumes yet",
                    path=f"{path}.source",
                    have=f"{volume.kind}:{volume.value}",
                    need="shared:, host: or tmpfs:",
                )
    return Plan(effects=effects, setup=steps)


def _in_order(container: ContainerSpec) -> list[tuple[int, str, VolumeMount, str]]:
    seen: dict[str, int] = {}
    found = []
    for index, volume in enumerate(container.volumes):
        target = posixpath.normpath("/" + volume.target.lstrip("/"))
        path = f"{container.path}.volumes[{index}]"
        if target in seen:
            raise SpecError(f"two volumes at {target}", path=f"{path}.target", hint=f"the first is volumes[{seen[target]}]")
        seen[target] = index
        found.append((target.count("/"), target, volume, path))
    found.sort(key=lambda entry: entry[0])
    return found


def _shared_path(container: ContainerSpec, host: HostFacts, name: str) -> str:
    return f"{host.container_dir(root_of(container.id))}/volumes/{name}"


def _shared(container: ContainerSpec, host: HostFacts, name: str, uid: object) -> list[Effect]:
    path = _shared_path(container, host, name)
    return [
        Effect("directory", {"path": posixpath.dirname(path), "mode": 0o755, "uid": 0}, keep=True),
        # Open to all inside, whatever user each member runs as; from outside, the pod's directory is closed.
        Effect("directory", {"path": path, "mode": 0o1777, "uid": uid}, keep=True),
    ]


def _bind(effects: list[Effect], source: str, target: str, volume: VolumeMount, *, is_foreign: bool, may_create: bool) -> Step:
    effects.append(Effect("mount_tree", {"source": source, "recursive": is_foreign}))
    opened = len(effects) - 1
    # A directory appears on a directory and a file on a file; which one it is, opening it tells.
    create = Fact(opened, "type") if may_create else None
    args = {"fd": Fact(opened, "fd"), "target": target, "read_only": volume.read_only, "create": create}
    return Step("bind", {**args, "foreign": is_foreign})


def _tmpfs(volume: VolumeMount, target: str, uid: object, *, may_create: bool) -> Step:
    args = {"target": target, "size": volume.size, "mode": 0o1777, "uid": uid, "nr_inodes": max(64, volume.size // 4096)}
    flags = ["nosuid", "nodev", *(["ro"] if volume.read_only else [])]
    return Step("tmpfs", {**args, "flags": flags, "create": "dir" if may_create else None})
