"""A plan in words: what will be made, what the new process will do, and how each thing is undone.

What lives here: pure functions from the contract's plan (`PLAN_GROUP`, `plan --json`) to lines. What must not: planning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel.cli.output import fit, pad
from mesocosm.kernel.cli.tables import Paint, Safe

_NARROWEST = 40


def plan_lines(plan: Mapping[str, Any], columns: int, safe: Safe, paint: Paint) -> list[str]:
    """The whole plan, container by container; arguments are cut to the width, `--json` has them all."""
    width = max(_NARROWEST, min(columns, 200))
    containers = plan["containers"]
    effects = sum(len(container["effects"]) for container in containers)
    steps = sum(len(container["setup"]) for container in containers)
    lines = []
    for container in containers:
        lines += [*_container(container, width, safe, paint), ""]
    if plan.get("ignored"):
        lines += ["left out, since nothing here honours it:", *(f"  {safe(path)}" for path in plan["ignored"]), ""]
    lines.append(
        f"{safe(plan['group'])}: {_count(len(containers), 'container')}, {_count(effects, 'effect')}, {_count(steps, 'step')}. "
        "Nothing has been made; --json shows every argument."
    )
    return lines


def _container(container: Mapping[str, Any], width: int, safe: Safe, paint: Paint) -> list[str]:
    lines = [paint(safe(container["id"]), "1")]
    by_share: dict[str, list[str]] = {}
    for name, share in container["namespaces"].items():
        by_share.setdefault(str(share), []).append(str(name))
    shares = "   ".join(f"{share}: {' '.join(names)}" for share, names in by_share.items())
    lines.append("  namespaces  " + fit(safe(shares), width - 14))
    effects: Sequence[Mapping[str, Any]] = container["effects"]
    if effects:
        lines.append(fit("  effects, made before the process exists; undone from the last to the first", width))
        kinds = max(len(effect["kind"]) for effect in effects)
        owners = max(len(effect["plugin"]) for effect in effects)
        for effect in effects:
            lead = f"    {effect['index']:>3}  {pad(safe(effect['kind']), kinds)}  {pad(safe(effect['plugin']), owners)}  "
            lines.append(lead + fit(safe(arguments(effect["args"])), width - len(lead)))
            undo = ", ".join(f"{verb['verb']} {verb['target']}" for verb in effect["undo"])
            if undo:
                inset = " " * 9 + "undo: "
                lines.append(paint(inset + fit(safe(undo), width - len(inset)), "2"))
    lines.append(fit("  steps of the new process, between clone3 and execve", width))
    steps: Sequence[Mapping[str, Any]] = container["setup"]
    stages = max((len(step["stage"]) for step in steps), default=0)
    kinds = max((len(step["kind"]) for step in steps), default=0)
    plugins = max((len(step["plugin"]) for step in steps), default=0)
    before = None
    for step in steps:
        stage = step["stage"] if step["stage"] != before else ""
        before = step["stage"]
        names = f"{pad(safe(step['kind']), kinds)}  {pad(safe(step['plugin']), plugins)}"
        lead = f"    {step['index']:>3}  {pad(stage, stages)}  {names}  "
        lines.append((lead + fit(safe(arguments(step["args"])), width - len(lead))).rstrip())
    return lines


def arguments(args: Mapping[str, Any]) -> str:
    """Arguments on one line: ``path=/run/x fd=<effect 3: fd> keep=[CHOWN KILL]``."""
    return " ".join(f"{key}={_mode(value) if key == 'mode' else _value(value)}" for key, value in args.items())


def _mode(value: Any) -> str:
    return f"0{value:o}" if isinstance(value, int) else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        if fact := value.get("$fact"):
            return f"<effect {fact[0]}: {fact[1]}>"
        if grant := value.get("$grant"):
            return f"<{grant}>"
        return "{" + " ".join(f"{key}={_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(_value(item) for item in value) + "]"
    if isinstance(value, str) and (not value or " " in value):
        return repr(value)
    return {True: "yes", False: "no", None: "-"}.get(value, str(value)) if value is None or isinstance(value, bool) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
