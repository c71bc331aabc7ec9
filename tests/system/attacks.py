"""Attacks: hostile programs in containers, how they are started, and what must be as it was after each of them.

What lives here: launching over one connection (a launch by the command takes twenty times as long), the words that
attack programs have in common, roots to put traps into, and the host's sentinels. What must not: the attacks, which
stand beside what has to happen to them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesocosm.kernel.client import Client, RemoteError
from mesocosm.kernel.testing.census import left_over

PYTHON = "/usr/bin/python3"
DEADLINE = 60.0
CAPABLE = ["SYS_ADMIN", "SETUID", "SETGID", "SETFCAP", "SYS_CHROOT", "DAC_OVERRIDE", "CHOWN"]  # brings mounts of one's own back

# What attack programs begin with: system calls by name, and a record of which attempts got through.
PRELUDE = """
import ctypes, errno, json, os, signal, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
tried = {}
def call(name, *arguments):
    result = getattr(libc, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def attempt(what, function):
    try:
        tried[what] = ["done", str(function())[:200]]
    except OSError as error:
        tried[what] = [errno.errorcode[error.errno], ""]
def put(path, text):
    with open(path, "w") as file:
        return file.write(text)
def get(path):
    with open(path, "rb") as file:
        return file.read(4096)
"""
REPORT = "\nif tried:\n    print(json.dumps(tried))\n"


@dataclass
class Outcome:
    """How one container ended: exit code (None if it was killed or never ran), output, and the error that refused it."""

    code: int | None
    out: str
    err: str
    error: dict[str, Any] | None = None

    @property
    def tried(self) -> dict[str, str]:
        """What an attack program's attempts came to: "done" or the name of an errno."""
        assert self.code == 0, self
        return {what: said for what, (said, _) in json.loads(self.out.splitlines()[-1]).items()}


class Attacks:
    """A connection to launch hostile containers by, and the agent's world around it."""

    def __init__(self, world: Any, client: Client) -> None:
        self.world = world
        self.client = client
        self._number = 0

    def run(self, command: list[str] | str, *, parent: str | None = None, **fields: Any) -> Outcome:
        """One container (nested in `parent`) from its launch until nothing is left of it."""
        try:
            name = self.start(command, parent=parent, **fields)
        except RemoteError as error:
            with contextlib.suppress(RemoteError):  # what was planned and rolled back is remembered until somebody has seen it
                self.client.remove(error.error.get("id", ""))
            return Outcome(None, "", "", error.error)
        return self.end(name)

    def python(self, program: str, *arguments: str, **fields: Any) -> Outcome:
        """One container with an attack program in Python."""
        return self.run(self.program(program, *arguments), **fields)

    def program(self, program: str, *arguments: str) -> list[str]:
        """The command of an attack program in Python; its last line of output says what was tried, and what came of it."""
        return [PYTHON, "-I", "-u", "-c", PRELUDE + program + REPORT, *arguments]

    def start(self, command: list[str] | str, *, parent: str | None = None, name: str | None = None, **fields: Any) -> str:
        """One container; its id. RemoteError if it is refused."""
        self._number += 1
        name = name or f"attack{self._number}"
        given = command if isinstance(command, list) else ["/bin/sh", "-c", command]
        if parent is not None:
            self.client.launch_nested_group(parent, [{"name": name, "command": given, **fields}])
            return f"{parent}.{name}"
        self.client.launch_container(name, given, **fields)
        return name

    def start_python(self, program: str, *arguments: str, **fields: Any) -> str:
        """A container with an attack program, once it has said something."""
        name = self.start(self.program(program, *arguments), **fields)
        self.wait_for(name, "\n")
        return name

    def end(self, name: str) -> Outcome:
        """Waits for a container and forgets it."""
        wait = self.client.wait(name, DEADLINE)
        outcome = Outcome(wait["exit"], self.text(name), self.text(name, "stderr"))
        self.client.remove(name)
        return outcome

    def kill(self, name: str) -> None:
        """SIGKILL, and all of it gone."""
        self.client.kill(name, "KILL")
        self.end(name)

    def text(self, name: str, stream: str = "stdout") -> str:
        """What a container has printed so far."""
        file = self.world.run_dir / f"containers/{name}/{stream}"
        return file.read_text(errors="replace") if file.exists() else ""  # a pod's own container has none

    def wait_for(self, name: str, words: str) -> None:
        """Returns when a container has printed `words`."""
        deadline = time.monotonic() + DEADLINE
        while words not in self.text(name):
            assert time.monotonic() < deadline, (self.text(name), self.text(name, "stderr"))
            time.sleep(0.01)

    def connection(self) -> contextlib.AbstractContextManager[Client]:
        """Another connection, for somebody who waits meanwhile."""
        return connected(self.world)

    def root(self, name: str) -> Path:
        """A new directory of the world's user with a shell and its libraries, for `rootfs`; everybody may read it."""
        directory = Path(self.world.directory) / name
        for file in ["/bin/sh", *_libraries("/bin/sh")]:
            copy = directory / file.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        Path(self.world.directory).chmod(0o755)
        for path in (directory, *directory.rglob("*")):
            path.chmod(0o755)
            os.chown(path, self.world.uid, self.world.gid)
        return directory

    def directory(self, name: str, mode: int = 0o777) -> Path:
        """A new empty directory of the host's, open to everybody."""
        path = Path(self.world.directory) / name
        path.mkdir()
        path.chmod(mode)
        os.chown(path, self.world.uid, self.world.gid)
        Path(self.world.directory).chmod(0o755)
        return path


def _libraries(program: str) -> list[str]:
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(/\S+) \(0x", needed)


def sentinels(world: Any) -> dict[str, str]:
    """What no attack may change on the host."""
    watched = ["/etc/passwd", "/etc/group", "/etc/shadow", "/bin/sh", "/proc/sys/kernel/core_pattern", PYTHON, world.python]
    found = {}
    for path in watched:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            content = Path(path).read_bytes() if os.access(path, os.R_OK) else b""
            found[path] = f"{status.st_mode:o} {status.st_uid} {hashlib.sha256(content).hexdigest()}"
    return found


CONNECT = """
import socket, sys
agent = socket.socket(socket.AF_UNIX)
agent.connect(sys.argv[1])
asked = socket.socket(fileno=0)
socket.send_fds(asked, [b"x"], [agent.fileno()])
asked.recv(1)
"""


@contextlib.contextmanager
def connected(world: Any) -> Iterator[Client]:
    """A connection of the world's user: whoever connects must be them, and be there as long as it is used."""
    ours, theirs = socket.socketpair()
    command = world.as_user(world.python, "-I", "-c", CONNECT, str(world.run_dir / "agent.sock"))
    with ours, theirs, subprocess.Popen(command, stdin=theirs, cwd="/") as peer:
        ours.settimeout(DEADLINE)
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        with socket.socket(fileno=fd) as connection, Client(connection, DEADLINE) as client:
            connection.settimeout(DEADLINE)
            yield client
        peer.kill()


@contextlib.contextmanager
def attacking(canary: Any) -> Iterator[Attacks]:
    """Attacks beside a canary. Afterwards nothing is left of them, the host's sentinels are as they were, and so is the canary."""
    before, host = canary.census(), sentinels(canary.world)
    with connected(canary.world) as client:
        yield Attacks(canary.world, client)
        left = _end_all(client)
    canary.assert_untouched()
    assert sentinels(canary.world) == host
    assert left == [], "a test has not ended its own containers"
    assert left_over(before) == []


def _end_all(client: Client) -> list[str]:
    """Ends what a test that failed has left, so that it is not the next one's failure, too."""
    left = sorted({line["id"].partition(".")[0] for line in client.containers(all=True)} - {"canary"})
    for name in left:
        with contextlib.suppress(RemoteError):
            client.kill(name, "KILL")
        with contextlib.suppress(RemoteError):
            client.wait(name, DEADLINE)
            client.remove(name)
    return left
