"""One of doctor's checks: whether the ledger could be read, and can be written.

What lives here: asking the agent that runs, and looking at the files that it has set aside. What must not: starting an
agent, and judging a ledger (the agent does that when it opens it).
"""

from __future__ import annotations

import argparse
import glob
import os
import time
from typing import TYPE_CHECKING, Any

from mesocosm.kernel.cli import paths

if TYPE_CHECKING:
    from mesocosm.kernel.contracts import Check

_SHOWN = 5  # of what has been set aside; --json and the agent's log have all of it


def ledger_check(arguments: argparse.Namespace) -> Check:
    """What the agent says of its ledger; with ``--forget`` it, and the files set aside, are forgotten afterwards."""
    from mesocosm.kernel.contracts import Check

    forget = bool(getattr(arguments, "forget", False))
    told = _told(arguments, forget=forget)
    files = sorted(glob.glob(os.path.join(glob.escape(paths.run_dir()), "*.set-aside-*")))
    if told is None and not files:
        return Check("ledger", ok=True, have="no agent runs, and nothing has been set aside")
    if told is not None and not os.path.exists(os.path.join(paths.run_dir(), "ledger.db")):
        hint = "what runs goes on; the next launch writes it again, or says why it cannot; meso agent --stop ends all of it"
        have = "the file has been removed under the agent that runs"
        return Check("ledger", ok=False, have=have, need="a file that the next agent finds", hint=hint)
    lines = [] if told is None else told["set_aside"]
    trouble = None if told is None else told["trouble"]
    have = "readable and writable"
    if lines or files or trouble:
        words = [f"{_moment(line['time'])} {line['said']}" for line in lines]
        words = [*words[:_SHOWN], *([f"{len(words) - _SHOWN} more"] if len(words) > _SHOWN else [])]
        words += [f"it cannot be written: {trouble}"] if trouble else []
        have = "; ".join(words or [f"set aside: {' '.join(files)}"])
    if forget:
        for path in files:
            if os.path.isfile(path) or os.path.islink(path):
                os.unlink(path)
    ok = trouble is None and not lines and not files
    hint = "make room in the run directory" if trouble else "what runs goes on; once you have seen it: meso doctor --forget"
    return Check("ledger", ok, have, "every record readable", "" if ok else hint)


def _told(arguments: argparse.Namespace, *, forget: bool) -> dict[str, Any] | None:
    """What the agent answers; None if there is none, or one that does not say."""
    from mesocosm.kernel.cli import connection
    from mesocosm.kernel.client import RemoteError
    from mesocosm.kernel.core.errors import MesoError

    try:
        with connection.connect(arguments, start=False, timeout=10) as client:
            return dict(client.call("GET_SET_ASIDE", forget=forget))
    except (MesoError, RemoteError, OSError):
        return None


def _moment(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
