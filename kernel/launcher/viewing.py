"""What of the host goes into a view: the agent opens it here, the launcher only gets descriptors.

An entry of a `view` effect is plain data, {"target", "kind", …}:

    kind        also            becomes
    directory   mode            an empty directory
    link        link            a symbolic link
    file        source|content  a copy of the file's bytes, made once
    overlay     source          the directory, as the lower layer of an overlay that has no upper one
    bind        source          a read-only bind mount of the file or directory, alone
    device      source, device  a device node [major, minor]; a bind of `source` where this user may not make nodes

Why overlays: a read-only bind mount still lets one connect to a Unix socket that lies in it, and carries the
mounts below it along. Through an overlay a socket is only a name (connecting is refused) and mounts below are not
there. `optional` entries whose source is missing are left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel.core.errors import LaunchError, from_oserror
from mesocosm.kernel.linux import mounts
from mesocosm.kernel.linux.libc import SyscallError

_AS_TREE = frozenset({"overlay", "bind"})


def open_entries(entries: Sequence[Mapping[str, Any]], empty: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The entries as the launcher takes them, and the descriptors they refer to (the caller closes them).

    `empty`: a directory with nothing in it, of a mount of this namespace (kernels before 6.15 lay nothing else together).
    """
    fds: list[int] = []
    prepared: list[dict[str, Any]] = []
    try:
        nothing = os.open(empty, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)  # its path may have colons in it
        fds.append(nothing)
        for entry in entries:
            if (made := _prepare(entry, fds, nothing)) is not None:
                prepared.append(made)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return prepared, fds


def _prepare(entry: Mapping[str, Any], fds: list[int], empty: int) -> dict[str, Any] | None:
    made = {key: value for key, value in entry.items() if key not in ("source", "optional")}
    source = entry.get("source")
    if source is None or (entry["kind"] == "device" and os.geteuid() == 0 and not is_confined()):
        return made
    try:
        fd = _open(entry["kind"], source, empty)
    except OSError as error:
        if entry.get("optional"):
            return None
        syscall = error.syscall if isinstance(error, SyscallError) else "open"
        raise from_oserror(error, syscall=syscall, target=source, hint="part of the containers' view of the host") from error
    fds.append(fd)
    made["fd"] = len(fds) - 1
    if made["kind"] in _AS_TREE:
        made["kind"] = "tree"
    return made


def _open(kind: str, source: str, empty: int) -> int:
    match kind:
        case "overlay":
            return mounts.fsmount("overlay", {"lowerdir": f"{source}:/proc/self/fd/{empty}"})
        case "bind" | "device":
            return mounts.open_tree(source)
        case "file":
            return os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    raise LaunchError(f"a view has no entries of kind {kind!r}", target=source)


def is_confined() -> bool:
    """Whether we are root only of a user namespace, where device nodes cannot be made. user_namespaces(7)."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() != ["0", "0", "4294967295"]
