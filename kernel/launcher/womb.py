"""The launcher's own mount tree, from which every container gets its copy.

It is nearly empty: a proc of the launcher's PID namespace, the views, the masks and a place to stage other roots.
No mount of the host is in it, so none can be left in a container by mistake, not for one instruction; and copying
it costs a tenth of what copying the host's tree costs.

    /proc                 for /proc/PID/uid_map and for overlay layers by descriptor
    /views/NAME           read-only trees: the default root, the devices
    /masks/{directory,file}   what masked paths are covered with
    /root                 where a root that is not a view is attached
    /layers/N             where what such a root is laid together from is attached
    /workshop             where a container's scratch is attached while it is cut into places
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel.launcher.table import LAYERS
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import mounts, namespaces

_TINY = {"size": "1m", "nr_inodes": "1k", "mode": "0755"}


def enter() -> int:
    """Moves this process into a mount namespace with the tree above; a descriptor of the namespace it came from."""
    host = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    namespaces.unshare(c.CLONE_NEWNS)
    mounts.make_private("/")
    tree = mounts.fsmount("tmpfs", _TINY, c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NODEV)
    mounts.move_mount(tree, "/tmp")
    os.close(tree)
    for name in ("proc", "views", "masks", "root", "workshop", "layers", *(f"layers/{number}" for number in range(LAYERS))):
        os.mkdir(f"/tmp/{name}", 0o755)
    proc = mounts.open_tree("/proc")
    mounts.move_mount(proc, "/tmp/proc")
    os.close(proc)
    masks = mounts.fsmount("tmpfs", {"size": "4k", "mode": "0755"}, c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NODEV | c.MOUNT_ATTR_NOEXEC)
    mounts.move_mount(masks, "/tmp/masks")
    os.mkdir("/tmp/masks/directory", 0o555)
    os.close(os.open("/tmp/masks/file", os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
    mounts.mount_setattr(masks, set_=c.MOUNT_ATTR_RDONLY)
    os.close(masks)
    os.chdir("/tmp")
    mounts.pivot_root(".", ".")
    mounts.umount(".", c.MNT_DETACH)
    os.chdir("/")
    return host


def build_view(name: str, entries: Sequence[Mapping[str, Any]], fds: Sequence[int]) -> None:
    """Makes /views/NAME out of entries {"target", "kind", "mode"?, "fd"?, "content"?, "link"?, "device"?}; once.

    `kind`: directory, link, file (copied from the descriptor number `fd`, or `content`), tree (the detached mount
    `fd`, made read-only all the way down), device (a node of `device` = [major, minor], or the mount `fd`).
    A view that could not be finished is taken down again; OSError says why.
    """
    final = f"/views/{name}"
    if os.path.ismount(final):
        return
    os.makedirs(final, 0o755, exist_ok=True)
    tree = mounts.fsmount("tmpfs", {"size": "8m", "nr_inodes": "4k", "mode": "0755"}, c.MOUNT_ATTR_NOSUID)
    mounts.move_mount(tree, final)
    try:
        for entry in entries:
            _make(final + entry["target"], entry, fds)
        # Only this mount: the trees attached to it are read-only already.
        mounts.mount_setattr(tree, set_=c.MOUNT_ATTR_RDONLY, recursive=False)
    except BaseException:
        mounts.umount(final)
        os.rmdir(final)
        raise
    finally:
        os.close(tree)


def _make(path: str, entry: Mapping[str, Any], fds: Sequence[int]) -> None:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    match entry["kind"]:
        case "directory":
            os.makedirs(path, entry.get("mode", 0o755), exist_ok=True)
            os.chmod(path, entry.get("mode", 0o755))
        case "link":
            os.symlink(entry["link"], path)
        case "file":
            _copy(path, entry, fds)
        case "tree":
            if stat.S_ISDIR(os.fstat(fds[entry["fd"]]).st_mode):
                os.makedirs(path, 0o755, exist_ok=True)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444))
            mounts.mount_setattr(fds[entry["fd"]], set_=c.MOUNT_ATTR_RDONLY | c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NODEV)
            mounts.move_mount(fds[entry["fd"]], path)
        case "device":
            if "fd" in entry:
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o666))
                # Not NODEV: it is to be used; and what is read-only is the node, not what it stands for.
                mounts.mount_setattr(fds[entry["fd"]], set_=c.MOUNT_ATTR_RDONLY | c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NOEXEC)
                mounts.move_mount(fds[entry["fd"]], path)
            else:
                major, minor = entry["device"]
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
                os.chmod(path, 0o666)
        case kind:
            raise ValueError(f"a view has no entries of kind {kind!r}")


def _copy(path: str, entry: Mapping[str, Any], fds: Sequence[int]) -> None:
    target = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, entry.get("mode", 0o644))
    try:
        if "fd" in entry:
            while chunk := os.read(fds[entry["fd"]], 65536):
                os.write(target, chunk)
        else:
            os.write(target, entry["content"])
    finally:
        os.close(target)
