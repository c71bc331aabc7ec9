"""mesocosm's kernel: it keeps the container tree and the task-group transactions, and nothing else.

The vocabulary, from the outside in:

* a *pod* (task group) is a set of tasks that start whole or not at all;
* a *container* is one bounded world, named by its ancestry: ``GROUP.TASK.CHILD``;
* an *isolator* is a pure function from a container to a *plan*;
* a *plan* is *effects* (things made on the host before the container exists, each with its *undo* as data)
  and *setup* steps (what the new process does to itself between clone3 and execve);
* the *ledger* has an entry for every effect before the thing exists, until after it is gone;
* the *launcher* is the small process whose children all containers are.

A plug-in needs only what this module names. The names are loaded when first used: the launcher and the
command import parts of the kernel in a few milliseconds and must not pay for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesocosm.kernel.contracts import Effect, Fact, Grant, Plan, Step, Undo
    from mesocosm.kernel.hookspecs import hookimpl

__all__ = ["Effect", "Fact", "Grant", "Plan", "Step", "Undo", "hookimpl"]

_HOME = {"hookimpl": "mesocosm.kernel.hookspecs"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOME.get(name, "mesocosm.kernel.contracts")), name)
    globals()[name] = value
    return value
