"""Who is in the way of an undo, or why a process does not die: as data and in words.

What lives here: the question, bounded in time, and the words. The search itself is `linux.holding`, in a process of its own
(see `outside`): it looks at every process of the machine, and at some that may be stuck.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel.linux import holding
from mesocosm.kernel.runtime.outside import Outside

SECONDS = 5.0  # for a search; 10,000 processes take about two
_SHOWN = 5  # finds in words: enough to go on with
_KINDS = {"kill_cgroup": "cgroup", "rmdir_cgroup": "cgroup"}


async def find(outside: Outside, kind: str, target: str, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """What `linux.holding` finds within so many seconds; as much of it as has been found, if they are over."""
    command = [sys.executable, "-I", "-S", "-B", holding.__file__, f"{seconds:g}", kind, target]
    try:
        said = await outside.ask(command, seconds + 0.5)
    except OSError:
        return []
    finds = []
    for line in said.text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # the piece of a line that was cut off
        if isinstance(found, dict) and "looked" not in found:
            finds.append(found)
    return finds


async def of(outside: Outside, verb: str, target: str) -> str:
    """Who is in the way of an undo verb, in words; empty if nobody is found."""
    return words(await find(outside, _KINDS.get(verb, "path"), target))


async def of_process(outside: Outside, pid: int) -> str:
    """Why a process does not die, in words."""
    return words(await find(outside, "process", str(pid)))


async def of_file_system(outside: Outside, path: str) -> str:
    """What file system a path is on, and who serves it, in words; empty if nobody does."""
    served = [mount for mount in holding.mounts_of("self") if holding.is_served(mount.type)]
    above = [mount.point for mount in served if holding.is_at_or_below(path, mount.point)]
    return words(await find(outside, "server", max(above, key=len))) if above else ""


def words(finds: Sequence[Mapping[str, Any]]) -> str:
    """``pid 4711 (sleep), cwd /srv/x; pid 4712 (cat), fd 3 /srv/x/y, unkillable in fuse_wait (D)``."""
    unseen = sum(int(each.get("unseen", 0)) for each in finds)
    named = [each for each in finds if "unseen" not in each]
    said = [_one(each) for each in named[:_SHOWN]]
    if len(named) > _SHOWN:
        said.append(f"and {len(named) - _SHOWN} more")
    if unseen and not any("pid" in each for each in named):
        said.append(f"perhaps one of the {unseen} processes of other users, which cannot be seen from here")
    return "; ".join(said).encode("utf-8", "backslashreplace").decode()


def _one(found: Mapping[str, Any]) -> str:
    how = ", ".join(str(each) for each in found.get("how", ()) if each != "in it")
    if "groups" in found:
        return f"{how}: {', '.join(found['groups'])}"
    if "pid" not in found:
        connection = found.get("connection")
        return f"{how} (echo 1 > /sys/fs/fuse/connections/{connection}/abort ends it)" if connection else how
    parts = [f"pid {found['pid']} ({found['comm']})", how, *_standing(found)]
    return ", ".join(part for part in parts if part)


def _standing(found: Mapping[str, Any]) -> list[str]:
    """Why a process does not react, if it does not."""
    said, state = [], found.get("state")
    tracer, parent = found.get("tracer"), found.get("parent")
    if state == "D":
        where = f" on {' or '.join(found['served'])}" if found.get("served") else ""
        said.append(f"unkillable in {found.get('wchan', 'the kernel')} (D){where}")
    elif state == "Z" and found.get("threads"):
        said.append(f"whose first thread has ended and {found['threads']} have not")
    elif state == "Z" and tracer:
        said.append(f"a zombie that its tracer, {_who(tracer)}, does not let go of")
    elif state == "Z" and parent:
        said.append(f"a zombie that its parent, {_who(parent)}, does not reap")
    elif state == "t":
        said.append(f"stopped by its tracer, {_who(tracer)}" if tracer else "stopped by a tracer")
    elif state == "T":
        said.append("stopped (T)")
    elif state == "gone":
        said.append("which has gone")
    if found.get("frozen"):
        said.append(f"frozen by {found['frozen']}")
    return said


def _who(process: Mapping[str, Any]) -> str:
    stopped = ", which is stopped itself" if process.get("state") in ("T", "t") else ""
    return f"pid {process['pid']} ({process['comm']}{stopped})"
