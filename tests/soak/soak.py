"""The soak: random operations on a real machine for a while, and at every quiet point everything that must hold.

    python tests/soak/soak.py [--seconds 600] [--seed N] [--as root|user] [--operations N] [--list]

The operations come from `model.py`: a function of the seed alone. It is printed at the start, and on failure with the command that
does the same operations again; `--operations` ends after so many, `--list` only shows them. As root half of the time is an ordinary
user's, unless `--as` chooses. Not the same in a second run are the moments: how far a launch is when the agent dies in it, in which
order things end that end at once, which pids they have.

The oracles, and what they are here:

O1  census     at every base point (nothing but the canary lives) the machine is as at the first one: processes, control groups,
               mounts, namespaces, devices, System V objects, and the launcher's open files (mesocosm.kernel.testing.census); when
               the launcher was killed, as at the first base point since
O2  ledger     at every quiet point `ps -a` is what the model says, both ways, the directories of containers are those of the
               containers, and `audit` finds nothing that is left over or missing
O3  one end    every container that ran is told `exited` and `dead` once, with the WAIT that `wait` and `ps` tell, which is one that
               the operations allow and never changes; events are numbered without a gap over all agents
O4  allocation ranges of ids are the only thing that is allocated here: checked where they can be seen, on the simulated host
O5  answers    a connection of its own asks for a sign of life all the while: no answer takes longer than PATIENCE
O6  others     the canary pod has the same processes and goes on beating
O7  secrets    the environment of containers is in no log and in nobody's arguments (events carry the plan, to its own user)
O8  same log   of the same seed: on the simulated host (tests/runtime/test_random_operations.py), where there is no other timing
O9  flat       after WARM base points: descriptors and threads of agent and launcher, memory and ledger grow by no more than 2 %,
               or the noise floor NOISE
O10 sentinels  /etc/passwd, /etc/group, the core pattern, our own interpreter and the host's name are as before
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from operations import PATIENCE, FoundError, load, model
from oracles import Soak

from mesocosm.kernel.client import RemoteError

BASE_EVERY = 150  # operations
worlds = load("mesocosm_soak_worlds", Path(__file__).resolve().parents[1] / "system" / "worlds.py")


def abilities(world: Any) -> set[str]:
    """What the machine can do for this user."""
    world.meso("ps")  # an agent
    checks = {line["check"]: line["ok"] for line in world.meso("doctor", "--json").lines}
    found = {"descriptors"} if shutil.which("prlimit") and os.access(f"/proc/{world.agent_pid()}/fd", os.R_OK) else set()
    if checks.get("cgroups") and world.meso("run", "--name", "probe", "--memory", "32MiB", "--", "true").code == 0:
        found.add("limits")
        world.meso("rm", "probe")
    return found | {"launcher"}


def replay(rng: random.Random, can: set[str]) -> Iterator[Any]:
    """The operations of a seed, without a machine."""
    dry = model.Model(can)
    for number in range(1, 10**9):
        made = dry.choose(rng)
        dry.done(made)
        yield made
        if number % BASE_EVERY == 0:
            dry.clear()
            dry.done(model.Operation("quiet"))


def run(kind: str, seed: int, seconds: float, operations: int) -> bool:
    """One world; whether all held. What did not is printed, with the way to see it again."""
    print(f"soak: as {kind}, seed {seed}, for {seconds:.0f} s", flush=True)
    began = time.monotonic()
    with worlds.open_world(kind) as world:
        can = abilities(world)
        soak = Soak(world, can)
        done: list[str] = []
        try:
            soak.base()
            for made in replay(random.Random(seed), can):
                done.append(str(made))
                soak.do(made)
                if len(done) % BASE_EVERY == 0:
                    soak.base()
                if len(done) >= operations or time.monotonic() - began > seconds:
                    break
            soak.base()
            figures = soak.pulse.stop()
            if figures["max_ms"] > PATIENCE * 1000:
                raise FoundError(f"an answer took {figures['max_ms']} ms")
        except (FoundError, RemoteError, AssertionError, OSError) as error:
            print(f"soak: FAILED after {len(done)} operations: {type(error).__name__}: {error}")
            print("soak: the last of them:", *done[-40:], sep="\n    ")
            for log in ("agent.log", "launcher.log"):
                with contextlib.suppress(OSError):
                    print(f"soak: the end of {log}:", (world.run_dir / log).read_text(errors="replace")[-3000:], sep="\n")
            print(f"soak: the same again: make soak ARGS='--as {kind} --seed {seed} --operations {len(done)} --seconds 86400'")
            return False
        finally:
            soak.close()
        told = {"dead": sum(soak.told.dead.values()), "events": soak.told.seq, "bases": len(soak.samples), **figures}
        print(f"soak: {json.dumps({'as': kind, 'seed': seed, **soak.counts, **told, 'can': sorted(can)})}")
        for sample in (soak.samples[0], soak.samples[-1]):
            print(f"soak: {json.dumps(sample)}")
    return True


def main() -> int:
    """The exit code: 0 if everything held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--as", dest="kind", choices=("root", "user"), default=None)
    parser.add_argument("--operations", type=int, default=10**9)
    parser.add_argument("--list", action="store_true", help="only show the operations")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    if given.list:
        shown = replay(random.Random(seed), {"descriptors", "limits", "launcher"})
        for number in range(1, min(given.operations, 1000) + 1):
            print(number, next(shown))
        return 0
    kinds = [given.kind] if given.kind else (["root", "user"] if os.geteuid() == 0 else ["user"])
    for kind in kinds:
        try:
            if not run(kind, seed, given.seconds / len(kinds), given.operations):
                return 1
        except pytest.skip.Exception as reason:  # of a world: no interpreter that this user may start
            print(f"soak: not as {kind}: {reason}")
            if os.environ.get("CI"):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
