"""Every hook of mesocosm, on one page.

Hooks are questions, asked synchronously and answered with data; no hook does anything to the machine. The
kernel asks the plug-ins of a set one by one in the set's order, so pluggy's own order (last registered
first) never matters, and one plug-in's exception is reported with its name and stops only what it must. So is an
answer that does not come within two seconds, or that is none. (A loop in C, or a system call that cannot be interrupted,
holds up the agent all the same: whoever calls such a thing does it in an effect kind with a deadline, and in a process of its own.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pluggy

from mesocosm.kernel.contracts import (
    Check,
    ContainerPlan,
    ContainerSpec,
    Effect,
    EffectKind,
    Executor,
    Grant,
    HostFacts,
    Plan,
    SlowEffectKind,
    Translation,
)

hookspec = pluggy.HookspecMarker("mesocosm")
hookimpl = pluggy.HookimplMarker("mesocosm")


@hookspec
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
    """An isolator's part of one container's plan; None if it has none.

    `parent` is the merged plan of the container this one lives in. `grants` holds placeholders for what the
    kernel will hand out: "uid_base", "uid_count".

    Order: the set's `isolators` list; within a stage, steps keep that order.
    Failure: a MesoError refuses the group (nothing has been made); any other exception the same, as `internal`.
    Cancellation: none; an answer takes microseconds.
    """


@hookspec
def effect_kinds() -> Sequence[EffectKind | SlowEffectKind]:
    """The kinds of effects this plug-in can make.

    An audit (`meso audit`) asks every kind's `find` for what is below the run directory, the state directory, and each target of
    the kind's own host effects; and for single targets of the ledger. What it answers beyond the ledger is a stranger, what the
    ledger has beyond it is missing. One that raises, or takes two seconds for one answer, is named, and its kind not judged.

    Order: none; two plug-ins with a kind of the same name is an error that names both.
    Failure: the plug-in is not loaded.
    Cancellation: none.
    """


@hookspec
def host_effects(host: HostFacts) -> Sequence[Effect]:
    """Things that all containers of an agent share (a parent cgroup, the view of the host's files).

    They are made, with ledger entries, before the first container, and undone when the agent ends with none left.

    Order: the set's order; undone in reverse.
    Failure: launches are refused with the error; the agent goes on.
    Cancellation: none.
    """


@hookspec
def executor() -> Executor:
    """The executor of this plug-in; a pod names it in `executor`.

    Order: none; names are unique.
    Failure: the plug-in is not loaded.
    Cancellation: none.
    """


@hookspec
def translate(document: Mapping[str, Any], name: str) -> Translation | None:
    """Another format's group in our words; None if the document is not of this front-end's format.

    `name` is what to call the group if the document has no name of its own.

    Order: the set's order, the first answer counts.
    Failure: a SpecError (with the document's own path) refuses the group; any other exception the same, as `internal`.
    Cancellation: none.
    """


@hookspec
def checks(host: HostFacts) -> Sequence[Check]:
    """Lines for ``meso doctor`` about what this plug-in needs from the host.

    Order: the set's order.
    Failure: shown as a failed check of that plug-in.
    Cancellation: none.
    """
