"""The names that the agent uses in its run directory, before anything is opened by them: what is there, and whose it is.

What lives here: private files, putting out of the way what cannot be ours, and one file in another's place. What must not:
what is in a file (`book`, `salvage`), and whose turn it is (`locking`).

Theory: only the run directory's owner can put anything there, so whatever is odd is an accident and not an attack; but an
agent obeys its ledger, so it obeys none that somebody else wrote or could have. What is out of the way is kept, under a
name that says when; nothing is ever overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time

from mesocosm.kernel.core.errors import MesoError, from_oserror

ASIDE = ".set-aside-"
_FILES = ("", "-wal", "-shm")  # what SQLite has beside each other


def put_aside_unless_regular(path: str) -> str | None:
    """What has the name of a file of ours and is none goes out of the way; its new name, None if all is well. OSError."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(kind) else put_aside(path)


def put_aside(path: str, suffixes: tuple[str, ...] = ("",)) -> str:
    """Renames it, and what is beside it; its new name. OSError."""
    aside = f"{path}{ASIDE}{time.time_ns()}"
    for suffix in suffixes:
        with contextlib.suppress(FileNotFoundError):
            os.rename(path + suffix, aside + suffix)
    return aside


def make_private(path: str) -> list[str]:
    """A file that only its owner can read or write, before SQLite makes one that others can: specs hold secrets, and a
    stranger's lock on it would stop the agent. The files beside it get the same mode.

    Answers, in words, what was in the way. LaunchError if the file cannot be opened for writing.
    """
    said = []
    try:
        for suffix in _FILES:
            if reason := _refused(path + suffix):
                said.append(f"{path + suffix} ({reason}) is now {put_aside(path + suffix, _FILES if not suffix else ('',))}")
        fd = _open_private(path)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
        for suffix in _FILES[1:]:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(path + suffix, 0o600, follow_symlinks=True)
    except OSError as error:
        raise cannot("opening the ledger", error, path) from error
    return said


def _open_private(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o600)
    except PermissionError:
        os.chmod(path, 0o600)  # its mode forbids it, and it is ours; if it is something else, this fails as well
        return os.open(path, flags, 0o600)


def _refused(path: str) -> str | None:
    """Why what has this name is not used; None if it is, or if there is nothing."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return f"no file, but {stat.filemode(found.st_mode)}"
    if found.st_uid != os.geteuid():
        return f"it belongs to uid {found.st_uid}, and would be obeyed"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others could write it, mode {stat.S_IMODE(found.st_mode):o}, and it would be obeyed"
    return None


def identity(path: str) -> tuple[int, int] | None:
    """Which file a name leads to; None if to none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def replace(path: str, new: str) -> str:
    """`path`, and what is beside it, goes out of the way, and the finished file `new` takes its place; where the old one is.

    May be killed at any moment: `finish_replacing` goes on. OSError.
    """
    aside = put_aside(path, _FILES)
    os.rename(new, path)
    return aside


def finish_replacing(path: str, new: str) -> None:
    """What `replace` has begun is finished; what was not ready to take the place is dropped. OSError.

    `new` is ready once the old file has gone; a log that the old one left must never be taken for the new one's.
    """
    if os.path.lexists(new):
        if not os.path.lexists(path):
            for suffix in _FILES[1:]:
                if os.path.lexists(path + suffix):
                    os.rename(path + suffix, f"{path}{ASIDE}{time.time_ns()}{suffix}")
            os.rename(new, path)
        else:
            os.unlink(new)
    for suffix in ("-journal", *_FILES[1:]):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new + suffix)


def cannot(doing: str, error: OSError, path: str) -> MesoError:
    """An error that names the file, what the machine said of it, and the way out."""
    hint = None
    if error.errno in (errno.EPERM, errno.EACCES):
        hint = f"make it writable for this user (chattr -i, chown, chmod), or move it away: {path}"
    elif error.errno == errno.EROFS:
        hint = "its file system is read-only: mount it rw, or set MESOCOSM_RUN_DIR and MESOCOSM_STATE_DIR to other directories"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = f"make room in {os.path.dirname(path)}"
    return from_oserror(error, syscall=None, target=path, doing=doing, hint=hint)
