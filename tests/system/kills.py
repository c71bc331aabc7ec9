"""Kills that meet launches: pods on their way up, and several clients at once who want each of them to end.

    python kills.py SOCKET '{"pods": 30, "members": 5, "killers": 4}'      → {"findings", "rolled_back", "ran"}

A pod either never was (rolled back: no member ran a single instruction) or was and has been killed, all of it. A process of its
own, since it runs as the user of the agent.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from typing import Any

import trio

from mesocosm.kernel.client import RemoteError
from mesocosm.kernel.client import open as open_client

LONGEST = 0.06  # seconds that the first kill comes after its launch: about twice what the launch takes
CLOSE = 0.01  # seconds within which the others follow
ANSWERS = {"", "conflict", "dying"}  # of a kill: done, dead already, or on its way there


async def _kill(client: Any, root: str, delay: float, findings: list[str]) -> None:
    await trio.sleep(delay)
    answer = "not_found"
    while answer == "not_found":  # the launch has not been read yet
        try:
            await client.call("KILL_CONTAINER", container_id=root)
            answer = ""
        except RemoteError as error:
            answer = error.code
        await trio.lowlevel.checkpoint()
    if answer not in ANSWERS:
        findings.append(f"a kill of {root} was answered {answer}")


async def _one(clients: list[Any], number: int, members: int, findings: list[str]) -> str:
    """One pod from its launch to its removal: "rolled_back" or "ran"."""
    root, first, answer = f"pod{number}", clients[0], ""
    tasks = [{"name": f"m{at}", "command": "echo ran; exec sleep 1000", "kill": {"signal": "KILL"}} for at in range(members)]

    async def launch() -> None:
        nonlocal answer
        try:
            await first.call("LAUNCH_GROUP", group={"name": root, "tasks": tasks})
        except RemoteError as error:
            answer = error.code
            if answer != "launch_failed":
                raise

    chance = random.Random(number)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(launch)
        # Every other pod is killed at once, so that some are certain not to have come up.
        delay = 0.0 if number % 2 else chance.uniform(0, LONGEST)
        for client in clients:
            nursery.start_soon(_kill, client, root, delay, findings)
            delay += chance.uniform(0, CLOSE)
    ends = [await first.call("WAIT_CONTAINER", container_id=name) for name in (root, *(f"{root}.m{at}" for at in range(members)))]
    reasons = {wait["reason"] for wait in ends}
    if reasons != ({"rolled_back"} if answer else {"killed"}):
        findings.append(f"{root}: the launch was answered {answer!r}, and its members' ends were {sorted(reasons)}")
    for at in range(members) if answer else ():
        try:
            printed = [item async for item in first.stream("READ_LOGS", container_id=f"{root}.m{at}")]
        except RemoteError as error:
            printed = [] if error.code == "not_found" else [error]
        if printed:
            findings.append(f"{root}.m{at} was rolled back and has printed {printed}")
    await first.call("REMOVE_CONTAINER", container_id=root)
    return "rolled_back" if answer else "ran"


async def _main(socket: str, pods: int, members: int, killers: int) -> dict[str, Any]:
    findings: list[str] = []
    outcomes: Counter[str] = Counter(rolled_back=0, ran=0)
    async with open_client(socket) as a, open_client(socket) as b, open_client(socket) as c, open_client(socket) as d:
        for number in range(pods):
            outcomes[await _one([a, b, c, d][:killers], number, members, findings)] += 1
    return {"findings": findings, **outcomes}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[2])
    print(json.dumps(trio.run(lambda: _main(sys.argv[1], **wanted))))
