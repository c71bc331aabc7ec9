"""The socket in the file system: made safely, taken away again."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from mesocosm.kernel.core.errors import ConflictError, DeniedError, LaunchError
from mesocosm.kernel.wire.listening import bind


@pytest.fixture(name="directory")
def safe_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    return directory


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True


def test_the_socket_is_a_path_with_its_mode_and_nothing_is_left_of_it_afterwards(directory: Path) -> None:
    path = directory / "agent.sock"
    with bind(path):
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o660
        assert os.listdir(directory) == ["agent.sock"]
        assert connects(path)
        lines = Path("/proc/net/unix").read_text().splitlines()
        assert not [line for line in lines if "@" in line and str(directory) in line]
    assert os.listdir(directory) == []


def test_a_socket_that_a_dead_agent_left_is_replaced(directory: Path) -> None:
    path = directory / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert not connects(path)
    with bind(path):
        assert connects(path)


def test_a_living_agent_is_not_replaced(directory: Path) -> None:
    path = directory / "agent.sock"
    with bind(path):
        with pytest.raises(ConflictError):
            bind(path)
        assert connects(path)


def test_what_is_not_a_socket_is_not_replaced(directory: Path) -> None:
    path = directory / "agent.sock"
    path.write_text("precious")
    with pytest.raises(ConflictError):
        bind(path)
    assert path.read_text() == "precious"


def test_a_link_with_the_sockets_name_is_not_followed(directory: Path) -> None:
    (directory / "agent.sock").symlink_to("/etc/passwd")
    with pytest.raises(ConflictError):
        bind(directory / "agent.sock")


def test_a_directory_that_is_a_link_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(DeniedError):
        bind(tmp_path / "link" / "agent.sock")
    assert os.listdir(directory) == []


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_a_directory_that_others_may_write_is_refused(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    with pytest.raises(DeniedError):
        bind(directory / "agent.sock")


@pytest.mark.needs_root
def test_a_directory_of_somebody_else_is_refused(directory: Path) -> None:
    os.chown(directory, 54321, -1)
    with pytest.raises(DeniedError):
        bind(directory / "agent.sock")


@pytest.mark.needs_root
def test_a_group_may_be_let_in(directory: Path) -> None:
    with bind(directory / "agent.sock", group=54321) as listener:
        assert listener.path.stat().st_gid == 54321


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        bind(tmp_path / "nowhere" / "agent.sock")
    assert caught.value.fields["errno"] == "ENOENT"


def test_a_path_longer_than_an_address_is_no_problem(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(4):
        deep = deep / ("d" * 50)
    deep.mkdir(parents=True)
    with bind(deep / "agent.sock"):
        assert (deep / "agent.sock").exists()


def test_closing_leaves_alone_what_another_agent_put_there_meanwhile(directory: Path) -> None:
    path = directory / "agent.sock"
    listener = bind(path)
    path.unlink()
    path.write_text("another's")
    listener.close()
    assert path.read_text() == "another's"


def test_a_refused_bind_leaves_no_descriptor_open(directory: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (directory / "agent.sock").write_text("")
    for _ in range(5):
        with pytest.raises(ConflictError):
            bind(directory / "agent.sock")
    assert len(os.listdir("/proc/self/fd")) == before


async def test_whoever_listens_elsewhere_has_no_more_descriptors_open_than_before(directory: Path) -> None:
    with bind(directory / "agent.sock") as listener:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            listener.path.unlink()
            listener.take_over(bind(directory / "agent.sock"))
        assert len(os.listdir("/proc/self/fd")) == before
        assert connects(listener.path)


def test_without_descriptors_some_are_served_from_a_reserve_others_turned_away_and_served_later(directory: Path) -> None:
    with (
        contextlib.ExitStack() as stack,
        bind(directory / "agent.sock") as listener,
        socket.socket(socket.AF_UNIX) as turned_away,
        socket.socket(socket.AF_UNIX) as later,
    ):
        for _ in range(4):
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(listener.path))
        turned_away.connect(str(listener.path))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(fd) for fd in os.listdir("/proc/self/fd")), hard))
        held = []
        try:
            with pytest.raises(OSError) as caught:  # noqa: PT012 - fills what is free, then asks
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            assert caught.value.errno == errno.EMFILE
            for _ in range(4):
                peer = listener.accept()
                assert peer is not None
                stack.enter_context(peer)
                held += [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]  # what finding out who it is takes
            with pytest.raises(OSError) as caught:
                listener.accept()
            assert caught.value.errno == errno.EMFILE
        finally:
            for fd in held:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        turned_away.settimeout(5)
        assert turned_away.recv(1) == b""
        listener.replenish()
        later.connect(str(listener.path))
        accepted = listener.accept()
        assert accepted is not None
        accepted.close()
