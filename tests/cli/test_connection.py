"""A verb that finds no agent starts one, once, however many ask; and says why when it does not come up."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.cli import connection, paths
from mesocosm.kernel.core.errors import DeniedError

# Like the agent in all that matters here: one lock, the loser ends with `conflict`, the winner's socket comes a little later.
AGENT = """
import fcntl, os, socket, sys, time
run_dir = sys.argv[1]
lock = os.open(run_dir + "/agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(4)
open(run_dir + "/started", "a").write("x")
time.sleep(0.2)
listener = socket.socket(socket.AF_UNIX)
listener.bind(run_dir + "/agent.sock")
listener.listen(8)
time.sleep(1.5)
"""


def test_verbs_that_race_start_one_agent(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "agent_command", lambda _: [sys.executable, "-c", AGENT, str(run_dir)])
    arguments = connection.argparse.Namespace(socket=None, set=None)
    clients: list[Any] = []
    threads = [threading.Thread(target=lambda: clients.append(connection.connect(arguments))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clients) == 4
    assert (run_dir / "started").read_text() == "x"
    for client in clients:
        client.close()


def test_an_agent_that_is_about_to_end_is_waited_for_and_followed_by_another(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "agent_command", lambda _: [sys.executable, "-c", AGENT, str(run_dir)])
    lock = os.open(run_dir / "agent.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)  # it has closed its socket, and is still busy
    ending = threading.Timer(0.3, os.close, [lock])
    ending.start()

    with connection.connect(connection.argparse.Namespace(socket=None, set=None)):
        assert (run_dir / "started").read_text() == "x"
    ending.join()


def test_an_agent_that_is_killed_while_it_starts_is_followed_by_another(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = str(run_dir / "killed")
    once = f"import os\nif not os.path.exists({mark!r}):\n    open({mark!r}, 'x'); os.kill(os.getpid(), 9)\n"
    monkeypatch.setattr(connection, "agent_command", lambda _: [sys.executable, "-c", once + AGENT, str(run_dir)])

    with connection.connect(connection.argparse.Namespace(socket=None, set=None)):
        assert (run_dir / "started").read_text() == "x"
    assert (run_dir / "killed").exists()


def test_an_agent_that_fails_is_quoted(meso: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "agent.log").write_text("words of an earlier agent\n")
    program = "import sys; print('the reason', file=sys.stderr); sys.exit(5)"
    monkeypatch.setattr(connection, "agent_command", lambda _: [sys.executable, "-c", program])
    said = meso("ps", "--json")
    assert said.code == 7
    error = json.loads(said.out)["error"]
    assert error["code"] == "agent_gone"
    assert "the agent ended at once (exit 5)" in error["message"]
    assert "the reason" in error["message"]
    assert "earlier" not in error["message"]
    assert error["target"] == str(run_dir / "agent.log")


def test_no_agent_is_started_on_a_socket_that_was_named(meso: Any, run_dir: Path) -> None:
    said = meso("ps", "--socket", str(run_dir / "other.sock"))
    assert said.code == 7
    assert "no agent answers" in said.err
    assert list(run_dir.iterdir()) == []


def test_no_agent_is_started_from_inside_a_container(meso: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESOCOSM_ID", "web.a")
    assert meso("ps").code == 7
    assert list(run_dir.iterdir()) == []


def test_the_agent_is_this_interpreter_with_an_idle_exit_and_the_set() -> None:
    command = connection.agent_command(connection.argparse.Namespace(set="small"))
    assert command[0] == sys.executable
    assert command[-8:] == ["-P", "-m", "mesocosm.kernel.cli.main", "agent", "--idle-exit", "60s", "--set", "small"]


def test_directories_of_root_and_of_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "MESOCOSM_RUN_DIR",
        "MESOCOSM_STATE_DIR",
        "MESOCOSM_SOCKET",
        "XDG_STATE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_RUNTIME_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert (paths.run_dir(), paths.state_dir(), paths.socket()) == (
        "/run/mesocosm",
        "/var/lib/mesocosm",
        "/run/mesocosm/agent.sock",
    )
    assert paths.config_dirs() == ["/usr/lib/mesocosm", "/etc/mesocosm"]
    monkeypatch.setattr("os.geteuid", lambda: 54321)
    assert (paths.run_dir(), paths.state_dir()) == ("/tmp/mesocosm-54321", "/home/u/.local/state/mesocosm")
    assert paths.config_dirs()[-1] == "/home/u/.config/mesocosm"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # another user's: of no use
    assert paths.run_dir() == "/tmp/mesocosm-54321"
    monkeypatch.setenv("MESOCOSM_RUN_DIR", "rel")
    monkeypatch.chdir(tmp_path)
    assert paths.run_dir() == str(tmp_path / "rel")
    monkeypatch.setenv("MESOCOSM_SOCKET", "/s")
    assert paths.socket() == "/s"


def test_a_run_directory_that_others_could_have_made_is_refused(run_dir: Path, tmp_path: Path, meso: Any) -> None:
    run_dir.chmod(0o777)
    assert meso("ps").code == 5
    run_dir.rmdir()
    (tmp_path / "elsewhere").mkdir()
    run_dir.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeniedError):
        paths.make_run_dir()


def test_the_run_directory_is_made_private(run_dir: Path) -> None:
    run_dir.rmdir()
    assert paths.make_run_dir() == str(run_dir)
    assert run_dir.stat().st_mode & 0o077 in (0, 0o011)
