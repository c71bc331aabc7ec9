"""How a verb comes to its agent: the socket that is there, or a new agent behind it.

What lives here: connecting, and starting `meso agent` where none answers. What must not: what is then said.

Theory: one code path. Whoever needs an agent first starts one, and it ends when it is idle, so nothing has to be
installed or started by hand. Two verbs that do this at once start two agents; the agent's own lock decides, the loser
ends with `conflict`, and both verbs then find the winner's socket. A socket that was named with --socket, or handed into
a container, belongs to somebody: there nobody is started. Nor does a verb that has been answered, and then cut off, start
the next agent where nothing goes on without one: whoever ended the last one in order had everything end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mesocosm.kernel.cli import paths
from mesocosm.kernel.core.errors import EXIT_CODES, AgentGoneError, ConflictError, MesoError

if TYPE_CHECKING:
    import subprocess
    from _socket import socket

    from mesocosm.kernel.client import Client

START_SECONDS = 10.0
NAMELESS_SECONDS = 3.0  # for an agent that serves to bind its socket anew, should that have been removed: it looks twice a second
PATIENCE_SECONDS = 0.5  # for the agent that has the lock to open its socket, before another one is tried
IDLE_EXIT = "60s"
KILLED = -9  # what Popen makes of a death by SIGKILL


def connect(arguments: argparse.Namespace, *, start: bool = True, timeout: float | None = None, reconnect: bool = True) -> Client:
    """A client of the agent; one is started if none answers and `start` allows it.

    `timeout`: seconds that any single answer may take, None for as long as it takes. `reconnect`: whether it goes on with the
    next agent when this one is gone: one that it finds, or that it starts, if anything goes on without one or nothing had been
    answered yet. Never where the socket was named.
    Errors: AgentGoneError where none is to be started, or, with the end of its log, if it does not come up.
    """
    path = os.path.abspath(arguments.socket) if arguments.socket else paths.socket()
    if not arguments.socket and not paths.is_inside_container():
        paths.check_run_dir(paths.run_dir())
    client = _dial(path, arguments, start=start, timeout=timeout)
    client.on_silence = _say_silence
    if reconnect and not arguments.socket:
        from mesocosm.kernel.client import RECONNECT

        def redial() -> socket | None:
            if client.is_answered and not _goes_on(path):
                return None
            return _redial(path, arguments, start=start, timeout=timeout)

        client.survive(redial, RECONNECT)
    return client


def _goes_on(path: str) -> bool:
    """Whether there is a next agent, or anything that needs one: an agent that ends in order takes the launcher with it when
    nothing lives. Whoever is about to end, or to serve, is waited for."""
    if paths.is_inside_container():
        return True  # its run directory is not for us to see
    run_dir = paths.run_dir()
    deadline = time.monotonic() + START_SECONDS
    while not os.path.lexists(path) and not os.path.lexists(os.path.join(run_dir, "launcher.sock")):
        if _holder(run_dir) is None:
            return False
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    return True


def _say_silence() -> None:
    print("meso: the agent does not answer (stopped, or very busy); still waiting", file=sys.stderr, flush=True)


def _redial(path: str, arguments: argparse.Namespace, *, start: bool, timeout: float | None) -> socket:
    from mesocosm.kernel.client import RemoteError

    try:
        return _dial(path, arguments, start=start, timeout=timeout).release()
    except AgentGoneError as error:  # one that did not come up in time may be followed by one that does
        raise RemoteError(error.as_object()) from None


def _dial(path: str, arguments: argparse.Namespace, *, start: bool, timeout: float | None) -> Client:
    client = _try(path, timeout)
    if client is not None:
        return client
    if not start or arguments.socket or paths.is_inside_container():
        hint = "start one: meso agent --socket PATH" if arguments.socket else None
        raise AgentGoneError("no agent answers", target=path, hint=hint)
    return _start(path, arguments, timeout)


def check_set(client: Client, arguments: argparse.Namespace) -> None:
    """ConflictError if another set was asked for than that of the agent which is there: it would launch without it."""
    wanted = paths.set_name(arguments.set)
    if not wanted:
        return
    having = client.version().get("set")
    if having is not None and having != wanted:
        raise ConflictError(
            "the agent that is running has another plug-in set",
            have=str(having),
            need=wanted,
            hint="leave it out, end that agent (meso agent --stop), or start another one in its own MESOCOSM_RUN_DIR",
        )


def _try(path: str, timeout: float | None) -> Client | None:
    from mesocosm.kernel import client

    try:
        return client.connect(path, timeout=timeout, reconnect=0)
    except client.RemoteError as error:
        if error.code == "agent_gone":
            return None
        raise


def agent_command(arguments: argparse.Namespace) -> list[str]:
    """The command line of the agent that a verb starts: this interpreter with its own flags."""
    import subprocess

    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # -P: the agent runs in /, and must not import from there.
    command = [sys.executable, *flags, "-P", "-m", "mesocosm.kernel.cli.main", "agent", "--idle-exit", IDLE_EXIT]
    return [*command, "--set", arguments.set] if arguments.set else command


def _start(path: str, arguments: argparse.Namespace, timeout: float | None) -> Client:
    run_dir = paths.make_run_dir()
    log_path, launcher_log = os.path.join(run_dir, "agent.log"), os.path.join(run_dir, "launcher.log")
    log_starts = {path: _size(path) for path in (log_path, launcher_log)}

    def start() -> subprocess.Popen[bytes]:
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            return _spawn(agent_command(arguments), log)
        finally:
            os.close(log)

    began = time.monotonic()
    process = start() if _holder(run_dir) is None else None  # an agent that has the lock has, or is about to have, a socket
    lost: float | None = None
    deadline = began + START_SECONDS
    pause = 0.005
    while True:
        client = _try(path, timeout)
        code = process.poll() if process is not None else EXIT_CODES["conflict"]
        if client is not None:
            if process is not None:
                process.returncode = 0  # it goes on without us, on purpose: no warning about that
            return client
        if code == EXIT_CODES["conflict"] and (holder := _holder(run_dir)) is not None:
            if time.monotonic() > began + NAMELESS_SECONDS and _serves(run_dir):
                raise _has_no_socket(path, holder)
            lost = time.monotonic()
        elif code == EXIT_CODES["conflict"] and (conflict := _state_in_use(run_dir)) is not None:
            raise conflict
        # A loser of the race ends with `conflict`. The winner's socket may need some more time; or there was no winner, but
        # an agent that was about to end: then the next one gets the lock.
        if code == KILLED and time.monotonic() < deadline:  # nothing of its own doing: the next one may be let live
            process, lost = start(), None
        elif code is not None and code != EXIT_CODES["conflict"]:
            raise _did_not_start(f"the agent ended at once (exit {code})", log_path, log_starts)
        elif code is not None and (lost := lost or time.monotonic()) + PATIENCE_SECONDS < time.monotonic():
            process, lost = start(), None
        if time.monotonic() > deadline:
            if process is not None:
                process.returncode = 0
            raise _did_not_start(f"the agent did not come up within {START_SECONDS:.0f} s", log_path, log_starts)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def _holder(run_dir: str) -> int | None:
    from mesocosm.kernel.linux.procfs import lock_holder

    return lock_holder(os.path.join(run_dir, "agent.lock"))


def _state_in_use(run_dir: str) -> MesoError | None:
    """Why no agent of this run directory can start, if another one's has the state directory."""
    from mesocosm.kernel.runtime.locking import in_use

    return in_use(paths.state_dir(), run_dir)


def _serves(run_dir: str) -> bool:
    """Whether the agent that has the lock had a socket once: it is not on its way up."""
    try:
        with open(os.path.join(run_dir, "agent.lock"), "rb") as file:
            return bool(file.read(16))
    except OSError:
        return False


def _has_no_socket(path: str, holder: int) -> MesoError:
    return AgentGoneError(
        f"an agent (process {holder}) has this directory, and does not answer on its socket",
        target=path,
        hint=f"it may serve another path (--socket PATH); kill -TERM {holder} ends it, and containers go on",
    )


def _spawn(command: list[str], log: int) -> subprocess.Popen[bytes]:
    import subprocess

    environment = dict(os.environ)
    if search := environment.get("PYTHONPATH"):  # relative entries would mean something else in /
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in search.split(os.pathsep) if entry)
    for name in ("MESOCOSM_SOCKET", "MESOCOSM_RUN_DIR", "MESOCOSM_STATE_DIR"):
        if environment.get(name):
            environment[name] = os.path.abspath(environment[name])
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment, start_new_session=True, close_fds=True
    )


def _did_not_start(message: str, log_path: str, starts: Mapping[str, int]) -> MesoError:
    lines: list[str] = []
    for path, start in starts.items():
        try:
            with open(path, "rb") as log:
                log.seek(start)
                lines += log.read(2**20).decode("utf-8", "backslashreplace").splitlines()[-12:]
        except OSError:
            continue
    lines = [line for at, line in enumerate(lines) if not any(line in other for other in lines[:at])]  # both logs tell some
    said = "".join(f"\n    {line}" for line in lines)
    return AgentGoneError(message + (f"; its last words:{said}" if said else ""), target=log_path, hint="meso doctor")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
