"""The closed vocabulary of undoing: seven verbs, each with an absolute path as its target.

What lives here: one *attempt* per verb. An attempt answers GONE (or was never there), PROGRESS (more to do, go on),
BUSY (somebody is still leaving, try again shortly) or raises OSError (this will not go away by waiting a moment).
`runtime.undoing` turns attempts into an outcome, with patience and a limit.

Theory: verbs are idempotent, need nothing but their target, never follow a link that a container may have planted
and never cross into a mounted file system. So they may be run at any time, by any agent, twice.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from mesocosm.kernel.linux.constants import RESOLVE_NO_SYMLINKS, RESOLVE_NO_XDEV
from mesocosm.kernel.linux.paths import openat2

_PIECE = 256  # directory entries removed in one attempt: the agent's thread belongs to others, too
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


class Attempt(Enum):
    """What one attempt came to."""

    GONE = "gone"
    PROGRESS = "progress"
    BUSY = "busy"


def rmdir(target: str) -> Attempt:
    """An empty directory of ours."""
    try:
        os.rmdir(target)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
    return Attempt.GONE


def unlink(target: str) -> Attempt:
    """A file, socket or link."""
    try:
        os.unlink(target)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
    return Attempt.GONE


def umount(target: str) -> Attempt:
    """Everything mounted at a path; lazily, so that nobody inside can hold it up."""
    from mesocosm.kernel.linux import mounts

    try:
        mounts.umount(target)
    except OSError as error:
        if error.errno not in (*_ABSENT, errno.EINVAL):  # EINVAL: not a mount point (any more)
            raise
        return Attempt.GONE
    return Attempt.PROGRESS  # mounts stack: look for one below


def close(_target: str) -> Attempt:
    """A descriptor: closed by the agent that had it, or by its death."""
    return Attempt.GONE


def remove_tree(target: str) -> Attempt:
    """A directory with all that is in it, written by whomever. Through descriptors: no link is followed, no mount entered."""
    try:
        parent = os.open(os.path.dirname(target), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT:
            return Attempt.GONE
        raise
    try:
        left = _Budget(_PIECE)
        if _remove(parent, os.path.basename(target), left, None, 0, is_directory=False):
            return Attempt.GONE
        return Attempt.BUSY if left.count > 0 and not left.moved else Attempt.PROGRESS
    finally:
        os.close(parent)


class _Budget:
    """How many entries may still be removed in this attempt."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.moved = False  # a deep directory was put at the top, where the next attempt finds it


# A directory that was to be unlinked (EPERM on some file systems); one that is not empty, has a mount on it, is none (any more).
_OTHERWISE = frozenset({errno.EISDIR, errno.EPERM, errno.ENOTEMPTY, errno.EBUSY, errno.ENOTDIR})
_DEEPEST = 32  # levels gone down into at once: each holds a descriptor, and a container can nest without end


def _remove(parent: int, name: str, left: _Budget, top: int | None, depth: int, *, is_directory: bool) -> bool:
    """Removes one entry of the directory `parent`; False when the budget is used up, or somebody is still writing.

    What lies deeper than _DEEPEST is moved up into `top`, the first directory, and taken from there. `is_directory` is
    only which system call to try first: whoever writes here may have changed it meanwhile.
    """
    try:
        (os.rmdir if is_directory else os.unlink)(name, dir_fd=parent)
        left.count -= 1
        return True
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in _OTHERWISE:
            raise
    try:
        fd = openat2(parent, name, os.O_RDONLY | os.O_DIRECTORY, RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and is_directory:
            return _remove(parent, name, left, top, depth, is_directory=False)
        if error.errno in _ABSENT:
            return True
        if error.errno == errno.EXDEV:
            raise OSError(errno.EBUSY, "something is mounted here", name) from None
        raise
    try:
        status = os.fstat(fd)
        if status.st_mode & 0o700 != 0o700:
            os.fchmod(fd, 0o700)
        if top is not None and depth > _DEEPEST:
            os.rename(name, f".deep-{status.st_ino}", src_dir_fd=parent, dst_dir_fd=top)
            left.moved = True
            return True
        with os.scandir(fd) as entries:
            found = [
                (entry.name, entry.is_dir(follow_symlinks=False)) for _, entry in zip(range(left.count + 1), entries, strict=False)
            ]
        top = fd if top is None else top
        for entry_name, is_below in found:
            if left.count <= 0 or not _remove(fd, entry_name, left, top, depth + 1, is_directory=is_below):
                return False
    finally:
        os.close(fd)
    if left.count <= 0:
        return False
    try:
        os.rmdir(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            return False
        raise
    left.count -= 1
    return True


def kill_cgroup(target: str) -> Attempt:
    """Every process in a cgroup and below it. By cgroup.kill where there is one: a fork cannot get away from that."""
    procs = _procs(target)
    if not procs:
        return Attempt.GONE
    thaw(target)
    try:
        fd = os.open(f"{target}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"1")
            return Attempt.BUSY
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EOPNOTSUPP):  # cgroup v1, or Linux before 5.14; a threaded group
            raise
    for pid in procs:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return Attempt.BUSY


def thaw(target: str) -> None:
    """Lets a v1 group that has been frozen go on, and those below it: a signal reaches none of its processes before. (In v2
    SIGKILL does.) A group above it is somebody else's; that is named by `holders`."""
    for directory, _, files in os.walk(target):
        if "freezer.state" in files:
            try:
                fd = os.open(f"{directory}/freezer.state", os.O_WRONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                os.write(fd, b"THAWED")
            except OSError:
                pass  # it goes, or one above it is frozen
            finally:
                os.close(fd)


def _procs(target: str) -> list[int]:
    """The processes of a cgroup and of all below it, as far as it exists."""
    found: list[int] = []
    try:
        # 0 is a process of another pid namespace that we cannot see: kill(0) would be ourselves.
        found.extend(pid for pid in map(int, _members(target)) if pid > 1)
        with os.scandir(target) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if error.errno in (*_ABSENT, errno.ENODEV):
            return found
        raise
    for path in below:
        found.extend(_procs(path))
    return found


def _members(target: str) -> list[bytes]:
    for name in ("cgroup.procs", "cgroup.threads"):
        try:
            with open(f"{target}/{name}", "rb", buffering=0) as file:
                return file.read().split()
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a threaded group of v2 has no processes, only threads
                raise
    return []


def rmdir_cgroup(target: str) -> Attempt:
    """A cgroup and those that were made below it. A cgroup is busy for a moment after its last process has gone."""
    try:
        os.rmdir(target)
        return Attempt.GONE
    except OSError as error:
        if error.errno in _ABSENT:
            return Attempt.GONE
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
    try:
        with os.scandir(target) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if error.errno in (*_ABSENT, errno.ENODEV):
            return Attempt.GONE
        raise
    for path in below:
        rmdir_cgroup(path)
    return Attempt.BUSY


VERBS: Mapping[str, Callable[[str], Attempt]] = {
    "rmdir": rmdir,
    "unlink": unlink,
    "remove_tree": remove_tree,
    "umount": umount,
    "kill_cgroup": kill_cgroup,
    "rmdir_cgroup": rmdir_cgroup,
    "close": close,
}


def is_there(verb: str, target: str) -> bool:
    """Whether there is anything that this verb would take away."""
    if verb == "umount":
        from mesocosm.kernel.linux.holding import mounts_of

        return any(mount.point == target for mount in mounts_of("self"))
    return verb != "close" and os.path.lexists(target)


def main(argv: Sequence[str]) -> int:
    """``python -m mesocosm.kernel.runtime.undo VERB TARGET``: one verb, tried as long as there is progress (see `outside`).

    Prints what the last attempt came to, or ``errno NUMBER WORDS``.
    """
    try:
        while (attempt := VERBS[argv[1]](argv[2])) is Attempt.PROGRESS:
            continue
        print(attempt.value)
    except OSError as error:
        print(f"errno {error.errno or 0} {error.strerror or error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
