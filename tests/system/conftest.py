"""Fixtures of the system ring: tests that run on a real kernel, this machine's or a guest's."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mesocosm.kernel.linux.probe import run_id
from mesocosm.kernel.testing.census import Census, census, left_over

if TYPE_CHECKING:
    from types import ModuleType


def load_test_bed() -> ModuleType:
    """tests/system/guest/uml.py as a module: the tests are not a package, so that they can be moved and copied freely."""
    name = "mesocosm_guest_uml"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "guest" / "uml.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def guest() -> Iterator[object]:
    """A booted User Mode Linux guest with pure cgroup v2; see guest/uml.py. Commands: ``guest.run(argv, user=1000)``.

    Scope: the session, since a boot takes seconds. A test that changes the guest puts it right again.
    """
    test_bed = load_test_bed()
    try:
        running = test_bed.Guest()
    except test_bed.NoGuestError as missing:
        pytest.skip(f"no guest: {missing}")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def guests(guest: object) -> Iterator[dict[str, object]]:
    """A guest for each kind of world, to run beside each other: one guest has one CPU."""
    other = load_test_bed().Guest()
    yield {"root": guest, "user": other}
    other.stop()


def load(name: str) -> ModuleType:
    """tests/system/NAME.py as a module."""
    full = f"mesocosm_system_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).parent / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


def load_worlds() -> ModuleType:
    """tests/system/worlds.py as a module."""
    return load("worlds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What only root can do is not asked of an ordinary user's world; what is the same for both, of the first one only."""
    dropped = [item for item in items if _is_elsewhere(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


def _is_elsewhere(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    kind = callspec.params.get("world") if callspec is not None else None
    if item.get_closest_marker("needs_root") and os.geteuid() == 0 and kind == "user":  # else `needs_root` skips it
        return True
    return item.get_closest_marker("one_world") is not None and kind in KINDS[1:]


# Both, unless the caller shares them out among several machines (test_in_the_guest.py).
KINDS = tuple(os.environ.get("MESOCOSM_TEST_WORLDS", "root user").split()) if os.geteuid() == 0 else ("user",)


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An agent's world, as root and as an ordinary user; see worlds.py."""
    with load_worlds().open_world(request.param) as opened:
        yield opened


@pytest.fixture
def another_world(world: Any) -> Iterator[Any]:
    """A second one of the same kind for one test, without an agent yet: another directory, and another user if that is no root."""
    with load_worlds().open_world("root" if world.uid == 0 else "user") as opened:
        yield opened


class Pulse:
    """What a canary connection saw while it was open; see pulse.py."""

    asked = 0
    p99_ms = max_ms = 0.0


@pytest.fixture
def pulse(world: Any) -> Any:
    """``with pulse() as seen: …``: a connection that asks the agent for a sign of life all the while; figures come at its end."""

    @contextmanager
    def beating() -> Iterator[Pulse]:
        command = world.as_user(world.python, "-B", str(Path(__file__).with_name("pulse.py")), str(world.run_dir / "agent.sock"))
        child = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(world.environment), cwd="/"
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            seen = Pulse()
            yield seen
            out, _ = child.communicate("stop\n", timeout=90)
            vars(seen).update(json.loads(out))
        finally:
            child.kill()
            child.communicate()

    return beating


@pytest.fixture
def marks(world: Any) -> Path:
    """A directory for programs to leave marks in: everybody may write to it."""
    directory = Path(world.directory) / "marks"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o777)
    return directory


@pytest.fixture
def every_fault(world: Any, marks: Path) -> Callable[..., list[dict[str, Any]]]:
    """``every_fault(kinds, pod[, nested tasks])``: what came of each fault; see every_fault.py."""

    def run(kinds: str, *documents: Any) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("every_fault.py")
        words = [kinds, str(marks), *(json.dumps(document) for document in documents)]
        command = world.as_user(world.python, "-B", str(script), *words)
        environment = dict(world.environment)
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


class Canary:
    """A pod that beats all through a test: whatever happens to others, it must not notice."""

    def __init__(self, world: Any) -> None:
        self.world = world
        pod = {"name": "canary", "tasks": [{"name": "bird", "command": "while :; do echo beat; sleep 0.05; done"}]}
        assert world.run(pod, "-d").code == 0
        lines = world.ps()
        self.ids = set(lines)  # with the dead of earlier tests
        self.pids = {name: line["pid"] for name, line in lines.items() if name.partition(".")[0] == "canary"}

    def census(self, *, agent: bool = True) -> Census:
        """A census of the machine with the agent's and the launcher's open files, once nothing moves any more.

        Without `agent`, for tests in which it is replaced: neither it nor what only it holds counts.
        """
        serving, launcher = self.world.agent_pid(), self.world.launcher_pid()
        # The bird forks for every beat; it does not count, with all that is below it.
        ignored = [self.pids["canary.bird"], *([] if agent else [serving])]
        deadline = time.monotonic() + 10
        # Somebody else's containers may come and go on this machine; what they are in says whose they are.
        mine = run_id(str(self.world.run_dir))
        keys = "APART" not in os.environ  # set by tests/apart: there are others, whose keys cannot be told from ours
        taken = census(pids=[serving, launcher] if agent else [launcher], ignore=ignored, run_id=mine, keys=keys)
        same = 1
        while same < 3:  # the kernel and the agent may still be busy with what ended before the test, or wait for a processor
            time.sleep(0.05)
            again = taken.again()
            difference = taken.difference(again)
            assert not difference or time.monotonic() < deadline, difference
            taken, same = again, 1 if difference else same + 1
        return taken

    def assert_untouched(self) -> None:
        """The same processes, still beating."""
        assert {name: line["pid"] for name, line in self.world.ps().items() if name in self.pids} == self.pids
        before = self._beats()
        deadline = time.monotonic() + 30
        while self._beats() <= before:
            assert time.monotonic() < deadline, "the canary has stopped"
            time.sleep(0.02)

    def _beats(self) -> int:
        return (self.world.run_dir / "containers/canary.bird/stdout").stat().st_size


@pytest.fixture(scope="module")
def canary(world: Any) -> Iterator[Canary]:
    """The world with a beating canary in it, the same one for all tests of a module."""
    alive = Canary(world)
    yield alive
    world.meso("kill", "-s", "KILL", "canary")
    world.meso("wait", "canary")
    world.meso("rm", "canary")


@pytest.fixture
def attacks(canary: Canary) -> Iterator[Any]:
    """Hostile containers beside the canary, and what must be as it was after them; see attacks.py."""
    module = load("attacks")
    if not os.path.exists(module.PYTHON):
        pytest.skip(f"this machine cannot run the attacks: no {module.PYTHON}")
    with module.attacking(canary) as opened:
        yield opened


@pytest.fixture
def garden(canary: Canary, tmp_path: Path) -> Iterator[Any]:
    """A place to plant strangers in, cleared whatever happens; see garden.py."""
    made = load("garden").Garden(canary.world, tmp_path)
    try:
        yield made
    finally:
        made.clear()


@pytest.fixture
def kill_agent() -> Callable[[Any], None]:
    """``kill_agent(world)``: with -9, and it is gone when this returns."""

    def kill(world: Any) -> None:
        pid = world.agent_pid()
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 30)[0]
        os.close(pidfd)

    return kill


class Dial:
    """Connects to the agent of a world; see peer.py for what comes of it."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self._peers = load("peer")
        self.framed = self._peers.frame  # a message's bytes

    def __call__(self) -> Any:
        """As the world's user."""
        mine = os.geteuid()
        os.seteuid(self._world.uid)  # who a peer is, is who it was when it connected
        try:
            return self.as_somebody()
        finally:
            os.seteuid(mine)

    def as_somebody(self) -> Any:
        """As whoever this process is now."""
        return self._peers.Peer(self._world.run_dir / "agent.sock")

    def adopt(self, fd: int) -> Any:
        """Over a connection that somebody else made."""
        return self._peers.Peer(socket.socket(fileno=fd))


@pytest.fixture
def dial(world: Any) -> Dial:
    """``with dial() as peer``: a connection to the agent that may say whatever it likes."""
    return Dial(world)


class Siege:
    """What an attack may cost, unless the test says otherwise. Before its end nothing is known of `seen`."""

    memory = 16 * 1024  # KiB that the agent may grow by at most while it lasts: a few frames, their answers, the allocator's slack
    answer_ms = 5000.0  # that the canary connection may wait at worst: tenfold what a busy machine takes
    seen: Pulse

    def __init__(self, **numbers: object) -> None:
        self.numbers = numbers  # that the figures are about


@pytest.fixture
def siege(canary: Canary, pulse: Any, figure: Any) -> Any:
    """``with siege() as allowed``: around an attack on the socket, everything that must hold, whatever the attack is.

    The agent answers a canary connection all the while, and no more slowly than it may; its memory has grown no more than
    it may at the worst moment; afterwards its open files, and all else a census sees, are as before, and the canary pod beats.
    """

    @contextmanager
    def around(**numbers: object) -> Iterator[Siege]:
        agent = canary.world.agent_pid()
        before = canary.census()
        allowed = Siege(**numbers)
        with pulse() as allowed.seen:
            memory = peak_memory(agent)
            yield allowed
        grown = memory() if canary.world.agent_pid() == agent else None
        figure(user=canary.world.user, grown_kib=grown, **vars(allowed.seen), **allowed.numbers)
        assert grown is not None, "the agent is another one"
        assert grown <= allowed.memory
        assert allowed.seen.max_ms <= allowed.answer_ms
        assert left_over(before) == []
        canary.assert_untouched()

    return around


def peak_memory(pid: int) -> Any:
    """From now on: a function that answers by how many KiB the process has grown at its largest (proc_pid_clear_refs(5))."""

    def status(field: str) -> int:
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.partition(f"\n{field}:")[2].split()[0])

    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the largest it has been is what it is now
    base = status("VmRSS")
    return lambda: max(0, status("VmHWM") - base)
