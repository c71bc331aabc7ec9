"""Inside a guest that will lose its power: a busy agent whose state is on a disk, and what it was promised, on the console.

`busy.py SEED` goes on until the end of the world. Each line PROMISED {…} on the console is one line of history that the agent had
answered before it was printed. `busy.py check` starts an agent on what is left, and prints the whole history as it is then.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time

from mesocosm.kernel.client import Client, RemoteError, connect

SOCKET = "/run/cut/agent.sock"
DISK = "/disk"


def start() -> Client:
    """An agent on the disk's state."""
    os.makedirs("/run/cut", mode=0o755, exist_ok=True)
    environment = {**os.environ, "MESOCOSM_RUN_DIR": "/run/cut", "MESOCOSM_STATE_DIR": f"{DISK}/state"}
    log = open("/run/cut/log", "ab")  # noqa: SIM115 - the agent's
    subprocess.Popen(
        [sys.executable, "-B", "-m", "mesocosm.kernel.cli.main", "agent"], env=environment, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            return connect(SOCKET)
        except RemoteError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def busy(seed: int) -> None:
    """Launches, ends, removals; and what has been promised about them."""
    console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
    chance, client, living, number, told = random.Random(seed), start(), [], 0, set()
    os.write(console, b"READY\n")
    while True:
        act = chance.random()
        if act < 0.5 or not living:
            number += 1
            name = f"pod{number % 7}"  # ids are used again
            if name in living:
                continue
            command = chance.choice([["true"], ["false"], ["sleep", "1000"], ["sleep", "1000"], "exit 3", ["no-such-program"]])
            with contextlib.suppress(RemoteError):  # no such program, or the last one of that name lives
                client.launch_group({"name": name, "tasks": [{"name": "t", "command": command}]})
                living.append(name)
        elif act < 0.75:
            name = living.pop(chance.randrange(len(living)))
            with contextlib.suppress(RemoteError):  # it may be dead
                client.kill(name)
            client.wait(name)
            if chance.random() < 0.5:
                client.remove(name)
        else:
            answer = client.history(limit=60)
            lines = [line for line in answer["history"] if (line["id"], line["life"], line["state"]) not in told]
            told |= {(line["id"], line["life"], line["state"]) for line in lines}
            for line in lines:
                os.write(console, b"PROMISED " + json.dumps(line).encode() + b"\n")
            living = [name for name in living if any(found["id"] == name for found in client.containers())]


def check() -> None:
    """{"first", "second": all of the history as two agents, one after the other, tell it; "files"; "launched"; "boot"}."""
    answers = []
    for _ in range(2):
        client = start()
        lines, cursor = [], None
        while True:
            answer = client.history(limit=200, **({} if cursor is None else {"cursor": cursor}))
            lines += answer["history"]
            cursor = answer["next"]
            if cursor is None:
                break
        answers.append({"lines": lines, "notes": answer["notes"]})
        launched = client.launch_group({"name": f"after{len(answers)}", "tasks": [{"name": "t", "command": ["true"]}]})["state"]
        client.stop_agent()
        while os.path.exists(SOCKET):
            time.sleep(0.01)
        client.close()
        time.sleep(0.2)
    files = sorted(os.listdir(f"{DISK}/state"))
    with open("/run/cut/log") as log:
        said = log.read()
    print(json.dumps({"first": answers[0], "second": answers[1], "files": files, "launched": launched, "log": said[-3000:]}))


if __name__ == "__main__":
    check() if sys.argv[1] == "check" else busy(int(sys.argv[1]))
