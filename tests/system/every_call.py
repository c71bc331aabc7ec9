"""Kills the agent with -9 before and after every system call of what it does: run by test_every_call.py in a world of its own.

    every_call.py [launcher:|both:|careless:|client:]SCENARIO MARKS ROUNDS SEED

A round: an agent is brought to the marker, does what the scenario is about, and is killed at its N-th system call from there on
(wardens.py); the next agent recovers; then the machine, the ledger, the launcher and the programs themselves are looked at. Then
that agent is killed, a third one recovers, and nothing may have changed. ROUNDS 0: every call of every thread from number SEED on,
each before and after, until the scenario ends by itself twice; otherwise so many of them, at a distance that is coprime to their
number and from a place that SEED says. Programs leave their names in MARKS.

`launcher:` kills the launcher instead, `both:` the agent besides; `careless:` is a control, with agents that tell an exit
of all that they find running; `client:` has for its scenario a verb of the command (run, wait, logs, events) which waits meanwhile.

A line of JSON for each round: {"at", "after", "last", "reached", "answered", "outcome", "problems", "seconds"}; the first is one
in which nobody is killed and has "calls" and "names" besides.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator

from every_call_clients import VERBS
from every_call_machine import Machine
from every_call_rounds import LauncherRounds, Rounds
from every_call_scenarios import MISHAPS, SCENARIOS

from mesocosm.kernel.runtime import recovery
from mesocosm.kernel.runtime.world import Cell, World


def _careless() -> None:
    recover = recovery.recover

    async def telling_again(world: World) -> list[Cell]:
        living = await recover(world)
        for cell in living:
            world.journal.add(cell.id, "exited", {})
        return living

    recovery.recover = telling_again


def moments(rounds: int, seed: int, calls: int) -> Iterator[tuple[int, bool]]:
    """(number of the call, whether after it)."""
    if not rounds:
        for number in itertools.count(seed):
            yield number, False
            yield number, True
    chance = random.Random(seed)
    total = 2 * calls
    step = next(step for step in range(max(1, total // rounds), total + 2) if math.gcd(step, total) == 1)
    place = chance.randrange(total)
    for _ in range(rounds):
        yield place // 2 + 1, bool(place % 2)
        place = (place + step) % total


def rounds_of(victim: str, name: str, machine: Machine) -> Rounds:
    """Those in which `victim` is killed."""
    if victim == "client":
        return VERBS[name](machine)
    if victim in ("launcher", "both"):
        return LauncherRounds(machine, SCENARIOS[name](machine), both=victim == "both")
    return Rounds(machine, SCENARIOS[name](machine))


def main() -> None:
    """See above."""
    name, marks, rounds, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    victim, _, name = name.rpartition(":")
    if victim == "careless":
        _careless()  # here, before there is an agent: in all of them
    machine = Machine(marks, MISHAPS)
    tried = rounds_of(victim, name, machine)
    whole = tried.round(0, after=False)
    print(json.dumps(whole), flush=True)
    missed = 0
    for at, after in moments(rounds, seed, whole["calls"]):
        began = time.monotonic()
        line = tried.round(at, after=after)
        line["seconds"] = round(time.monotonic() - began, 2)
        print(json.dumps(line), flush=True)
        missed = 0 if line["reached"] else missed + 1
        if line["outcome"] == "wrong" or (not rounds and missed == 4):
            break
    if not tried.scenario.afresh:
        tried.stop()


if __name__ == "__main__":
    main()
