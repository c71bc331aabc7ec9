"""The socket in the file system: made safely, and accepting whatever happens.

Theory: whoever can swap the directory of a socket, or a component of it, decides who answers on it. So the directory
is opened once, without following a link, and must be ours alone to write; all else happens relative to that fd. The
socket is bound under a temporary name, given its owner and mode, and only then renamed to where clients look: nobody can
connect in between, and what a dead agent left is replaced in the same step. It is never an abstract socket:
these have no permissions and are seen from every container that shares the host's network.

Binding through ``/proc/self/fd/N`` also lifts the 107-byte limit of a socket's path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from mesocosm.kernel.core.errors import ConflictError, DeniedError, from_oserror

BACKLOG = 128
_RESERVED = 4  # connections that are served with no descriptor left
_FOR_ONE = 3  # descriptors: its own, and two to see who it is
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# What accept(2) reports of a connection that failed before it was accepted: the next one is another matter.
_PASSING = (errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR)


class Place(Enum):
    """What has become of a listener's name in the file system."""

    NAMED = "there"
    NAMELESS = "the directory is there, and the name is gone or another's"
    NOWHERE = "the directory is gone"
    REPLACED = "there is another directory of that name"


class Listener:
    """A listening socket, and how to take it away again. `bind` makes it."""

    def __init__(self, sock: socket.socket, path: Path, directory: int) -> None:
        self.sock = sock
        self.path = path
        self._directory = directory
        self._identity = _identity(directory, path.name)
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._reserve: list[int] = []
        self.replenish()

    def accept(self) -> socket.socket | None:
        """The next connection, non-blocking; None if that one came to nothing. BlockingIOError if there is none.

        With no file descriptor left some are taken from a reserve: whoever comes to end what uses them up must be heard. Once
        that is gone, too, the connection is accepted with a spare one and closed, so its client learns of it instead of
        waiting, and OSError (EMFILE…) is raised: the caller pauses.
        """
        try:
            peer, _ = self.sock.accept()
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _PASSING:
                return None
            if error.errno not in _EXHAUSTED:
                raise
            try:
                self._give_way()
                peer, _ = self.sock.accept()
            except BlockingIOError:
                raise
            except OSError:
                self._turn_away()
                raise error from None
        peer.settimeout(0)
        return peer

    def make_way(self) -> bool:
        """Gives some of the reserve if no descriptor is left; whether it did, so that what failed may be tried again."""
        try:
            os.close(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return error.errno in _EXHAUSTED and self._give_way()
        return False

    def _give_way(self) -> bool:
        given = [self._reserve.pop() for _ in range(min(_FOR_ONE, len(self._reserve)))]
        for fd in given:
            os.close(fd)
        return bool(given)

    def replenish(self) -> None:
        """Takes back what the reserve has given: when a connection has ended."""
        with contextlib.suppress(OSError):
            while len(self._reserve) < _RESERVED * _FOR_ONE:
                self._reserve.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    def _turn_away(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        with contextlib.suppress(OSError):
            self.sock.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def place(self) -> Place:
        """What has become of the socket's name."""
        try:
            if _identity(None, str(self.path)) == self._identity:
                return Place.NAMED
        except OSError:
            pass
        try:
            status, mine = os.stat(self.path.parent, follow_symlinks=False), os.fstat(self._directory)
            is_mine = (status.st_dev, status.st_ino) == (mine.st_dev, mine.st_ino)
        except OSError:
            return Place.NOWHERE
        return Place.NAMELESS if is_mine else Place.REPLACED

    def take_over(self, other: Listener) -> None:
        """Listens where `other`, which is bound already, does, and no more where it did. Whoever waits for `sock` is woken."""
        trio.lowlevel.notify_closing(self.sock)
        self.sock.close()
        for fd in (self._directory, other._spare, *other._reserve):  # it has a spare one and a reserve already
            if fd >= 0:
                os.close(fd)
        self.sock, self.path, self._directory, self._identity = other.sock, other.path, other._directory, other._identity

    def close(self) -> None:
        """Stops listening; removes the socket's name if it is still this socket's."""
        with contextlib.suppress(OSError):
            if _identity(self._directory, self.path.name) == self._identity:
                os.unlink(self.path.name, dir_fd=self._directory)
        self.sock.close()
        for fd in (self._directory, self._spare, *self._reserve):
            if fd >= 0:
                os.close(fd)
        self._reserve.clear()
        self._directory = self._spare = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def bind(path: Path, *, group: int | None = None, mode: int = 0o660) -> Listener:
    """Listens on `path`, whose directory must exist. `group` is the gid that may connect besides the owner.

    DeniedError when the directory is not safe, ConflictError when something else has the name or an agent answers there.
    """
    directory = _open_directory(path.parent)
    try:
        _check_free(path, directory)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        temporary = f".{path.name}.{os.getpid()}"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
            sock.bind(f"/proc/self/fd/{directory}/{temporary}")
            if group is not None:
                os.chown(temporary, -1, group, dir_fd=directory, follow_symlinks=False)
            os.chmod(f"/proc/self/fd/{directory}/{temporary}", mode)
            sock.listen(BACKLOG)
            os.rename(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            return Listener(sock, path, directory)
        except OSError as error:
            sock.close()
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise from_oserror(error, syscall="bind", target=str(path)) from None
    except BaseException:
        os.close(directory)
        raise


def _open_directory(directory: Path) -> int:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise DeniedError("the socket's directory is a link, or no directory", target=str(directory)) from None
        raise from_oserror(error, syscall="open", target=str(directory)) from None
    found = os.fstat(fd)
    problem = None
    if found.st_uid not in (0, os.geteuid()):
        problem = f"it belongs to uid {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"others may write it (mode {stat.S_IMODE(found.st_mode):o})"
    if problem:
        os.close(fd)
        raise DeniedError(
            f"the socket's directory is not safe: {problem}",
            target=str(directory),
            hint="whoever can write it can answer in the agent's place; make it this user's own, mode 0700 to 0755",
        )
    return fd


def _check_free(path: Path, directory: int) -> None:
    try:
        found = os.stat(path.name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConflictError("something that is not a socket has the socket's name", target=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(f"/proc/self/fd/{directory}/{path.name}")
        except (ConnectionRefusedError, FileNotFoundError):
            return  # nobody listens: its agent is dead
        except BlockingIOError:
            pass  # its queue is full, so there is somebody
        except OSError as error:
            raise from_oserror(error, syscall="connect", target=str(path)) from None
    raise ConflictError("an agent answers on this socket already", target=str(path), hint="meso agent --stop ends it")


def _identity(directory: int | None, name: str) -> tuple[int, int]:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    return found.st_dev, found.st_ino
