"""The attenuation rule: what a container asks for is never more than what its parent has.

What lives here: one rule for every field of `ContainerSpec`. RULES is a table on purpose: a field added to the
spec without a rule fails a test, so that a right can never be forgotten. Theory: "no more than" is a preorder
(every spec is within itself; within within is within), which is what makes a chain of nested containers safe
to check link by link. Absent limits would break that (a missing limit means the parent's), so `effective`
fills them in first, and only effective specs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from mesocosm.kernel.core import names
from mesocosm.kernel.core.containers import ContainerSpec, VolumeMount
from mesocosm.kernel.core.errors import DeniedError
from mesocosm.kernel.core.resources import LOG_BUDGET, show_size

Violation = tuple[str, str]  # (have, need), as the error shows them
Rule = Callable[[ContainerSpec, ContainerSpec], Violation | None]


def _free(_child: ContainerSpec, _parent: ContainerSpec) -> None:
    """Gives no power over anything outside the container: every value is fine."""


def _same(field: str) -> Rule:
    def rule(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
        have, need = getattr(child, field), getattr(parent, field)
        return None if have == need else (str(have), str(need))

    return rule


def _within(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    return None if names.is_within(child.id, parent.id) else (child.id, f"{parent.id}.…")


def _at_most(field: str, show: Callable[[int], str] = str) -> Rule:
    def rule(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
        have, most = getattr(child, field), getattr(parent, field)
        if most is None or (have is not None and have <= most):
            return None
        return ("no limit" if have is None else show(have), f"≤ {show(most)}")

    return rule


def _implies(field: str) -> Rule:
    """A power that is switched on: only where the parent has it."""

    def rule(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
        return ("true", "false") if getattr(child, field) and not getattr(parent, field) else None

    return rule


def _read_only(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    return ("false", "true") if parent.read_only and not child.read_only else None


def _user(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    # Whoever is not root inside must not become it by asking for a child that is.
    if child.user == parent.user or parent.user.partition(":")[0] in ("0", "root"):
        return None
    return (child.user, parent.user)


def _namespaces(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    for kind, share in child.namespaces.items():
        if share == "host" and parent.namespaces.get(kind) != "host":
            return (f"{kind} = host", f"own or parent: {parent.id} is not in the host's")
    return None


def _rlimits(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    for name, (_, hard) in parent.rlimits.items():
        asked = child.rlimits.get(name)
        if asked is None or max(asked) > hard:
            return (f"{name} = {'no limit' if asked is None else max(asked)}", f"≤ {hard}")
    return None


def _log(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    have, most = child.log or LOG_BUDGET, parent.log or LOG_BUDGET
    return (show_size(have), f"≤ {show_size(most)}") if have > most else None


def _capabilities(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    more = [name for name in child.capabilities if name not in parent.capabilities]
    return (", ".join(more), ", ".join(parent.capabilities) or "none") if more else None


def _volumes(child: ContainerSpec, parent: ContainerSpec) -> Violation | None:
    # A path below the parent's volume is not taken for it: the parent could plant a link there.
    for volume in child.volumes:
        if volume.kind != "tmpfs" and not any(_covers(volume, own) for own in parent.volumes):
            return (f"{volume.kind}:{volume.value}", f"a volume that {parent.id} has, as writable as it has it")
    return None


def _covers(asked: VolumeMount, own: VolumeMount) -> bool:
    return (asked.kind, asked.value) == (own.kind, own.value) and (asked.read_only or not own.read_only)


RULES: Mapping[str, Rule] = {
    "id": _within,
    "role": _same("role"),
    "command": _free,
    "env": _free,
    "user": _user,
    "cwd": _free,  # resolved inside the container's own root
    "rootfs": _same("rootfs"),
    "image": _same("image"),
    "read_only": _read_only,
    "hostname": _free,
    "namespaces": _namespaces,
    "cpus": _at_most("cpus", lambda value: f"{value}m"),
    "memory": _at_most("memory", show_size),
    "pids": _at_most("pids"),
    "rlimits": _rlimits,
    "log": _log,
    "kill_signal": _free,
    "kill_grace": _free,  # its parent's death does not wait for it
    "essential": _free,
    "sidecar": _free,
    "api": _implies("api"),
    "init": _free,
    "capabilities": _capabilities,
    "volumes": _volumes,
    "labels": _free,
    "has_children": _free,
    "path": _free,
}

# Where a field of the spec stands in the user's document, if it has another name there.
_PLACES = {
    "cpus": "resources.cpus", "memory": "resources.memory", "pids": "resources.pids",
    "rlimits": "limits", "kill_signal": "kill.signal", "kill_grace": "kill.grace", "id": "name",
}  # fmt: skip


def effective(child: ContainerSpec, parent: ContainerSpec) -> ContainerSpec:
    """The child with what it leaves open filled in from its (effective) parent: limits, and namespaces that are the host's."""
    changed: dict[str, Any] = {}
    for field in ("cpus", "memory", "pids", "log"):
        if getattr(child, field) is None and getattr(parent, field) is not None:
            changed[field] = getattr(parent, field)
    missing = {name: pair for name, pair in parent.rlimits.items() if name not in child.rlimits}
    if missing:
        changed["rlimits"] = {**child.rlimits, **missing}
    hosts = {
        kind: "host" for kind, share in child.namespaces.items() if share == "parent" and parent.namespaces.get(kind) == "host"
    }
    if hosts:
        changed["namespaces"] = {**child.namespaces, **hosts}
    return msgspec.structs.replace(child, **changed) if changed else child


def exceeds(child: ContainerSpec, parent: ContainerSpec) -> list[DeniedError]:
    """Everything in which `child` asks for more than `parent` has (both effective); empty: it may have it all."""
    errors = []
    for field, rule in RULES.items():
        violation = rule(child, parent)
        if violation is not None:
            have, need = violation
            errors.append(
                DeniedError(
                    f"{child.id} asks for more than {parent.id} has",
                    id=child.id,
                    path=f"{child.path}.{_PLACES.get(field, field)}",
                    have=have,
                    need=need,
                    hint="a nested container gets at most what its parent has; a host user may grant the parent more",
                )
            )
    return errors
