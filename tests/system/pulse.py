"""A canary connection: asks an agent for a sign of life every few milliseconds, in a process of its own, and keeps the times.

    python pulse.py SOCKET        until a line (or the end) of standard input; then {"asked", "p99_ms", "max_ms"} as JSON

What is measured is what any client sees: the agent's loop, the kernel's scheduler, and this process.
"""

from __future__ import annotations

import json
import select
import sys
import time

from mesocosm.kernel.client import connect

PAUSE = 0.005  # seconds between an answer and the next question


def main() -> None:
    """Asks until told to stop."""
    took = []
    with connect(sys.argv[1], timeout=60) as client:
        client.ping()
        print("ready", flush=True)
        while not took or not select.select([sys.stdin], [], [], PAUSE)[0]:
            started = time.perf_counter()
            client.ping()
            took.append(time.perf_counter() - started)
    took.sort()
    p99 = took[min(len(took) - 1, len(took) * 99 // 100)]
    print(json.dumps({"asked": len(took), "p99_ms": round(1000 * p99, 2), "max_ms": round(1000 * took[-1], 2)}), flush=True)


if __name__ == "__main__":
    main()
