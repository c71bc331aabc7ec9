"""Control groups as an audit sees them: every hierarchy that is mounted, v1 and v2, whether we use it or not.

What lives here: the look. Theory: a group below this run's own, ``mesocosm-RUN``, at the place where we make ours, is nobody
else's by name; that is enough to remove an empty one, and not enough to kill what stands in one. What a container makes below
its own group is part of it. Groups of other runs are theirs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from mesocosm.kernel.core.plan import Undo
from mesocosm.kernel.linux import devices
from mesocosm.kernel.runtime.claims import owner_of_group
from mesocosm.kernel.runtime.ledger import HOST
from mesocosm.kernel.runtime.sightings import Scene, Sighting

_RUN = re.compile(r"mesocosm-[0-9a-f]{6}(-agent)?")


def groups(scene: Scene) -> Iterator[Sighting | None]:
    """Every group that is called as ours are, in every hierarchy."""
    host = scene.world.host
    own = f"mesocosm-{host.run_id}"
    tops = {f"{top.rstrip('/')}/{own}" for top in (*host.cgroups.v1.values(), host.cgroups.v2) if top}
    others = 0
    for point in devices.hierarchies():
        pending = [point]
        while pending:
            directory = pending.pop()
            for name in _below(directory):
                path = f"{directory}/{name}"
                if name == own and path in tops:
                    yield from _ours(scene, path)
                elif name.startswith(own) and name != f"{own}-agent":
                    yield Sighting("cgroup", path, "called like a group of this run, and not made by it", still=_there(path))
                elif _RUN.fullmatch(name):
                    others += name != f"{own}-agent"
                else:
                    pending.append(path)
                yield None
    if others:
        scene.note(f"{others} control groups of other runs of mesocosm are theirs: not looked into")


def _ours(scene: Scene, top: str) -> Iterator[Sighting | None]:
    claims = scene.claims
    if claims.now(scene.world, top) is None and not scene.world.living:
        yield _sighting(top, None, "the group of this run, in which nobody lives")
        return
    pending = [top]
    while pending:
        directory = pending.pop()
        for name in _below(directory):
            path = f"{directory}/{name}"
            claim = claims.now(scene.world, path)
            if claim is None and (around := claims.covering(directory)) is not None and around.container != HOST:
                continue  # made by the container that has the group around it, and part of that
            if claim is not None and (claim.due or claim.parked is None):
                pending.append(path)
            yield None if claim is not None and claim.due else _sighting(path, owner_of_group(scene.world, path), "")
        yield None


def _sighting(path: str, owner: str | None, note: str) -> Sighting:
    standing = _processes(path)
    if standing:
        note = note or f"{len(standing)} processes stand in it: {', '.join(map(str, standing[:5]))}"
    return Sighting(
        "cgroup", path, note or "nobody stands in it", owner=owner,
        proven=not standing, undo=(Undo("rmdir_cgroup", path),), still=_there(path),
    )  # fmt: skip


def _processes(path: str) -> list[int]:
    """Who stands in a group or below it."""
    found: list[int] = []
    for directory, _, _ in os.walk(path):
        try:
            with open(f"{directory}/cgroup.procs") as file:
                found.extend(map(int, file.read().split()))
        except (OSError, ValueError):
            continue
    return found


def _below(directory: str) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _there(path: str) -> Callable[[], bool]:
    return lambda: os.path.isdir(path)
