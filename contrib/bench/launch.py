#!/usr/bin/env python3
"""Measures launches: mesocosm end to end through its socket, against the C floor and the other runtimes here.

One run, interleaved: every round times everybody once, so that a noisy neighbour troubles all alike. One launch =
launch, wait, clean up, of a container that runs `true`. The floor (floor.c) is built on the spot.

    contrib/bench/launch.py                the table
    contrib/bench/launch.py --json         lines {"what", "n", "min_ms", "p50_ms", "ratio_to_floor", …}
    contrib/bench/launch.py -n 10 --no-mesocosm

Ratios are of minima (of best rates); "ratio_p50" of medians. Launches per second and memory have fields of their own, with
no times.
Nothing needs to run beforehand: an agent is started in a run directory of its own and stopped at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import load
from rivals import Floor, Rival, installed

AT_ONCE = (1, 8, 32)
RATE_ROUNDS = 5
IDLE = 50  # containers of which the memory is taken


class Mesocosm:
    """An agent in a run directory of its own, and a client of it."""

    def __init__(self, scratch: Path, *, has_cgroups: bool) -> None:
        limits = {"cpus": 0.5, "memory": "64MiB", "pids": 64}
        self._resources = limits if has_cgroups else {}  # what the floor sets too
        beside = Path(sys.executable).with_name("meso")
        found = str(beside) if beside.exists() else shutil.which("meso")
        self.meso = [found] if found else [sys.executable, "-m", "mesocosm.kernel.cli.main"]
        self.run_dir = scratch / "run"
        self.socket = str(self.run_dir / "agent.sock")
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MESOCOSM_")}
        self.env = {**kept, "MESOCOSM_RUN_DIR": str(self.run_dir), "MESOCOSM_STATE_DIR": str(scratch / "state")}
        with open(scratch / "agent.log", "wb") as log:
            self._agent = subprocess.Popen([*self.meso, "agent"], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._answers():
            if self._agent.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the agent did not start:\n{(scratch / 'agent.log').read_text()}")
            time.sleep(0.02)
        self._client = self.connect()
        self._number = 0

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as trial:
            return trial.connect_ex(self.socket) == 0

    def connect(self) -> Any:
        """A new connection to the agent."""
        from mesocosm.kernel import client

        return client.connect(self.socket)

    def launch(self, client: Any, name: str, tasks: int = 1) -> None:
        """Launches, waits, removes: one container, or a pod of several."""
        members = [{"name": f"t{n}", "command": ["/usr/bin/true"], "resources": self._resources} for n in range(tasks)]
        group = {"name": name, "executor": "command" if tasks == 1 else "default", "tasks": members}
        client.launch_group(group)
        ended = client.wait(name)
        client.remove(name)
        if ended.get("group", ended)["exit"] != 0:  # a pod's own first process, which only waits, is killed at its end
            raise SystemExit(f"`true` ended badly: {ended}")

    def _once(self, tasks: int) -> None:
        self._number += 1
        self.launch(self._client, f"one-{self._number}", tasks)

    def _many(self, count: int, at_once: int) -> float:
        """Milliseconds for `at_once` clients to launch `count` containers together."""
        self._number += 1
        task = {"name": "t0", "command": ["/usr/bin/true"], "resources": self._resources}
        return load.run(self.socket, task, iter([f"many-{self._number}-{number}" for number in range(count)]), at_once)

    def _from_the_shell(self) -> None:
        null = subprocess.DEVNULL
        subprocess.run([*self.meso, "run", "--", "true"], env=self.env, check=True, stdin=null, stdout=null)

    def rivals(self) -> list[Rival]:
        """What is measured of us."""
        return [
            Rival("mesocosm, one container", lambda: self._once(1), self._many),
            Rival("mesocosm, pod of 10", lambda: self._once(10), pod=10),
            Rival("meso run -- true", self._from_the_shell),
        ]

    def memory(self) -> Iterator[dict[str, Any]]:
        """Rows about memory: agent and launcher when idle, and what IDLE idle containers (not members of a pod) cost.

        The kernel's part is what its own counters grow by: slabs, page tables, stacks, per-cpu data. It reuses what was freed, so
        this is asked before anything else is measured.
        """
        self._once(1)
        time.sleep(1)
        own = self._own_processes()
        before, kernel = sum(map(pss, own)), kernel_memory()
        yield {"what": "memory of agent + launcher, fresh", "n": len(own), "kib": before}
        names = [f"idle-{number}" for number in range(IDLE)]
        task = {"name": "t0", "command": ["/bin/sleep", "1000"], "resources": self._resources}
        for name in names:
            self._client.launch_group({"name": name, "executor": "command", "tasks": [task]})
        time.sleep(1)
        programs = sum(pss(line["pid"]) for line in self._client.containers() if line["id"] in names)
        grown, kernel = sum(map(pss, own)) - before, kernel_memory() - kernel
        for name in names:
            self._client.kill(name, "KILL")
        for name in names:
            self._client.wait(name)
            self._client.remove(name)
        for what, kib in (("agent + launcher", grown), ("its own process", programs), ("the kernel", kernel)):
            yield {"what": f"memory per idle container: {what}", "n": IDLE, "kib": round(kib / IDLE, 1)}

    def _own_processes(self) -> list[int]:
        """The agent, the launcher and whatever stands between them: all that carry our run directory and are no container."""
        return [pid for pid, env in processes() if str(self.run_dir) in env and "\0MESOCOSM_ID=" not in f"\0{env}"]

    def close(self) -> None:
        """Stops the agent and all it has."""
        subprocess.run([*self.meso, "agent", "--stop"], env=self.env, check=False, stdout=subprocess.DEVNULL)
        try:
            self._agent.wait(15)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            print("# the agent did not stop when asked; killed", file=sys.stderr)


def processes() -> Iterator[tuple[int, str]]:
    """(pid, its command line and environment) of every process that we may look at."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                told = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
                yield int(entry.name), told.decode(errors="replace")


def pss(pid: int) -> int:
    """Proportional set size in KiB; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def kernel_memory() -> int:
    """KiB that the kernel has for itself and not for the contents of files."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    counted = ("Slab", "KernelStack", "PageTables", "SecPageTables", "Percpu", "VmallocUsed")
    return sum(int(lines[name].split()[0]) for name in counted if name in lines)


def time_rounds(rivals: Sequence[Rival], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per rival, one from each round it takes part in; a first round, to warm up, is thrown away."""
    times: dict[str, list[float]] = {rival.name: [] for rival in rivals}
    for number in range(-1, rounds):
        for rival in rivals:
            if number >= 0 and number % rival.every:
                continue
            began = time.perf_counter()
            measured = rival.once()
            taken = measured if isinstance(measured, float) else (time.perf_counter() - began) * 1000
            if number >= 0:
                times[rival.name].append(taken)
    return times


def latency_rows(rivals: Sequence[Rival], times: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    """A row per rival; the floor of a pod is that of ten containers at once."""
    floors = {1: times["C floor"], 10: times["C floor, ten at once"]}
    for rival in rivals:
        own, floor = times[rival.name], floors[rival.pod]
        yield {
            "what": rival.name,
            "n": len(own),
            "min_ms": round(min(own), 3),
            "p50_ms": round(statistics.median(own), 3),
            "ratio_to_floor": round(min(own) / min(floor), 2),
            "ratio_p50": round(statistics.median(own) / statistics.median(floor), 2),
        }


def throughput_rows(rivals: Sequence[Rival], count: int) -> Iterator[dict[str, Any]]:
    """Launches per second at 1, 8 and 32 at once: best and median of interleaved rounds of `count` launches each.

    So many that it does not matter how a round begins and ends: at 32 at once the first 32 start from nothing.
    """
    for at_once in AT_ONCE:
        rates: dict[str, list[float]] = {rival.name: [] for rival in rivals if rival.many is not None}
        for _ in range(RATE_ROUNDS):
            for rival in rivals:
                if rival.many is not None:
                    rates[rival.name].append(count / rival.many(count, at_once) * 1000)
        best = {name: max(each) for name, each in rates.items()}
        middle = {name: statistics.median(each) for name, each in rates.items()}
        for name in rates:
            row = {"what": f"{name}: launches/s, {at_once} at once", "n": RATE_ROUNDS, "min_ms": None, "p50_ms": None}
            row |= {"per_second": round(best[name], 1), "per_second_p50": round(middle[name], 1)}
            ratio_p50 = round(middle["C floor"] / middle[name], 2)
            yield {**row, "ratio_to_floor": round(best["C floor"] / best[name], 2), "ratio_p50": ratio_p50}


def show(row: dict[str, Any]) -> str:
    """A row for people."""
    what = f"{row['what']:52} {row['n']:>5}"
    if "kib" in row:
        return f"{what} {row['kib']:>10} KiB"
    if "per_second" in row:
        figures = f"{row['per_second']:>8.1f}/s {row['per_second_p50']:>8.1f}/s"
    else:
        figures = f"{row['min_ms']:>9.2f}  {row['p50_ms']:>9.2f} "
    return f"{what} {figures} {row['ratio_to_floor']:>11} × {row['ratio_p50']:>6} ×"


def on_tmpfs() -> str | None:
    """A directory in memory, as /run is on an ordinary Linux: there run directories live. None if there is none."""
    with open("/proc/self/mounts") as file:
        in_memory = {line.split()[1] for line in file if line.split()[2] == "tmpfs"}
    return next((path for path in ("/run", "/dev/shm") if path in in_memory and os.access(path, os.W_OK)), None)


def main() -> None:
    """Measures and prints, a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="JSON Lines instead of a table")
    parser.add_argument("-n", type=int, default=60, metavar="ROUNDS", help="rounds (60)")
    parser.add_argument("--no-mesocosm", action="store_true", help="only the floor and the others")
    parser.add_argument("--only-mesocosm", action="store_true", help="only the floor and mesocosm")
    given = parser.parse_args()

    def tell(row: dict[str, Any]) -> None:
        print(json.dumps(row, ensure_ascii=False) if given.json else show(row), flush=True)

    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meso-bench-", dir=on_tmpfs())))
        scratch.chmod(0o711)
        if shutil.which("gcc") is None:
            raise SystemExit("the floor is a C program: install gcc")
        floor = Floor(scratch)
        stack.callback(floor.close)
        rivals = floor.rivals()
        ours = None
        if not given.no_mesocosm:
            ours = Mesocosm(scratch, has_cgroups=floor.about["cgroups"] > 0)
            stack.callback(ours.close)
            rivals += ours.rivals()
        if not given.only_mesocosm:
            rivals += installed(scratch)
        if not given.json:
            busy = os.getloadavg()[0]
            print(f"# {os.cpu_count()} CPUs, load {busy:.2f}, Linux {os.uname().release}, floor: {json.dumps(floor.about)}")
            print(f"{'':52} {'n':>5} {'best':>9}  {'p50':>9}  {'best/floor':>13} {'p50/floor':>8}   (milliseconds unless said)")
        if ours is not None:
            for row in ours.memory():
                tell(row)
        for row in latency_rows(rivals, time_rounds(rivals, given.n)):
            tell(row)
        for row in throughput_rows(rivals, max(64, 8 * given.n)):
            tell(row)


if __name__ == "__main__":
    main()
