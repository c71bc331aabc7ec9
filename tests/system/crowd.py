"""A crowd: many containers that live at once, each a group of its own, over a few connections.

    python crowd.py SOCKET '{"verb": "launch", "count": 1000, "connections": 8}'      → {"errors", "seconds"}
    python crowd.py SOCKET '{"verb": "end", "count": 1000, "connections": 8}'         killed, waited for, removed

Errors are error objects, each with the container that it is about. A process of its own, since it runs as the user of the agent.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import trio

from mesocosm.kernel.client import RemoteError
from mesocosm.kernel.client import open as open_client


async def _launch(client: Any, name: str) -> None:
    # The first process of a container's own PID namespace ignores what it does not handle: SIGKILL, or a second of grace each.
    task = {"name": name, "command": ["sleep", "1000"], "kill": {"signal": "KILL"}}
    await client.call("LAUNCH_GROUP", group={"name": name, "executor": "command", "tasks": [task]})


async def _end(client: Any, name: str) -> None:
    await client.call("KILL_CONTAINER", container_id=name)
    wait = await client.call("WAIT_CONTAINER", container_id=name)
    if (wait["signal"], wait["reason"]) != (9, "killed"):
        raise RemoteError({"code": "internal", "message": f"ended otherwise: {wait}"})
    await client.call("REMOVE_CONTAINER", container_id=name)


async def _main(socket: str, verb: str, count: int, connections: int) -> dict[str, Any]:
    errors: list[dict[str, Any]] = []
    names: Iterator[str] = (f"crowd{number}" for number in range(count))
    act = {"launch": _launch, "end": _end}[verb]

    async def work() -> None:
        async with open_client(socket) as client:
            for name in names:
                try:
                    await act(client, name)
                except RemoteError as error:
                    errors.append({"of": name, **error.error})

    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(work)
    return {"errors": errors, "seconds": round(time.monotonic() - began, 2)}


if __name__ == "__main__":
    wanted = json.loads(sys.argv[2])
    print(json.dumps(trio.run(lambda: _main(sys.argv[1], **wanted))))
