"""`meso agent`: the process behind the socket. Puts the parts together, and ends them in the right order.

What lives here: composition (directories, lock, plug-ins, host, launcher, agent, server), signals, idleness, `--stop`.
What must not: anything that a test of the parts could not do without this process.

Theory: the agent may go away at any time and nothing depends on it. SIGTERM closes the socket and leaves the containers to
the launcher; the next agent takes them over. Only STOP_AGENT ends them first. An agent that was started by another verb
ends when nothing lives and nobody has been connected for a while; then the launcher goes with it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any

from mesocosm.kernel.cli import connection, paths
from mesocosm.kernel.cli.output import Console
from mesocosm.kernel.core.errors import AgentGoneError, ConflictError, DeadlineError, MesoError, from_oserror

if TYPE_CHECKING:
    from mesocosm.kernel.cli.staying import Berth
    from mesocosm.kernel.contracts import HostFacts
    from mesocosm.kernel.runtime.agent import Agent
    from mesocosm.kernel.runtime.locking import Lock
    from mesocosm.kernel.wire.server import Server

STOP_SECONDS = 60.0
AGAIN_SECONDS = 1.0  # between two attempts to end what cannot be ended
_LET_GO_SECONDS = 2.0  # between the two locks of an agent that ends


def agent(arguments: argparse.Namespace, console: Console) -> int:
    """The verb: serves until SIGTERM, SIGINT, STOP_AGENT or idleness; or, with --stop, stops the one that serves."""
    if arguments.stop:
        return _stop(arguments, console)
    idle = None
    if arguments.idle_exit is not None:
        from mesocosm.kernel.core.resources import duration

        idle = duration(arguments.idle_exit, "--idle-exit") / 1000
    if not arguments.allow_faults:
        os.environ.pop("MESOCOSM_FAULT", None)  # inherited from whoever started us: no reason to fail
    return _serve(arguments, idle, console)


def _stop(arguments: argparse.Namespace, console: Console) -> int:
    # Containers may live without an agent (it was killed): then one is needed to end them.
    alone = os.path.exists(os.path.join(paths.run_dir(), "launcher.sock"))
    try:
        client = connection.connect(arguments, start=alone, timeout=STOP_SECONDS)
    except AgentGoneError as error:
        raise error.with_fields(hint="none is running, so there is nothing to stop") from None
    process = _peer(client.fileno())
    with client:
        client.stop_agent()
    path = os.path.abspath(arguments.socket) if arguments.socket else paths.socket()
    deadline = time.monotonic() + STOP_SECONDS
    # The process too, not only its socket: what comes next may need its lock, its namespaces or its user.
    while os.path.exists(path) or (process is not None and not select.select([process], [], [], 0)[0]):
        if time.monotonic() > deadline:
            raise DeadlineError("the agent has been told to stop, and has not", target=path, need=f"≤ {STOP_SECONDS:.0f} s")
        time.sleep(0.01)
    if process is not None:
        os.close(process)
    if console.as_json:
        console.json({"stopped": path})
    return 0


def _peer(connection: int) -> int | None:
    """A pidfd of the process that listens at the other end, as the kernel says; None if it cannot be seen from here."""
    with socket.socket(fileno=os.dup(connection)) as peer:
        pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except ProcessLookupError:
        return None


def _serve(arguments: argparse.Namespace, idle: float | None, console: Console) -> int:
    import trio

    from mesocosm.kernel.launcher.confinement import confine
    from mesocosm.kernel.linux.leaf import enter_leaf
    from mesocosm.kernel.linux.probe import boot_id, probe, run_id
    from mesocosm.kernel.runtime.ledger import living_processes
    from mesocosm.kernel.runtime.locking import lock
    from mesocosm.kernel.sets import loading

    run_dir, state_dir = paths.make_run_dir(), paths.state_dir()
    _make(state_dir, 0o700)
    _make(os.path.join(run_dir, "containers"), 0o711)
    held = [lock(run_dir)]  # until this process ends: who has them is the agent
    try:
        held.append(_lock_state(state_dir, run_dir))
        plugins = loading.load(paths.set_name(arguments.set), paths.config_dirs())
        socket_path = os.path.abspath(arguments.socket) if arguments.socket else paths.socket()
        uid = os.geteuid()
        enter_leaf(run_id(run_dir))
        if uid != 0:
            confine(
                run_dir, living_processes(os.path.join(run_dir, "ledger.db"), boot_id())
            )  # from here on this process is root of a small world: paths has been asked all it is asked
        host = probe(run_dir, state_dir, uid=uid, rootless=uid != 0)
        # Peers are seen from inside that world too: its own user is 0 there.
        _raise_the_limit_of_open_files()
        _calm_the_collector()
        held[0].note(b"")
        trio.run(_main, host, plugins, socket_path, idle, os.geteuid(), held[0], console)
    except BaseExceptionGroup as group:
        first = _first_of(group)
        if not isinstance(first, MesoError) or os.environ.get("MESOCOSM_TRACEBACK"):
            traceback.print_exception(group)  # a bug: the log has all of it
        raise first from None
    finally:
        for each in reversed(held):
            each.close()
    return 0


def _lock_state(state_dir: str, run_dir: str) -> Lock:
    """The state directory's lock; ConflictError if it is somebody else's for longer than an agent takes to end."""
    from mesocosm.kernel.runtime.locking import in_use, lock, sign

    deadline = time.monotonic() + _LET_GO_SECONDS
    while True:
        try:
            held = lock(state_dir, "MESOCOSM_STATE_DIR")
            sign(held, run_dir)
            return held
        except ConflictError as error:
            if time.monotonic() > deadline:
                raise in_use(state_dir, run_dir) or error from None
        time.sleep(0.02)


def _make(directory: str, mode: int) -> None:
    """A directory of the agent's, with what is above it; LaunchError that says what is in the way."""
    try:
        os.makedirs(directory, mode, exist_ok=True)
    except OSError as error:
        raise from_oserror(error, syscall="mkdir", target=directory, doing="making the directory") from None


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The exception that says most: a MesoError before any other."""
    known = group.subgroup(MesoError) or group
    found: BaseException = known
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _raise_the_limit_of_open_files() -> None:
    """A large group has some ten descriptors for each member open until all of them stand at the barrier."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _calm_the_collector() -> None:
    """Almost nothing here is cyclic garbage, but every launch allocates enough to set the collector off several times, and
    each time it walks whatever lives. What lives by now stays. Not at all until the containers that go on are known again:
    they make much, and all of it stays."""
    gc.collect()
    gc.freeze()
    gc.disable()


def _call_the_collector() -> None:
    """For what comes from now on, a tenth as often as it would come by itself."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    gc.enable()


async def _main(
    host: HostFacts, plugins: Any, socket_path: str, idle: float | None, uid: int, held: Lock, console: Console
) -> None:
    from pathlib import Path

    import trio

    from mesocosm.kernel.cli.staying import Berth
    from mesocosm.kernel.launcher.client import open_launcher
    from mesocosm.kernel.runtime.agent import Agent
    from mesocosm.kernel.runtime.recording import Recorder
    from mesocosm.kernel.wire.authority import Access
    from mesocosm.kernel.wire.listening import bind
    from mesocosm.kernel.wire.server import Server

    async with open_launcher(host.run_dir) as launcher, trio.open_nursery() as nursery:
        history = partial(Recorder, f"{host.state_dir}/history.db", boot_id=host.boot_id)
        service = Agent(host=host, plugins=plugins, launcher=launcher, history=history)
        await nursery.start(service.run)  # grows the nurseries of what lives from the ledger, then serves
        _call_the_collector()
        server = Server(service, version=_version(), run_id=host.run_id, set_name=plugins.set_name, access=Access(agent=uid))
        with bind(Path(socket_path)) as listener:
            await nursery.start(server.serve, listener)
            console.words(f"agent {os.getpid()} serves {socket_path}")
            berth = Berth(host.run_dir, held, listener, lambda: service.world.ledger.is_adrift)
            async with trio.open_nursery() as keeping:  # over before the socket goes: that is no removal
                keeping.start_soon(berth.keep)
                console.words(await _until_over(server, service, berth, idle, console))
                keeping.cancel_scope.cancel()
        await service.close()
        nursery.cancel_scope.cancel()


async def _until_over(server: Server, service: Agent, berth: Berth, idle: float | None, console: Console) -> str:
    """Waits for the first of: a signal, STOP_AGENT, idleness. Answers which, in words."""
    import trio

    reasons: list[str] = []
    async with trio.open_nursery() as nursery:

        async def on_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
                async for number in received:
                    name = signal.Signals(number).name
                    if berth.is_adrift and not service.is_idle:
                        console.words(f"{name}: no agent after this one could find what runs, so that is ended first")
                        await _stop_at_last(service, console)
                        reasons.append(f"{name}: everything has ended")
                    else:
                        reasons.append(f"{name}: the agent ends, containers go on")
                    nursery.cancel_scope.cancel()

        async def on_stop() -> None:
            await server.stopped.wait()
            reasons.append("told to stop: everything has ended")
            nursery.cancel_scope.cancel()

        async def on_idle(seconds: float) -> None:
            while True:
                since = server.idle_since
                left = seconds if since is None else since + seconds - trio.current_time()
                if left <= 0 and service.is_idle:
                    break
                await trio.sleep(max(left, min(1.0, seconds / 10)))
            reasons.append(f"idle for {seconds:g} s: the agent ends")
            nursery.cancel_scope.cancel()

        nursery.start_soon(on_signal)
        nursery.start_soon(on_stop)
        if idle is not None:
            nursery.start_soon(on_idle, idle)
    return reasons[0]


async def _stop_at_last(service: Agent, console: Console) -> None:
    """Ends everything, however often it has to be tried: until then this agent serves, and shows what cannot be ended."""
    import trio

    said = ""
    while True:
        try:
            return await service.stop_agent()
        except MesoError as error:
            if str(error) != said:
                console.words(f"the agent goes on until all has ended: {error}")
            said = str(error)
        await trio.sleep(AGAIN_SECONDS)


def _version() -> str:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("mesocosm")
    return f"unknown (python {sys.version_info[0]}.{sys.version_info[1]})"
