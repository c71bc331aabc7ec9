#!/usr/bin/env python3
"""Measures recovery: from kill -9 of the agent until the next one answers, with so many containers that go on meanwhile.

    contrib/bench/recovery.py              the table
    contrib/bench/recovery.py --json       lines {"what", "n", "min_ms", "p50_ms", "ratio_to_floor", "ratio_p50"}
    contrib/bench/recovery.py -n 3 --containers 0 10

Counted from the signal: the old agent's end, the new one's start (an interpreter, its modules, the plug-ins), the recovery, and
the first `ps`, which has to name every container as running with the process that it had. The floor is the same without
containers; sizes are interleaved round by round, each in an agent of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import Mesocosm, on_tmpfs

SIZES = (0, 10, 100, 1000)
PATIENCE = 120.0  # seconds


class Crowd:
    """An agent with so many containers, which is killed again and again."""

    def __init__(self, scratch: Path, size: int) -> None:
        scratch.mkdir()
        self.size = size
        self._ours = Mesocosm(scratch, has_cgroups=False)
        self._log = open(scratch / "next.log", "wb")  # noqa: SIM115 - as long as this object
        with self._ours.connect() as client:
            for number in range(size):
                task = {"name": "t0", "command": ["/bin/sleep", "100000"], "kill": {"signal": "KILL"}}
                client.launch_group({"name": f"c{number}", "executor": "command", "tasks": [task]})
            self._pids = {line["id"]: line["pid"] for line in client.containers()}
        if len(self._pids) != size:
            raise SystemExit(f"{len(self._pids)} of {size} containers are there")

    def once(self) -> float:
        """Milliseconds from the signal to the answer."""
        agent = self._ours._agent
        began = time.perf_counter()
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        self._ours._agent = subprocess.Popen(
            [*self._ours.meso, "agent"], env=self._ours.env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        lines = self._ask(began)
        taken = (time.perf_counter() - began) * 1000
        if {line["id"]: line["pid"] for line in lines if line["state"] == "RUNNING"} != self._pids:
            raise SystemExit("not all of them have been adopted")
        return taken

    def _ask(self, began: float) -> list[dict[str, Any]]:
        from mesocosm.kernel.client import RemoteError

        while True:
            try:
                with self._ours.connect() as client:
                    lines: list[dict[str, Any]] = client.containers()
                    return lines
            except RemoteError as error:
                if error.code != "agent_gone" or time.perf_counter() - began > PATIENCE:
                    raise
                time.sleep(0.001)

    def close(self) -> None:
        """Ends all of it."""
        self._ours.close()
        self._log.close()


def rows(crowds: list[Crowd], rounds: int) -> Iterator[dict[str, Any]]:
    """A row per size; a first round is thrown away."""
    times: dict[int, list[float]] = {crowd.size: [] for crowd in crowds}
    for number in range(-1, rounds):
        for crowd in crowds:
            taken = crowd.once()
            if number >= 0:
                times[crowd.size].append(taken)
    floor = times[min(times)]
    for size, own in times.items():
        yield {
            "what": f"recovery with {size} containers",
            "n": len(own),
            "min_ms": round(min(own), 1),
            "p50_ms": round(statistics.median(own), 1),
            "ratio_to_floor": round(min(own) / min(floor), 2),
            "ratio_p50": round(statistics.median(own) / statistics.median(floor), 2),
        }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON Lines instead of a table")
    parser.add_argument("-n", type=int, default=10, metavar="ROUNDS", help="rounds (10)")
    parser.add_argument("--containers", type=int, nargs="+", default=list(SIZES), help="how many live meanwhile (0 10 100 1000)")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meso-bench-", dir=on_tmpfs())))
        scratch.chmod(0o711)
        crowds = []
        for size in given.containers:
            crowds.append(Crowd(scratch / str(size), size))
            stack.callback(crowds[-1].close)
        for row in rows(crowds, given.n):
            if given.json:
                print(json.dumps(row), flush=True)
            else:
                times = f"{row['min_ms']:>8.1f} {row['p50_ms']:>8.1f} ms"
                print(f"{row['what']:36} {row['n']:>4} {times} {row['ratio_to_floor']:>6} × {row['ratio_p50']:>6} ×", flush=True)


if __name__ == "__main__":
    main()
