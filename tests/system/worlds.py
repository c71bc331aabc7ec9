"""A world: one agent's run directory and state, a user, and the command to talk to it; taken down afterwards.

What lives here: how system tests start `meso` as root or as an ordinary user, and how a world ends. Everything
goes through the command in a process of its own, as a user would do it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE = 60.0  # for verbs that take a tenth of a second


@dataclass
class Answer:
    """What a verb printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """stdout as JSON Lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        """The error object: of a line {"error": …} or of the `end` line."""
        found = [line["error"] for line in self.lines if line.get("error")]
        assert found, f"no error object in {self.out!r} {self.err!r}"
        last: dict[str, Any] = found[-1]
        return last


@dataclass
class World:
    """An agent's directories, and who uses them. `python` can be started by that user."""

    directory: Path
    user: str
    uid: int
    gid: int
    python: str
    environment: Mapping[str, str]
    cgroup: Path | None = None  # a delegated subtree, where cgroup v2 is all there is
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run_dir(self) -> Path:
        """MESOCOSM_RUN_DIR."""
        return self.directory / "run"

    def command(self, *words: str) -> list[str]:
        """The command line of a verb."""
        return [self.python, "-B", "-m", "mesocosm.kernel.cli.main", *words]

    def as_user(self, *command: str) -> list[str]:
        """The command line that runs `command` as this world's user, in its cgroup."""
        if self.uid == os.geteuid():
            return list(command)
        become = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", *command]
        if self.cgroup is None:
            return become
        return ["sh", "-c", f'echo $$ > {self.cgroup}/shell/cgroup.procs && exec "$@"', "sh", *become]

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        """A verb in the background; killed with the world if it is still there."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        child = subprocess.Popen(
            self.as_user(*self.command(*words)), text=True, env=dict(self.environment), cwd="/", **(options | more)
        )
        self.children.append(child)
        return child

    def meso(self, *words: str, given: str | None = None, timeout: float = DEADLINE) -> Answer:
        """A verb, to its end. `given` is its standard input."""
        child = self.start(*words, **({"stdin": subprocess.PIPE} if given is not None else {}))
        out, err = child.communicate(given, timeout=timeout)
        return Answer(child.returncode, out, err)

    def run(self, pod: Mapping[str, Any], *words: str) -> Answer:
        """``meso run --json -`` of a pod; the answer has the event lines."""
        return self.meso("run", "--json", *words, "-", given=json.dumps(pod))

    def script(self, name: str, *words: str, timeout: float = DEADLINE) -> Any:
        """What a script beside this file prints, as JSON: a client of the agent, run as this user with the socket as first word."""
        command = [self.python, "-B", str(Path(__file__).with_name(name)), str(self.run_dir / "agent.sock"), *words]
        environment = dict(self.environment)
        child = subprocess.run(
            self.as_user(*command), env=environment, cwd="/", capture_output=True, text=True, timeout=timeout, check=False
        )
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout)

    def ps(self) -> dict[str, dict[str, Any]]:
        """``meso ps -a`` by id."""
        answer = self.meso("ps", "-a", "--json")
        assert answer.code == 0, answer.err
        return {line["id"]: line for line in answer.lines}

    def agent_pid(self) -> int:
        """The agent's pid: whoever listens on the socket, as the kernel says."""
        return self._listener("agent.sock", socket.SOCK_STREAM)

    def end_agent(self, number: signal.Signals = signal.SIGTERM) -> None:
        """The agent gets the signal and is gone; containers go on."""
        agent = os.pidfd_open(self.agent_pid())
        signal.pidfd_send_signal(agent, number)
        assert select.select([agent], [], [], DEADLINE)[0]
        os.close(agent)

    def launch_by_one_who_dies(self, pod: Mapping[str, Any], strike: int) -> Answer:
        """The answer to a launch whose agent is killed at that strike: 1 is before the intent, then one before each effect."""
        self.end_agent()
        before, self.environment = self.environment, {**self.environment, "MESOCOSM_FAULT": f"kill-agent:{strike}"}
        try:
            agent = self.start("agent", "--allow-faults")
            assert agent.stderr is not None
            agent.stderr.readline()  # it serves
            answer = self.run(pod)
            agent.wait(DEADLINE)
            return answer
        finally:
            self.environment = before

    def launcher_pid(self) -> int:
        """The launcher's, likewise."""
        return self._listener("launcher.sock", socket.SOCK_SEQPACKET)

    def _listener(self, name: str, kind: int) -> int:
        with socket.socket(socket.AF_UNIX, kind) as connection:
            connection.connect(str(self.run_dir / name))
            pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            return pid

    def close(self) -> None:
        """Ends everything in the world, and checks that it does end."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    pipe.close()
        if (self.run_dir / "agent.sock").exists() or (self.run_dir / "launcher.sock").exists():
            answer = self.meso("agent", "--stop")
            assert answer.code in (0, 7), answer
        deadline = time.monotonic() + 10
        while left := self._processes():  # the last ones wait for PID 1 to see that they have died
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.02)

    def _processes(self) -> list[str]:
        """Who runs with this world's directories, or as its user where it has one of its own; dead or alive."""
        mark = f"MESOCOSM_RUN_DIR={self.run_dir}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit():
                    continue
                status = (entry / "status").read_text()
                is_theirs = self.uid != os.geteuid() and f"\nUid:\t{self.uid}\t" in status
                if is_theirs or mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(f"{entry.name} {status.splitlines()[0]}")
        return found


@contextlib.contextmanager
def open_world(kind: str) -> Iterator[World]:
    """A world of `kind` "root" or "user". The directory is short-lived, and open to its user only."""
    account = _account(kind)
    directory = Path(tempfile.mkdtemp(prefix="meso-"))
    try:
        os.chown(directory, account.pw_uid, account.pw_gid)
        cgroup = _delegate(account) if kind == "user" and os.geteuid() == 0 and V2.exists() else None
        environment = _environment(directory, account)
        world = World(directory, account.pw_name, account.pw_uid, account.pw_gid, _python(kind), environment, cgroup)
        try:
            yield world
        finally:
            world.close()
            if cgroup is not None:
                _take_back(cgroup)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if kind == "user" and os.geteuid() == 0:
            subprocess.run(["userdel", account.pw_name], check=True, capture_output=True)


def _delegate(account: pwd.struct_passwd) -> Path:
    """A subtree of cgroup v2 that belongs to the user, whose processes stand in its leaf `shell`. cgroups(7)."""
    top = V2.parent / f"mesocosm-test-{account.pw_name}"
    for controller in V2.read_text().split():
        with contextlib.suppress(OSError):  # not every controller can be handed on; what matters shows in what the user finds
            (V2.parent / "cgroup.subtree_control").write_text(f"+{controller}")
    for directory in (top, top / "shell"):
        directory.mkdir()
        for path in (directory, directory / "cgroup.procs", directory / "cgroup.subtree_control", directory / "cgroup.threads"):
            os.chown(path, account.pw_uid, account.pw_gid)
    return top


def _take_back(top: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            for directory in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                directory.rmdir()
            top.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


V2 = Path("/sys/fs/cgroup/cgroup.controllers")


def _account(kind: str) -> pwd.struct_passwd:
    if kind == "root" or os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    name = f"meso{os.getpid()}x{time.monotonic_ns() % 1000}"
    # Not the next one free: in another mount namespace with accounts of its own that is somebody else's, whose keys would count.
    number = str(20_000 + int.from_bytes(os.urandom(2), "big") % 40_000)
    subprocess.run(["useradd", "--no-create-home", "--uid", number, "--shell", "/bin/sh", name], check=True, capture_output=True)
    return pwd.getpwnam(name)


def _python(kind: str) -> str:
    """This interpreter, or for an ordinary user one of the same version that everybody may start."""
    if kind == "root" or os.geteuid() != 0:
        return sys.executable
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = shutil.which(version, path="/usr/bin:/usr/local/bin:/bin")
    if found is None:
        import pytest

        pytest.skip(f"no {version} that an ordinary user may start: install the system's, or put the virtual environment elsewhere")
    return found


def _environment(directory: Path, account: pwd.struct_passwd) -> dict[str, str]:
    import msgspec

    packages = Path(msgspec.__file__).resolve().parents[1]
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(directory),
        "LANG": "C.UTF-8",
        "PYTHONPATH": f"{REPOSITORY}/contrib/import-root:{packages}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MESOCOSM_RUN_DIR": str(directory / "run"),
        "MESOCOSM_STATE_DIR": str(directory / "state"),
        **{name: os.environ[name] for name in ("APART",) if name in os.environ},  # see tests/apart
    }
