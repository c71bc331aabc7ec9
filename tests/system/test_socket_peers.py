"""Who a peer is: other users, containers that were given the socket, connections that change hands, processes that are gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.wire.messages import METHODS

pytestmark = pytest.mark.system
STRANGER = Path(__file__).with_name("stranger.py")
OTHER = 54321  # nobody's uid
DENIED = ["denied", "denied"]
SERVED = ["ok", "bad_input"]  # the launch has no pod in it


@pytest.fixture
def python() -> str:
    """An interpreter that everybody may start, containers too."""
    found = shutil.which("python3", path="/usr/bin:/bin")
    if found is None:
        pytest.skip("this machine cannot start a Python in a container: none in /usr/bin")
    return found


@pytest.fixture
def can_change_users() -> None:
    """Only root can be somebody else."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture
def opened(world: Any) -> Iterator[None]:
    """The world weakened: file modes keep nobody from connecting any more."""
    places = [world.directory, world.run_dir, world.run_dir / "agent.sock"]
    modes = [path.stat().st_mode & 0o7777 for path in places]
    for path, mode in zip(places, (0o755, 0o755, 0o666), strict=True):
        path.chmod(mode)
    yield
    for path, mode in zip(places, modes, strict=True):
        path.chmod(mode)


class Stranger(subprocess.Popen[str]):
    """stranger.py with these words. It says what it was answered; `says` reads to its end."""

    def __init__(self, world: Any, python: str, *words: object, uid: int | None = None, **more: Any) -> None:
        become = [] if uid in (None, os.geteuid()) else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        script = STRANGER.read_text()  # handed over as text: the repository may be where others cannot read
        command = [*become, python, "-c", script, str(world.run_dir / "agent.sock"), *map(str, words)]
        super().__init__(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", **more)
        world.children.append(self)  # whatever becomes of the test, it ends with the world

    def wait_for_ready(self) -> None:
        """Until it stands at its ``stop``."""
        assert self.stdout is not None
        assert self.stdout.readline() == "ready\n"

    def says(self) -> list[str]:
        """Goes on, to the end."""
        out, _ = self.communicate("\n", timeout=60)
        return out.split("\n")[:-1]


def log_of(world: Any) -> str:
    return (world.run_dir / "agent.log").read_text()


@contextlib.contextmanager
def asleep(pid: int) -> Iterator[None]:
    """The process does nothing for the length of the block, not even accept."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.usefixtures("can_change_users")
def test_file_modes_keep_other_users_from_connecting_at_all(siege: Any, world: Any, python: str) -> None:
    with siege():
        assert Stranger(world, python, "connect", "ask", uid=OTHER).says() == ["errno 13"]
        assert Stranger(world, python, "connect", "ask", uid=world.uid).says() == SERVED


@pytest.mark.usefixtures("can_change_users", "opened")
def test_another_user_who_can_connect_is_denied_and_logged_once_by_uid_and_pid(siege: Any, world: Any, python: str) -> None:
    with siege():
        before = log_of(world)
        stranger = Stranger(world, python, "connect", "ask", "ask", uid=OTHER)
        assert stranger.says() == DENIED * 2
        (line,) = log_of(world).removeprefix(before).splitlines()
        seen = OTHER if world.uid == 0 else 65534  # in an ordinary user's namespace everybody else is nobody
        assert line == f"denied: PING to host peer with uid {seen}, pid {stranger.pid}"


@pytest.mark.usefixtures("can_change_users", "opened")
def test_no_method_is_open_to_another_user(siege: Any, world: Any, dial: Any) -> None:
    with siege(methods=len(METHODS)):
        os.seteuid(OTHER)
        try:
            peer = dial.as_somebody()
        finally:
            os.seteuid(0)
        with peer:
            for number, method in enumerate([*METHODS, "NO_SUCH_METHOD"]):
                assert peer.ask(method, number, container_id="canary", group={}, tasks=[])[2]["code"] == "denied", method


@pytest.mark.usefixtures("can_change_users")
def test_root_is_nobody_to_an_ordinary_users_agent_whose_namespace_does_not_know_it(siege: Any, world: Any, dial: Any) -> None:
    with siege(), dial.as_somebody() as peer:
        assert (peer.ask("PING")[2] is None) == (world.uid == 0)


@pytest.fixture
def inside(world: Any, python: str) -> Any:
    """``inside(script)``: what a script prints in a container that was given the run directory by a host volume."""

    def run(script: str) -> str:
        task = {
            "name": "t",
            "command": [python, "-c", script, "/given/agent.sock", "connect", "ask"],
            "volumes": [{"source": f"host:{world.run_dir}", "target": "/given"}],
        }
        assert world.run({"name": "inside", "tasks": [task]}).code == 0
        said: str = world.meso("logs", "inside.t").out
        world.meso("rm", "inside")
        return said

    return run


def test_a_container_that_was_given_the_socket_is_that_container_and_may_do_nothing(siege: Any, world: Any, inside: Any) -> None:
    """An ordinary user's container has that user's id: file modes let it connect. Root's have ids of their own."""
    with siege() as allowed:
        allowed.memory = 24 * 1024
        said = inside(STRANGER.read_text())
        assert said.split("\n")[:-1] == (["errno 13"] if world.uid == 0 else DENIED)


@pytest.mark.usefixtures("opened")
def test_a_container_that_can_connect_is_denied_whatever_its_uid_and_logged_by_its_name(
    siege: Any, world: Any, inside: Any
) -> None:
    with siege() as allowed:
        allowed.memory = 24 * 1024
        before = log_of(world)
        assert inside(STRANGER.read_text()).split("\n")[:-1] == DENIED
        line = next(line for line in log_of(world).removeprefix(before).splitlines() if line.startswith("denied"))
        assert "container inside.t" in line or "in a container" in line, line


HOG = """
import socket, sys, time
held = []
for _ in range(600):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(sys.argv[1])
print("held", flush=True)
time.sleep(1000)
"""


@pytest.mark.usefixtures("opened")
def test_a_container_that_holds_all_the_connections_it_can_get_keeps_nobody_out(
    siege: Any, world: Any, dial: Any, python: str
) -> None:
    task = {
        "name": "t",
        "command": [python, "-c", HOG, "/given/agent.sock"],
        "volumes": [{"source": f"host:{world.run_dir}", "target": "/given"}],
        "limits": {"nofile": 1024},
    }
    with siege(connections=600) as allowed, dial() as old:
        allowed.memory = 24 * 1024
        assert old.ask("LAUNCH_GROUP", group={"name": "hog", "tasks": [task]})[2] is None
        deadline = time.monotonic() + 60
        while not (world.run_dir / "containers/hog.t/stdout").stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with contextlib.ExitStack() as stack:
            for number in range(40):
                assert stack.enter_context(dial()).ask("PING", number) == [1, number, None, {}]
        old.ask("KILL_CONTAINER", 2, container_id="hog", signal="KILL")
        old.ask("WAIT_CONTAINER", 3, container_id="hog")
        assert old.ask("REMOVE_CONTAINER", 4, container_id="hog")[2] is None


@pytest.mark.usefixtures("can_change_users", "opened")
@pytest.mark.parametrize("entitled", [True, False])
def test_a_connection_that_changes_hands_keeps_the_rights_of_who_connected(
    siege: Any, world: Any, python: str, *, entitled: bool
) -> None:
    first, then = (world.uid, OTHER) if entitled else (OTHER, world.uid)
    with siege():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            giver = Stranger(world, python, "connect", "ask", "stop", "pass", ours.fileno(), uid=first, pass_fds=[ours.fileno()])
            taker = Stranger(world, python, "take", theirs.fileno(), "ask", uid=then, pass_fds=[theirs.fileno()])
            given, taken = giver.says(), taker.says()
        assert given == [*(SERVED if entitled else DENIED), "ready"]
        assert taken == (SERVED if entitled else DENIED)


@pytest.mark.needs_root
@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("later", [False, True], ids=["taken at once", "taken after it has changed"])
def test_who_becomes_somebody_else_after_connecting_is_who_it_was(siege: Any, world: Any, python: str, *, later: bool) -> None:
    with siege() as allowed:
        allowed.answer_ms = 30_000.0  # it sleeps for a while
        with asleep(world.agent_pid()) if later else contextlib.nullcontext():
            stranger = Stranger(world, python, "connect", *([] if later else ["ask"]), "uid", OTHER, "stop", "ask", uid=world.uid)
            stranger.wait_for_ready() if later else None
        said = stranger.says()
        assert said[-2:] == SERVED


@pytest.mark.usefixtures("can_change_users", "opened")
def test_a_setuid_program_that_speaks_for_somebody_without_rights_has_none(
    siege: Any, world: Any, python: str, tmp_path: Path
) -> None:
    """It runs as the agent's own user, and the agent looks at the connection only then; the connection is still the other's."""
    for directory in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        directory.chmod(0o755)
    program, request = tmp_path / "cat", tmp_path / "request"
    shutil.copy("/bin/cat", program)
    os.chown(program, world.uid, world.gid)
    program.chmod(0o4755)
    request.write_bytes(bytes.fromhex("0000000a940001a450494e479180"))
    become = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups"]
    status = subprocess.run([*become, program, "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    if f"Uid:\t{OTHER}\t{world.uid}\t" not in status:
        pytest.skip(f"this machine cannot run set-user-id programs in {tmp_path}")
    with siege() as allowed:
        allowed.answer_ms = 30_000.0
        with asleep(world.agent_pid()):
            stranger = Stranger(world, python, "connect", "run", program, request, "stop", "read", uid=OTHER)
            stranger.wait_for_ready()
        assert stranger.says() == ["denied"]


def test_a_peer_that_is_gone_before_the_agent_looks_is_nobody(siege: Any, world: Any, python: str, dial: Any) -> None:
    """Its connection lives on in somebody else's hands, who must not be taken for it, nor whoever gets its number."""
    with siege() as allowed:
        allowed.answer_ms = 30_000.0
        ours, theirs = socket.socketpair()
        with ours, theirs, asleep(world.agent_pid()):
            giver = Stranger(world, python, "connect", "pass", theirs.fileno(), uid=world.uid, pass_fds=[theirs.fileno()])
            assert giver.wait(60) == 0
            _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        giver.communicate()
        with dial.adopt(fd) as peer:
            error = peer.refused("PING")
            assert error["code"] == "denied"
            assert "ended" in error["message"] or "looked at" in error["message"] or "pidfd" in error["message"]


def test_neither_agent_nor_launcher_listens_where_file_modes_do_not_count(siege: Any, world: Any) -> None:
    with siege():
        for pid in (world.agent_pid(), world.launcher_pid()):
            held = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
            lines = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
            named = {fields[7] for fields in lines if len(fields) > 7 and f"socket:[{fields[6]}]" in held}
            assert named, "nothing of it is seen here"
            assert [name for name in named if name.startswith("@")] == []


@pytest.mark.parametrize("trap", ["a link", "open to all"])
def test_an_agent_does_not_bind_where_somebody_else_could_answer_for_it(siege: Any, world: Any, trap: str) -> None:
    with siege():
        run_dir = world.directory / "elsewhere"
        target = world.directory / "target"
        target.mkdir()
        os.chown(target, world.uid, world.gid)
        if trap == "a link":
            run_dir.symlink_to(target)
        else:
            target.rename(run_dir)
            run_dir.chmod(0o777)
        environment = dict(world.environment) | {"MESOCOSM_RUN_DIR": str(run_dir)}
        try:
            command = world.as_user(*world.command("agent", "--idle-exit", "1s"))
            run = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60, check=False)
            assert run.returncode == 5, run
            assert str(run_dir) in run.stderr
            assert [path for path in (run_dir, target) if (path / "agent.sock").exists()] == []
        finally:
            (run_dir.unlink if run_dir.is_symlink() else lambda: shutil.rmtree(run_dir))()
            shutil.rmtree(target, ignore_errors=True)
