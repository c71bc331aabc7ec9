"""Who has a run directory and a state directory: one agent at a time.

Theory: a lock belongs to an open file, never to a number in it, so it cannot be stale. It is the directory itself that is
locked: its file cannot be removed or replaced while somebody works in it, and it is the same one by whatever path or bind
mount it is reached. The file `agent.lock`, which earlier versions lock, is locked besides, so that neither of two versions
overlooks the other. Descriptors are closed on exec: no launcher and no container inherits them, and the lock is gone with
the agent, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from mesocosm.kernel.core.errors import ConflictError
from mesocosm.kernel.runtime.premises import cannot, put_aside_unless_regular

LOCK = "agent.lock"
_LONGEST = 8192  # bytes: PATH_MAX and a number


class Lock:
    """A directory that nobody else's agent uses as long as this is open. Made by `lock`."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def take(self, fd: int, directory: str, variable: str) -> None:
        """One more open file to be locked; ConflictError if somebody else has. The descriptor is this object's in any case."""
        self._fds.append(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = f"use its socket, or {variable} for another agent"
            raise ConflictError("another agent is using this directory", target=directory, hint=hint) from None

    def note(self, words: bytes) -> None:
        """Leaves a word in the file, for those who find it locked; none in one that cannot be written to, as `lock` allows."""
        with suppress(OSError):
            os.ftruncate(self._fds[-1], 0)
            os.pwrite(self._fds[-1], words, 0)

    def close(self) -> None:
        """Lets others in."""
        while self._fds:
            os.close(self._fds.pop())


def lock(directory: str, variable: str = "MESOCOSM_RUN_DIR") -> Lock:
    """Keeps a second agent out of `directory`; ConflictError if one is there, LaunchError if it cannot be locked.

    `variable` is what names another such directory.
    """
    held = Lock()
    try:
        held.take(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), directory, variable)
        path = os.path.join(directory, LOCK)
        put_aside_unless_regular(path)
        held.take(_open(path), directory, variable)
    except OSError as error:
        held.close()
        raise cannot("locking the directory", error, directory) from error
    except BaseException:
        held.close()
        raise
    return held


def sign(state: Lock, run_dir: str) -> None:
    """Leaves word in a state directory whose agent it has: which process, and where its socket is."""
    state.note(f"{os.getpid()} {run_dir}\n".encode(errors="surrogateescape"))


def in_use(state_dir: str, run_dir: str) -> ConflictError | None:
    """Who has a state directory, if that is a living agent with another run directory: where to find it, and what to do."""
    try:
        with open(os.path.join(state_dir, LOCK), encoding="utf-8", errors="surrogateescape") as file:
            pid, _, place = file.read(_LONGEST).rstrip("\n").partition(" ")
        if not place or place == run_dir or not os.path.exists(f"/proc/{int(pid)}"):
            return None
    except (OSError, ValueError):
        return None
    return ConflictError(
        "another agent is using this directory",
        target=state_dir,
        have=f"process {pid}, whose run directory is {place}",
        need="a state directory for each run directory",
        hint=f"set MESOCOSM_STATE_DIR as well as MESOCOSM_RUN_DIR; or use that agent: MESOCOSM_RUN_DIR={place}",
    )


def _open(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)  # it cannot be written to, and need not be
