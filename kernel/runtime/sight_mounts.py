"""Mounts as an audit sees them: in the agent's own mount namespace and in every other that it can read, each once.

What lives here: the look. Theory: what a container has mounted goes with it, so the namespaces of living containers are left
out. Everywhere else a mount below the run or state directory is a finding unless an entry of the ledger speaks of it, and so is a
mount that shows a container's directory from elsewhere: it keeps that busy. In another namespace nothing could be undone from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from mesocosm.kernel.linux import procfs
from mesocosm.kernel.linux.procfs import Mount
from mesocosm.kernel.runtime.sightings import Scene, Sighting


def mounts(scene: Scene) -> Iterator[Sighting | None]:
    """Mounts of ours by their place, and mounts of what is ours."""
    try:
        own = list(procfs.mounts_of())
    except OSError as error:
        scene.note(f"mounts cannot be seen: {error}")
        return
    source = _origin(own, scene.world.host.run_dir)
    seen: set[str] = set()
    for mount in own:
        yield _judge(scene, mount, source, "")
        seen.add(mount.point)
    hidden = 0
    mine = procfs.namespace_of(os.getpid(), "mnt")
    namespaces = {mine}
    for first in scene.firsts:
        namespaces.add(procfs.namespace_of(first, "mnt"))
        yield None
    for pid in procfs.pids():
        yield None
        namespace = procfs.namespace_of(pid, "mnt")
        if namespace is None:
            hidden += 1
        elif namespace not in namespaces:
            namespaces.add(namespace)
            yield from _elsewhere(scene, pid, namespace, source, seen)
    if hidden:
        scene.note(f"the mounts of {hidden} processes are not for this user to see")


def _elsewhere(scene: Scene, pid: int, namespace: str, source: tuple[str, str] | None, seen: set[str]) -> Iterator[Sighting | None]:
    who = procfs.process(pid)
    if who is None or scene.is_launching:
        return  # a newborn's, not its own yet
    try:
        for mount in procfs.mounts_of(pid):
            if mount.point in seen:
                continue  # copied with the rest of the namespace
            found = _judge(scene, mount, source, f" in mount namespace {namespace[5:-1]} of process {pid} ({who.name})")
            if found is not None:
                still = _in_table(pid, mount)
                yield found._replace(undo=(), proven=False, still=still)
            yield None
    except OSError:
        return


def _judge(scene: Scene, mount: Mount, source: tuple[str, str] | None, where: str) -> Sighting | None:
    host = scene.world.host
    kind = "namespace" if mount.kind == "nsfs" else "mount"
    if scene.is_below(mount.point):
        claim = scene.claims.now(scene.world, mount.point)
        if claim is not None and any(verb == "umount" and target == mount.point for verb, target in claim.undo):
            return Sighting(
                kind, mount.point, f"{mount.kind} {mount.source}", owner=claim.container, still=_in_table("self", mount)
            )
        return Sighting(kind, mount.point + where, f"{mount.kind} {mount.source}", still=_in_table("self", mount))
    if source is not None and mount.device == source[0] and mount.root.startswith(f"{source[1]}/containers/"):
        shown = f"{host.run_dir}{mount.root[len(source[1]) :]}"
        return Sighting(kind, mount.point + where, f"shows {shown}", still=_in_table("self", mount))
    return None


def _origin(own: list[Mount], run_dir: str) -> tuple[str, str] | None:
    """The run directory as a mount's first columns would have it: its device, and its path from the root of that."""
    around = [mount for mount in own if run_dir == mount.point or run_dir.startswith(mount.point.rstrip("/") + "/")]
    if not around:
        return None
    nearest = max(reversed(around), key=lambda mount: len(mount.point))  # of several at one point the last is on top
    rest = run_dir[len(nearest.point.rstrip("/")) :]
    return nearest.device, nearest.root.rstrip("/") + rest


def _in_table(pid: int | str, mount: Mount) -> Callable[[], bool]:
    def look() -> bool:
        try:
            return mount in procfs.mounts_of(pid)
        except OSError:
            return False

    return look
