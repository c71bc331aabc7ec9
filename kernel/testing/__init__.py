"""For authors of plug-ins: what every plug-in of a kind must keep, as tests to inherit.

A plug-in's test is three lines:

    from mesocosm.kernel.testing import IsolatorContract

    class TestMine(IsolatorContract):
        isolator = my_module

Needs pytest and hypothesis, which mesocosm itself does not: names are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesocosm.kernel.testing.census import census, left_over
    from mesocosm.kernel.testing.contracts import ExecutorContract, IsolatorContract
    from mesocosm.kernel.testing.kinds import EffectKindContract
    from mesocosm.kernel.testing.strategies import CONTAINERS, GRANTS, HOSTS, containers, parent_plan, pods

__all__ = [
    "CONTAINERS", "GRANTS", "HOSTS", "EffectKindContract", "ExecutorContract", "IsolatorContract", "census", "containers",
    "left_over", "parent_plan", "pods",
]  # fmt: skip

_HOME = {
    "IsolatorContract": "contracts", "ExecutorContract": "contracts", "EffectKindContract": "kinds", "census": "census",
    "left_over": "census",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"mesocosm.kernel.testing.{_HOME.get(name, 'strategies')}"), name)
    globals()[name] = value
    return value
