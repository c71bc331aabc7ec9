"""A client that goes away in the middle of a launch, at each moment in turn, in a process of its own (the agent looks at who asks).

    python leaver.py SOCKET STEP ROUNDS

Turn by turn it launches a pod as a stream, takes STEP event lines more than the time before, and closes the connection without a
word; also as a plain call, right after asking. Every turn ends when the pod runs or is gone, and is forgotten. Then a line of JSON
{"turns", "running", "rolled_back", "unknown", "lines"}: how often it was what, and how many lines a launch has.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from mesocosm.kernel.client import RemoteError, connect

PATIENCE = 60.0  # seconds
TASK = {"command": ["sleep", "1000"]}
POD: dict[str, Any] = {"name": "left", "tasks": [{"name": "a", **TASK}, {"name": "b", **TASK, "tasks": [{"name": "c", **TASK}]}]}
WHOLE = {"left", "left.a", "left.b", "left.b.c"}


def leave_after(path: str, lines: int) -> int:
    """Launches and goes after so many lines (-1: a plain call, and no answer awaited); how many there were."""
    seen = 0
    with connect(path, timeout=PATIENCE) as client:
        if lines < 0:
            client._send("LAUNCH_GROUP", {"group": POD})
            return 0
        stream = client.run_group(POD)
        while seen < lines:
            line = stream.next(PATIENCE)
            seen += 1
            if line["type"] == "started" and line["id"] == "left.b.c":
                break
    return seen


def outcome(path: str) -> str:
    """What became of it, once that is certain: whole, or gone."""
    deadline = time.monotonic() + PATIENCE
    with connect(path, timeout=PATIENCE) as client:
        while time.monotonic() < deadline:
            states = {line["id"]: line["state"] for line in client.containers(all=True) if line["id"] in WHOLE}
            if not states:
                return "unknown"
            if set(states) == WHOLE and set(states.values()) == {"RUNNING"}:
                return "running"
            if set(states.values()) == {"DEAD"}:
                return client.explain("left")["group"]["state"].lower()
            time.sleep(0.002)
    raise SystemExit(f"neither whole nor gone: {states}")


def forget(path: str) -> None:
    """So that the next turn may have its name."""
    with connect(path, timeout=PATIENCE) as client:
        try:
            client.kill("left", "KILL")
        except RemoteError as error:
            if error.code != "conflict":
                raise
        client.wait("left")
        client.remove("left")


def main() -> None:
    """Until a turn has seen all lines there are, and then over again."""
    path, step, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    found = {"turns": 0, "running": 0, "rolled_back": 0, "unknown": 0, "lines": 0}
    for _ in range(rounds):
        for lines in (-1, *range(0, 10_000, step)):
            seen = leave_after(path, lines)
            time.sleep(0.02 if lines < 1 else 0)  # the agent may not have read yet what nobody waits for
            became = outcome(path)
            found["turns"] += 1
            found[became] += 1
            if became != "unknown":
                forget(path)
            if 0 <= seen < lines:
                found["lines"] = seen
                break
    print(json.dumps(found))


if __name__ == "__main__":
    main()
