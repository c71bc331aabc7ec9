#!/usr/bin/env python3
"""Measures what writing everything down costs a launch: the time an agent spends in its ledger, of all that the launch takes.

    contrib/bench/ledger.py                the table
    contrib/bench/ledger.py --json         lines {"what", "n", "min_ms", "p50_ms", "ratio_to_floor", …}

The agent is the real one with its ledger on a tmpfs; a clock runs while it is inside a transaction of it (SQLite's work and its
system calls), and another while it packs what is written. A launch is launch, wait, remove of `true`. Rounds are of so many
launches each, of one container and of a pod of ten in turns. "ratio_to_floor" is the share of the launch's whole time,
"of_agent" the share of the processor time that the agent takes for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPORT = "MESO_BENCH_LEDGER"  # the file into which the agent under measurement writes its clocks, on SIGUSR2
PATIENCE = 60.0  # seconds


class Clock:
    """Nanoseconds spent in some functions; those that they call among themselves are not counted twice."""

    def __init__(self) -> None:
        self.spent = self.calls = self._depth = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth = 1
            began = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += time.perf_counter_ns() - began
                self.calls += 1
                self._depth = 0

        return timed


def be_agent() -> int:
    """`meso agent` with clocks in it."""
    from mesocosm.kernel.cli.main import main as meso
    from mesocosm.kernel.runtime import codec
    from mesocosm.kernel.runtime.book import Book

    clocks = {"ledger": Clock(), "packing": Clock()}
    for name in ("__enter__", "__exit__", "write", "write_many", "flush"):
        setattr(Book, name, clocks["ledger"].around(getattr(Book, name)))
    for name in ("pack", "pack_struct", "pack_entries", "checked_plan"):
        setattr(codec, name, clocks["packing"].around(getattr(codec, name)))

    def report(*_: object) -> None:
        path = os.environ[REPORT]
        Path(f"{path}.new").write_text(json.dumps({name: [clock.spent, clock.calls] for name, clock in clocks.items()}))
        os.rename(f"{path}.new", path)

    signal.signal(signal.SIGUSR2, report)
    return meso(["agent"])


class Measured:
    """The agent with clocks, and a client of it."""

    def __init__(self, scratch: Path) -> None:
        self._report = scratch / "clocks"
        self._run_dir = scratch / "run"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MESOCOSM_")}
        dirs = {"MESOCOSM_RUN_DIR": str(self._run_dir), "MESOCOSM_STATE_DIR": str(scratch / "state"), REPORT: str(self._report)}
        with open(scratch / "agent.log", "wb") as log:
            self._agent = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--be-agent"], env=kept | dirs, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not (self._run_dir / "agent.sock").exists():
            if self._agent.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the agent did not start:\n{(scratch / 'agent.log').read_text()}")
            time.sleep(0.02)
        from mesocosm.kernel import client

        self._client = client.connect(self._run_dir / "agent.sock")
        self._number = 0

    def round(self, tasks: int, launches: int) -> dict[str, float]:
        """Microseconds per launch: in all, of the agent's processor time, in the ledger, packing; and transactions' calls."""
        before, cpu, began = self._clocks(), self._cpu(), time.perf_counter_ns()
        for _ in range(launches):
            self._number += 1
            members = [{"name": f"t{number}", "command": ["/usr/bin/true"]} for number in range(tasks)]
            name = f"l{self._number}"
            self._client.launch_group({"name": name, "executor": "command" if tasks == 1 else "default", "tasks": members})
            self._client.wait(name)
            self._client.remove(name)
        total, cpu, after = time.perf_counter_ns() - began, self._cpu() - cpu, self._clocks()
        spent = {name: after[name][0] - before[name][0] for name in after}
        return {name: value / launches / 1000 for name, value in {"total": total, "agent": cpu, **spent}.items()}

    def _cpu(self) -> int:
        """Nanoseconds that the agent has run, proc_pid_schedstat."""
        return int(Path(f"/proc/{self._agent.pid}/schedstat").read_text().split()[0])

    def _clocks(self) -> dict[str, list[int]]:
        self._report.unlink(missing_ok=True)
        self._agent.send_signal(signal.SIGUSR2)
        self._client.ping()
        deadline = time.monotonic() + PATIENCE
        while not self._report.exists():
            if time.monotonic() > deadline:
                raise SystemExit("the agent does not tell its clocks")
            time.sleep(0.005)
        found: dict[str, list[int]] = json.loads(self._report.read_text())
        return found

    def close(self) -> None:
        """Ends it."""
        with contextlib.suppress(Exception):
            self._client.stop_agent()
        self._agent.wait(PATIENCE)


def rows(measured: Measured, rounds: int, launches: int) -> Iterator[dict[str, Any]]:
    """Two rows per kind of launch: in the ledger, and packing for it."""
    kinds = {"one container": (1, launches), "pod of 10": (10, max(1, launches // 5))}
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(-1, rounds):
        for kind, (tasks, count) in kinds.items():
            one = measured.round(tasks, count)
            if number >= 0:
                found[kind].append(one)
    for kind, all_of_it in found.items():
        for what, words in (("ledger", "in the ledger"), ("packing", "packing for it")):
            own = [each[what] for each in all_of_it]
            yield {
                "what": f"{kind}: {words}",
                "n": len(own),
                "min_ms": round(min(own) / 1000, 4),
                "p50_ms": round(statistics.median(own) / 1000, 4),
                "ratio_to_floor": round(statistics.median(each[what] / each["total"] for each in all_of_it), 4),
                "of_agent": round(statistics.median(each[what] / each["agent"] for each in all_of_it), 4),
                "total_ms": round(statistics.median(each["total"] for each in all_of_it) / 1000, 2),
                "agent_ms": round(statistics.median(each["agent"] for each in all_of_it) / 1000, 2),
            }


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON Lines instead of a table")
    parser.add_argument("-n", type=int, default=5, metavar="ROUNDS", help="rounds (5)")
    parser.add_argument(
        "--launches", type=int, default=200, help="launches of one container in a round (200); a fifth of that of pods"
    )
    parser.add_argument("--be-agent", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.be_agent:
        return be_agent()
    from launch import on_tmpfs

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meso-bench-", dir=on_tmpfs())))
        scratch.chmod(0o711)
        measured = Measured(scratch)
        stack.callback(measured.close)
        for row in rows(measured, given.n, given.launches):
            if given.json:
                print(json.dumps(row), flush=True)
            else:
                of_all = f"{row['ratio_to_floor']:>7.1%} of {row['total_ms']} ms"
                of_agent = f"{row['of_agent']:>6.1%} of the agent's {row['agent_ms']} ms"
                times = f"{row['min_ms'] * 1000:>7.0f} {row['p50_ms'] * 1000:>7.0f} µs"
                print(f"{row['what']:32} {row['n']:>3} {times} {of_all}, {of_agent}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
