"""Verbs that need no agent: plan, doctor, plugins. They look at this machine and at the set, and change nothing.

What lives here: the three functions, and how the parts (set, probe, planner) are put together for them. What must not: a
second opinion. The agent plans with the same planner from the same facts, so its steps are those that `plan` printed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mesocosm.kernel.cli import document, paths
from mesocosm.kernel.cli.ledger_check import ledger_check
from mesocosm.kernel.cli.output import Console, pad
from mesocosm.kernel.core.errors import MesoError, describe

if TYPE_CHECKING:
    from mesocosm.kernel.contracts import Check, HostFacts

FINDINGS = 6
_OLDEST_KERNEL = (5, 15)
_NEEDED = ("clone3", "open_tree", "mount_setattr", "openat2", "pidfd")


def plan(arguments: argparse.Namespace, console: Console) -> int:
    """`meso plan`: the plan of a pod, as it would be carried out here."""
    from mesocosm.kernel.sets import loading, planning

    pod = document.group_document(arguments, fixed_name=True)
    plugins = loading.load(paths.set_name(arguments.set), paths.config_dirs())
    planned: dict[str, Any] = planning.Planner(plugins, _probe()).plan_document(pod)
    if console.as_json:
        console.json(planned)
        return 0
    from mesocosm.kernel.cli.plans import plan_lines

    for line in plan_lines(planned, console.columns, console.safe, console.paint):
        console.say(line)
    return 0


def plugins(arguments: argparse.Namespace, console: Console) -> int:
    """`meso plugins`: what the set names, whether it could be loaded, and if not, why."""
    from mesocosm.kernel.sets import loading

    report = loading.load(paths.set_name(arguments.set), paths.config_dirs()).report
    if console.as_json:
        for line in report:
            console.json(line)
        return 0
    from mesocosm.kernel.cli.tables import aligned

    rows = [["KIND", "NAME", "FROM", "SET", "LOADED"]]
    for line in report:
        origin = " ".join(str(line[key]) for key in ("distribution", "version") if line.get(key))
        loaded = "yes" if line.get("loaded") else "no"
        error = line.get("error") or ""
        why = error.get("message", "") if isinstance(error, dict) else str(error).strip().rpartition("\n")[2]
        cells = (line["kind"], line["name"], origin, line.get("set") or "", f"{loaded}  {why}".strip())
        rows.append([console.safe(text) for text in cells])
    for text in aligned(rows, console.columns, console.paint):
        console.say(text)
    return 0


def doctor(arguments: argparse.Namespace, console: Console) -> int:
    """`meso doctor`: what is there, what is missing, what to do about it; FINDINGS if something is missing."""
    checks = list(_checks(arguments))
    for check in checks:
        if console.as_json:
            console.json({"check": check.check, "ok": check.ok, "have": check.have, "need": check.need, "hint": check.hint})
    if not console.as_json:
        width = max(len(check.check) for check in checks)
        for check in checks:
            mark = console.paint("ok", "32") if check.ok else console.paint("no", "31;1")
            console.say(f"{mark}  {pad(console.safe(check.check), width)}  {console.safe(check.have)}".rstrip())
            if not check.ok:
                for label, text in (("need", check.need), ("hint", check.hint)):
                    if text:
                        console.say(f"    {'':{width}}  {label}: {console.safe(text)}")
        wrong = sum(not check.ok for check in checks)
        console.say("")
        console.say(f"{wrong} of {len(checks)} checks found something missing." if wrong else f"All {len(checks)} checks are fine.")
    return 0 if all(check.ok for check in checks) else FINDINGS


def _probe() -> HostFacts:
    from mesocosm.kernel.linux.probe import probe

    return probe(paths.run_dir(), paths.state_dir())


def _checks(arguments: argparse.Namespace) -> Iterable[Check]:
    from mesocosm.kernel.contracts import Check

    host = _probe()
    version = ".".join(map(str, host.kernel))
    yield Check("kernel", host.kernel[:2] >= _OLDEST_KERNEL, f"Linux {version}", "Linux 5.15 or newer", "boot a newer kernel")
    yield Check("python", sys.version_info >= (3, 11), ".".join(map(str, sys.version_info[:3])), "3.11 or newer", "")
    missing = [name for name in _NEEDED if not host.has(name)]
    yield Check(
        "system calls",
        not missing,
        "all there" if not missing else f"without {' '.join(missing)}",
        " ".join(_NEEDED),
        "a sandbox or an old kernel refuses them; run meso outside it",
    )
    allowed = host.has("user_namespaces")
    yield Check(
        "user namespaces",
        allowed,
        "allowed" if allowed else "refused",
        "allowed for this user",
        "sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns",
    )
    yield _directory_check()
    yield _history_check()
    yield _budget_check()
    yield ledger_check(arguments)
    yield from _plugin_checks(arguments, host)


def _directory_check() -> Check:
    from mesocosm.kernel.contracts import Check

    path = paths.run_dir()
    try:
        paths.check_run_dir(path)
    except MesoError as error:
        value = error.as_object()
        return Check("run directory", False, f"{path}: {error.message}", str(value.get("need", "")), str(value.get("hint", "")))  # noqa: FBT003
    existing = path
    while not os.path.exists(existing) and existing != "/":
        existing = os.path.dirname(existing)
    writable = os.access(existing, os.W_OK | os.X_OK)
    return Check("run directory", writable, path, f"{existing} writable", "set MESOCOSM_RUN_DIR to a directory of your own")


def _history_check() -> Check:
    """Whether all that was written down about what has been is there to be read."""
    from glob import escape, glob

    from mesocosm.kernel.contracts import Check

    path = os.path.join(paths.state_dir(), "history.db")
    damaged = sorted(found for found in glob(f"{escape(path)}.set-aside-*") if found.rpartition("-")[2].isdigit())
    is_file = os.path.isfile(path) or not os.path.lexists(path)
    have = f"set aside as damaged: {' '.join(damaged)}" if damaged else path if is_file else f"{path} is no file"
    hint = "what is in it can be looked at with sqlite3; remove it, and this is fine again" if damaged else "move it out of the way"
    return Check("history", is_file and not damaged, have, "a file that can be read", hint)


def _budget_check() -> Check:
    from mesocosm.kernel.contracts import Check
    from mesocosm.kernel.linux.holes import can_punch

    path = paths.run_dir()
    while not os.path.exists(path) and path != "/":
        path = os.path.dirname(path)
    can = can_punch(path)
    have = f"kept on {path}" if can else f"not kept: the file system of {path} has no holes to punch, or it cannot be written"
    hint = "set MESOCOSM_RUN_DIR to a directory on tmpfs, ext4, xfs or btrfs"
    return Check("log budgets", can, have, "fallocate(2) with FALLOC_FL_PUNCH_HOLE", hint)


def _plugin_checks(arguments: argparse.Namespace, host: HostFacts) -> Iterable[Check]:
    from mesocosm.kernel.contracts import Check
    from mesocosm.kernel.sets import loading

    try:
        loaded = loading.load(paths.set_name(arguments.set), paths.config_dirs())
    except MesoError as error:
        yield Check("plug-ins", False, error.message, "a set that can be loaded", describe(error.as_object()))  # noqa: FBT003
        return
    broken = [str(line["name"]) for line in loaded.report if not line.get("loaded")]
    yield Check(
        "plug-ins",
        not broken,
        f"{len(loaded.report) - len(broken)} loaded" + (f", not {' '.join(broken)}" if broken else ""),
        "every plug-in of the set",
        "meso plugins says why",
    )
    yield from loaded.checks(host)
