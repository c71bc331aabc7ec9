"""Who may do what: every method for every kind of peer, and how a peer is told from its process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mesocosm.kernel.linux.processes import is_exiting
from mesocosm.kernel.wire.authority import NOBODY, Access, Principal, container_in, identify, is_foreign, may
from mesocosm.kernel.wire.messages import METHODS

ACCESS = Access(agent=1000, full=frozenset({2000, NOBODY}), read=frozenset({3000, NOBODY}))
FULL, READ, NONE = {"read", "write"}, {"read"}, set[str]()
PEERS = {
    "the agent's own user": (Principal("host", 1000, 1000, 5), FULL),
    "root": (Principal("host", 0, 0, 5), FULL),
    "a user with full access": (Principal("host", 2000, 2000, 5), FULL),
    "a user who may look": (Principal("host", 3000, 3000, 5), READ),
    "another user": (Principal("host", 4000, 1000, 5), NONE),
    "a user without a mapping": (Principal("host", NOBODY, NOBODY, 5), NONE),
    "a container": (Principal("container", 4000, 0, 5, "web.db"), NONE),
    "a container with the agent's uid": (Principal("container", 1000, 1000, 5, "web.db"), NONE),
    "a container with uid 0": (Principal("container", 0, 0, 5, "web.db"), NONE),
    "an unknown peer": (Principal("unknown"), NONE),
    "an unknown peer with uid 0": (Principal("unknown", 0, 0, 5), NONE),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_a_verdict_for_every_peer(method: str, peer: str) -> None:
    principal, rights = PEERS[peer]
    verdict = may(principal, METHODS[method].right, ACCESS)
    assert (verdict is None) == (METHODS[method].right in rights)
    if verdict is not None:
        assert verdict.code == "denied"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0::/mesocosm-abc123/web/db\n", "web.db"),
        ("5:memory:/\n0::/mesocosm-abc123/web/db\n", "web.db"),
        ("5:memory:/mesocosm-abc123/web\n0::/\n", "web"),
        ("0::/user.slice/user-1000.slice/mesocosm-abc123/web/db (deleted)\n", "web.db"),
        ("0::/mesocosm-abc123/web/_inner/x\n", "web"),
        ("0::/mesocosm-abc123/web/made.by.itself/x\n", "web"),
        ("0::/mesocosm-abc123\n", None),
        ("0::/mesocosm-abc123/_agent\n", None),
        ("0::/mesocosm-fffff0/web\n", None),
        ("0::/xmesocosm-abc123/web\n", None),
        ("1:name=systemd:/a:b/mesocosm-abc123/web\n", "web"),
        ("0::/../../user.slice\n", None),
        ("", None),
    ],
)
def test_the_container_is_read_from_the_cgroup(text: str, expected: str | None) -> None:
    assert container_in(text, "abc123") == expected


def test_a_process_in_an_inner_pid_namespace_is_foreign() -> None:
    assert is_foreign("Name:\tx\nNSpid:\t700\t1\n")
    assert not is_foreign("Name:\tx\nNSpid:\t700\n")


def test_an_exiting_process_is_told_by_its_flags_whatever_its_name_is() -> None:
    assert is_exiting("7 (a) b (c) Z 1 7 7 0 -1 4194316 0 0")
    assert not is_exiting("7 (a) b (c) S 1 7 7 0 -1 4194304 0 0")


def pair(path: Path) -> tuple[socket.socket, socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(str(path))
        return ours, listener.accept()[0]


def test_this_process_is_a_host_user(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "s")
    with ours, theirs:
        found = identify(theirs, "abc123")
    assert (found.kind, found.uid, found.pid) == ("host", os.geteuid(), os.getpid())


def fake_proc(root: Path, *, cgroup: str = "0::/\n", status: str = "NSpid:\t7\n", stat: str | None = None) -> Path:
    directory = root / "proc" / str(os.getpid())
    directory.mkdir(parents=True)
    (directory / "cgroup").write_text(cgroup)
    (directory / "status").write_text(status)
    (directory / "stat").write_text(stat or "7 (x) S 1 7 7 0 -1 4194304 0 0")
    return root / "proc"


@pytest.mark.parametrize(
    ("proc", "kind", "says"),
    [
        ({}, "host", ""),
        ({"cgroup": "0::/mesocosm-abc123/web\n"}, "container", ""),
        ({"status": "NSpid:\t7\t1\n"}, "unknown", "in a container"),
        ({"stat": "7 (x) S 1 7 7 0 -1 4194308 0 0"}, "unknown", "has ended"),
        ({"stat": "garbage"}, "unknown", "cannot be looked at"),
    ],
)
def test_the_process_decides_before_the_uid(tmp_path: Path, proc: dict[str, str], kind: str, says: str) -> None:
    ours, theirs = pair(tmp_path / "s")
    with ours, theirs:
        found = identify(theirs, "abc123", proc=fake_proc(tmp_path, **proc))
    assert found.kind == kind
    assert says in found.why


def test_a_peer_that_cannot_be_looked_at_is_unknown(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "s")
    with ours, theirs:
        assert identify(theirs, "abc123", proc=tmp_path / "nothing").kind == "unknown"


def test_a_peer_that_has_exited_is_unknown_while_its_connection_lives_on(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        script = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 's')!r})"
        child = subprocess.Popen([sys.executable, "-c", script])
        theirs, _ = listener.accept()
        with theirs:
            # Not reaped yet: a zombie still has its number, and its /proc entry.
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            assert identify(theirs, "abc123").kind == "unknown"
            child.wait()
            assert identify(theirs, "abc123").kind == "unknown"


def test_what_is_not_a_unix_socket_is_unknown() -> None:
    with socket.socket(socket.AF_INET) as sock:
        assert identify(sock, "abc123").kind == "unknown"


def test_identifying_leaves_no_descriptor_open(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "s")
    with ours, theirs:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            identify(theirs, "abc123")
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.needs_root
def test_another_user_is_known_by_uid_and_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    os.chmod(tmp_path.parent, 0o755)
    os.chmod(tmp_path.parent.parent, 0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        os.chmod(tmp_path / "s", 0o666)
        listener.listen()
        script = f"import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 's')!r}); sys.stdin.read()"
        with subprocess.Popen(["/usr/bin/env", "python3", "-c", script], stdin=subprocess.PIPE, user=54321, group=54321) as child:
            theirs, _ = listener.accept()
            with theirs:
                found = identify(theirs, "abc123")
            child.communicate(b"")
    assert (found.kind, found.uid) == ("host", 54321)
    assert may(found, "read", Access(agent=0)) is not None


@pytest.mark.needs_root
def test_root_in_an_inner_pid_namespace_is_not_a_host_user(tmp_path: Path) -> None:
    script = f"import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect({str(tmp_path / 's')!r}); sys.stdin.read()"
    for prefix, kind in ([], "host"), (["unshare", "--pid", "--fork", "--kill-child"], "unknown"):  # the first is the control
        (tmp_path / "s").unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            with subprocess.Popen([*prefix, sys.executable, "-c", script], stdin=subprocess.PIPE) as child:
                theirs, _ = listener.accept()
                with theirs:
                    found = identify(theirs, "abc123")
                child.communicate(b"")
        assert (found.kind, found.uid) == (kind, 0)
