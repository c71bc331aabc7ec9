"""The effect kind of cgroup v2: one group, its limits, the controllers it hands on, its directory open.

What lives here: the files of the unified hierarchy. What does not: which groups there are, and where.

A controller reaches a group only if its parent hands it on (`cgroup.subtree_control`), one write for each: a write
that names several fails whole if one of them is not there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from mesocosm.kernel.contracts import EffectContext
from mesocosm.kernel.core.errors import from_oserror
from mesocosm.plugins.isolators.cgroups.v1 import find, is_marked, make, open_group, quota, shares, write_plainly


class Cgroup2:
    """args: path, limits {memory: bytes, cpu: millicpus, pids, oom_group: 1}, controllers to hand on, attach.

    `attach` False: the group is there to be shared, nothing is born in it; the group around it is made to hand the
    controllers on too. Facts: path; with attach also fd, of the directory, for CLONE_INTO_CGROUP.
    """

    name = "cgroup2"

    def do(self, args: Mapping[str, Any], context: EffectContext) -> Mapping[str, Any]:
        """Makes the group, hands controllers on, sets limits. ConflictError if processes are in one of that name."""
        path: str = args["path"]
        if not args["attach"]:
            hand_on(os.path.dirname(path), args["controllers"])
        make(path, shared=not args["attach"])
        hand_on(path, args["controllers"])
        for name, value in args["limits"].items():
            for file, text in _files(name, value):
                _write(f"{path}/{file}", text, optional=file in _OPTIONAL)
        if not args["attach"]:
            return {"path": path}
        return {"path": path, "fd": open_group(path, os.O_RDONLY | os.O_DIRECTORY)}

    def find(self, prefix: str) -> Iterable[str]:
        """All groups at or below the directory `prefix`."""
        return find(prefix)

    def owns(self, target: str) -> bool:
        """Whether that group was made by `do`."""
        return is_marked(target)


_OPTIONAL = frozenset({"memory.swap.max", "memory.oom.group"})  # kernels without swap accounting; older than 4.19


def hand_on(path: str, controllers: Iterable[str]) -> None:
    """Enables controllers for the groups below `path`; those that are on already are left alone."""
    wanted = list(controllers)
    if not wanted:
        return
    control = f"{path}/cgroup.subtree_control"
    try:
        with open(control) as file:
            present = file.read().split()
    except OSError as error:
        raise from_oserror(error, syscall="open", target=control) from error
    for name in wanted:
        if name not in present:
            _write(control, f"+{name}")


def weight(millicpus: int) -> int:
    """cpu.weight for cpu.shares, by the kernel's own line from (2, 1) to (262144, 10000)."""
    return 1 + (shares(millicpus) - 2) * 9999 // 262_142


def _files(name: str, value: int) -> list[tuple[str, str]]:
    if name == "memory":
        return [("memory.max", str(value)), ("memory.swap.max", "0")]
    if name == "oom_group":
        return [("memory.oom.group", str(value))]
    if name == "pids":
        return [("pids.max", str(value))]
    amount, period = quota(value)
    return [("cpu.max", f"{amount} {period}"), ("cpu.weight", str(weight(value)))]


def _write(file: str, text: str, *, optional: bool = False) -> None:
    try:
        write_plainly(file, text)
    except FileNotFoundError as error:
        if not optional:
            hint = "the controller is not handed on to here"
            raise from_oserror(error, syscall="open", target=file, need=text, hint=hint) from None
    except OSError as error:
        raise from_oserror(error, syscall="write", target=file, need=text, **_explain(file, error)) from None


def _explain(file: str, error: OSError) -> dict[str, str]:
    if file.endswith("subtree_control"):
        return {"hint": "a group that holds processes cannot hand controllers on: start the agent in a leaf of its own"}
    return {"hint": f"the kernel refused the value: {error.strerror}"}
