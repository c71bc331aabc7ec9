"""The kernel's own kinds of effects: directory, log, mount_tree, open, view.

What lives here: kinds that more than one plug-in uses and that belong to no outsider. Each makes exactly one thing
and answers its descriptors as facts. A path of ours is opened without following any link; a user's path (the
source of a host volume) may contain links, since the user named it and the agent checks it is theirs to name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mesocosm.kernel.contracts import Descriptor, EffectContext, EffectKind, SlowEffectKind
from mesocosm.kernel.core.errors import from_oserror
from mesocosm.kernel.launcher.contract import Launcher
from mesocosm.kernel.linux import holes, served
from mesocosm.kernel.runtime import holders, outside
from mesocosm.kernel.runtime.undo import Attempt, remove_tree


def _at_or_below(prefix: str) -> Iterable[str]:
    if os.path.lexists(prefix):
        yield prefix
    for directory, directories, files in os.walk(prefix):
        for name in (*directories, *files):
            yield os.path.join(directory, name)


def _remove_leftover(path: str) -> None:
    while remove_tree(path) is Attempt.PROGRESS:
        pass  # in pieces; what is busy makes the mkdir that follows fail, which says so


class DirectoryKind:
    """`directory` {path, mode, uid, fresh}: a directory with exactly that mode, owned by uid:uid.

    `fresh`: whatever is there by that name is nobody's any more (no ledger knows it) and goes first. Without it, a
    directory that is there is taken as it is: several may ask for the same one.
    """

    name = "directory"

    def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        """Makes it."""
        path, mode, uid = args["path"], args.get("mode", 0o755), args.get("uid", 0)
        call = "mkdir"
        try:
            try:
                os.mkdir(path, mode)
            except FileExistsError:
                if os.path.islink(path) or not os.path.isdir(path):
                    raise
                if args.get("fresh"):
                    _remove_leftover(path)
                    os.mkdir(path, mode)
            if mode & 0o022 or mode & 0o7000:  # what umask and mkdir(2) take away
                call = "chmod"
                os.chmod(path, mode)
            if uid:
                call = "chown"
                os.chown(path, uid, uid)
        except OSError as error:
            raise from_oserror(error, syscall=call, target=path) from error
        return {}

    def find(self, prefix: str) -> Iterable[str]:
        """Directories at or below `prefix`."""
        return (path for path in _at_or_below(prefix) if os.path.isdir(path) and not os.path.islink(path))


class LogKind:
    """`log` {path, budget} → fd: a file that is only ever appended to, and cut at its old end when it takes more than `budget`
    bytes (see `runtime.budgets`). A budget that was asked for is refused where it cannot be kept."""

    name = "log"

    def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        """Makes and opens it."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
        try:
            fd = os.open(args["path"], flags, 0o640)
        except OSError as error:
            raise from_oserror(error, syscall="open", target=args["path"]) from error
        if "budget" in args:
            try:
                holes.punch(fd, 0, holes.PAGE)  # of an empty file: a question
            except OSError as error:
                os.close(fd)
                hint = "put the run directory (MESOCOSM_RUN_DIR) on a file system with holes, tmpfs say, or leave `log` out"
                raise from_oserror(error, syscall="fallocate", target=args["path"], hint=hint) from error
        return {"fd": Descriptor(fd)}

    def find(self, prefix: str) -> Iterable[str]:
        """Files at or below `prefix` that are called like logs."""
        return (path for path in _at_or_below(prefix) if os.path.basename(path) in ("stdout", "stderr"))


class MountTreeKind:
    """`mount_tree` {source, recursive} → fd, type ("dir" or "file"): a detached clone of what is at a path; it dies with its fd."""

    name = "mount_tree"

    def __init__(self) -> None:
        self._served = served.ours()
        self._slow = SlowMountTree()

    def slow(self, args: Mapping[str, Any]) -> SlowEffectKind | None:
        """Who makes it where a path may lead to a file system that does not answer."""
        return self._slow if self._served.leads_to(args["source"]) else None

    def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        """Clones it."""
        from mesocosm.kernel.linux import mounts

        try:
            fd = mounts.open_tree(args["source"], recursive=bool(args.get("recursive")))
        except OSError as error:
            hint = "create it first, or correct the path (of rootfs, or of a volume's source)"
            missing = {"hint": hint} if error.errno == errno.ENOENT else {}
            raise from_oserror(error, syscall="open_tree", target=args["source"], **missing) from error
        return {"fd": Descriptor(fd), "type": "dir" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"}

    def find(self, _prefix: str) -> Iterable[str]:
        """Nothing of it can be seen in any mount table."""
        return ()


class SlowMountTree:
    """The same in a process of its own: opening a path on a file system that has stopped answering never returns."""

    name = MountTreeKind.name
    deadline = 2 * outside.SECONDS + holders.SECONDS

    def __init__(self) -> None:
        self._outside = outside.Outside()

    async def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        """Clones it; who serves a file system that does not answer, is told in `have`."""
        source = args["source"]
        try:
            fd, kind = await outside.open_tree(self._outside, source, recursive=bool(args.get("recursive")))
        except OSError as error:
            more = {}
            if error.errno == errno.ETIMEDOUT:
                held = await holders.of_file_system(self._outside, source)
                more = {"have": held, "hint": "see to it that the file system answers, or unmount it (umount -l)"}
            raise from_oserror(error, syscall="open_tree", target=source, **more) from error
        return {"fd": Descriptor(fd), "type": kind}

    def find(self, prefix: str) -> Iterable[str]:
        """As the quick one."""
        return ()


class ViewKind:
    """`view` {name, entries}: a mount tree that the launcher builds once and keeps. For `host_effects`."""

    name = "view"
    deadline = 20.0

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    async def do(self, args: Mapping[str, Any], _context: EffectContext) -> Mapping[str, Any]:
        """Has it built, unless it is there."""
        await self._launcher.view(args["name"], args["entries"])
        return {}

    def find(self, _prefix: str) -> Iterable[str]:
        """It lives in the launcher's mount namespace and dies with it."""
        return ()


def kernel_kinds(launcher: Launcher) -> Sequence[EffectKind | SlowEffectKind]:
    """All of them."""
    return (DirectoryKind(), LogKind(), MountTreeKind(), ViewKind(launcher))
