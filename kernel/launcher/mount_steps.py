"""What the setup steps about mounts become: root, mount, protect, pivot. Pure, like steps.py.

Everything that touches the container's tree goes through openat2 with IN_ROOT below slot 0, the root directory,
until `pivot`: a rootfs full of hostile links cannot lead a mount anywhere but into itself. Mounts are made
detached, get their attributes, and are attached last, descriptor to descriptor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mesocosm.kernel.launcher.table import (
    JUMP_IF_FAIL,
    JUMP_IF_OK,
    LAYERS,
    OK_ANY,
    ROOT,
    Argument,
    Data,
    Fragment,
    Slot,
    Text,
)
from mesocosm.kernel.linux import constants as c

Args = Mapping[str, Any]
A, B, C, D = Slot(1), Slot(2), Slot(3), Slot(4)
_PATH_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_HOW = struct.Struct("=QQQ")
_ATTR = struct.Struct("=QQQQ")
_RESOLVE = c.RESOLVE_IN_ROOT | c.RESOLVE_NO_MAGICLINKS
VIEWS = "/views"  # of the launcher's own tree
MASKS = "/masks"  # an empty directory `directory`, an empty file `file`
STAGING = b"/root"  # where a root that is not a view is attached until it becomes /
WORKSHOP = b"/workshop"  # where a file system is attached while pieces of it are cloned
_DEFAULT_ATTRS = c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NODEV


def open_inside_root(
    f: Fragment, root: Argument, path: str, opening: int, out: Slot, *, resolve: int = _RESOLVE, **more: int
) -> None:
    how = Data(_OPEN_HOW.pack(opening | os.O_CLOEXEC, 0, resolve))
    f.row("openat2", root, Text(os.fsencode(path)), how, _OPEN_HOW.size, out=out, **more)


def _attach(f: Fragment, mount: Argument, target: str, *, kind: int = os.O_DIRECTORY, resolve: int = _RESOLVE) -> None:
    """The detached `mount` goes over `target`, which exists below the root."""
    open_inside_root(f, ROOT, target, os.O_PATH | kind, C, resolve=resolve)
    f.row("move_mount", mount, Text(b""), C, Text(b""), c.MOVE_MOUNT_F_EMPTY_PATH | c.MOVE_MOUNT_T_EMPTY_PATH)


def _set_attributes(f: Fragment, mount: Argument, attributes: int) -> None:
    how = Data(_ATTR.pack(attributes, 0, 0, 0))
    f.row("mount_setattr", mount, Text(b""), c.AT_EMPTY_PATH | c.AT_RECURSIVE, how, _ATTR.size)


def _new_filesystem(f: Fragment, kind: str, options: Iterable[tuple[str, str | None]], attributes: int, out: Slot) -> None:
    f.row("fsopen", Text(kind.encode()), c.FSOPEN_CLOEXEC, out=A)
    for key, value in options:
        if value is None:
            f.row("fsconfig", A, c.FSCONFIG_SET_FLAG, Text(key.encode()), 0, 0)
        else:
            f.row("fsconfig", A, c.FSCONFIG_SET_STRING, Text(key.encode()), Text(value.encode()), 0)
    f.row("fsconfig", A, c.FSCONFIG_CMD_CREATE, 0, 0, 0)
    f.row("fsmount", A, c.FSMOUNT_CLOEXEC, attributes, out=out)


def _make_path(f: Fragment, path: str, *, kind: str = "dir", uid: int = 0) -> None:
    """Makes `path` below the root as far as it is missing, one component at a time, and through no link at all: one that a
    container has made in a place of its own could lead into a directory of the host that is mounted beside it."""
    parts = [part for part in path.split("/") if part]
    open_inside_root(f, ROOT, path, os.O_PATH, B, flags=JUMP_IF_OK, skip=2 * len(parts))
    for depth, name in enumerate(parts):
        open_inside_root(f, ROOT, "/" + "/".join(parts[:depth]), _PATH_DIRECTORY, B, resolve=_RESOLVE | c.RESOLVE_NO_SYMLINKS)
        if kind == "file" and depth == len(parts) - 1:
            f.row("mknodat", B, Text(os.fsencode(name)), 0o100644, 0, flags=OK_ANY)
        else:
            f.row("mkdirat", B, Text(os.fsencode(name)), 0o755, flags=OK_ANY)


def _attributes(names: Iterable[str]) -> int:
    value = 0
    for name in names:
        value |= c.MOUNT_ATTRS[name]
    return value


# --- root -------------------------------------------------------------------------------------------------------


def _view(f: Fragment, args: Args) -> None:
    view = f"{VIEWS}/{args['name']}"
    parts: Mapping[str, str] = args.get("parts") or {}
    if not args.get("extra"):
        f.row("openat", c.AT_FDCWD, Text(os.fsencode(view)), _PATH_DIRECTORY, 0, out=ROOT)
        return
    # Somebody wants a directory that the shared view lacks: a root of its own, with the view's parts in it.
    _new_filesystem(f, "tmpfs", (("size", "1m"), ("nr_inodes", "1k"), ("mode", "0755")), _DEFAULT_ATTRS, B)
    f.row("move_mount", B, Text(b""), c.AT_FDCWD, Text(STAGING), c.MOVE_MOUNT_F_EMPTY_PATH)
    f.row("openat", c.AT_FDCWD, Text(STAGING), _PATH_DIRECTORY, 0, out=ROOT)
    for path, kind in parts.items():
        name = Text(os.fsencode(path.lstrip("/")))
        if kind.startswith("-> "):
            f.row("symlinkat", Text(os.fsencode(kind[3:])), ROOT, name)
        else:
            f.row("mkdirat", ROOT, name, 0o755)
            f.row("open_tree", c.AT_FDCWD, Text(os.fsencode(f"{view}/{path.lstrip('/')}")), _CLONE_ALL, out=A)
            _attach(f, A, path)
    for path in args["extra"]:
        _make_path(f, path)


_CLONE_ALL = c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC | c.AT_RECURSIVE


def _stage_root(f: Fragment, mount: Argument) -> None:
    f.row("move_mount", mount, Text(b""), c.AT_FDCWD, Text(STAGING), c.MOVE_MOUNT_F_EMPTY_PATH)
    f.row("openat", c.AT_FDCWD, Text(STAGING), _PATH_DIRECTORY, 0, out=ROOT)


def _overlay(f: Fragment, args: Args) -> None:
    # overlayfs takes its layers by path, and kernels before 6.15 only from mounts of this very namespace: so each layer
    # is attached first, in the copy of the launcher's tree that is detached as a whole by `pivot`.
    layer = [args["layer"]] if args.get("layer") is not None else []
    trees = [*layer, *args["lower"]]
    if len(trees) > LAYERS:
        raise ValueError(f"an overlay of {len(trees)} layers; there is room for {LAYERS}")
    paths = [f"/layers/{number}" for number in range(len(trees))]
    for tree, path in zip(trees, paths, strict=True):
        f.row("move_mount", tree, Text(b""), c.AT_FDCWD, Text(path.encode()), c.MOVE_MOUNT_F_EMPTY_PATH)
    options = [("lowerdir", ":".join(paths[len(layer) :]))]
    if layer:  # on one mount, as overlayfs wants it
        options += [("upperdir", f"{paths[0]}/upper"), ("workdir", f"{paths[0]}/work")]
    _new_filesystem(f, "overlay", (*options, *args.get("options", ())), _DEFAULT_ATTRS, B)
    _stage_root(f, B)


def _tree(f: Fragment, args: Args) -> None:
    if args.get("read_only"):
        _set_attributes(f, args["fd"], c.MOUNT_ATTR_RDONLY | _DEFAULT_ATTRS)
    _stage_root(f, args["fd"])


# --- mount ------------------------------------------------------------------------------------------------------


def _tmpfs(f: Fragment, args: Args) -> None:
    uid = int(args.get("uid") or 0)
    options = [("size", str(args["size"])), ("mode", f"{args.get('mode', 0o755):o}"), ("uid", str(uid)), ("gid", str(uid))]
    options.append(("nr_inodes", str(args.get("nr_inodes") or "64k")))
    attributes = _attributes(args.get("flags", ("nosuid", "nodev"))) & ~c.MOUNT_ATTR_RDONLY
    _new_filesystem(f, "tmpfs", options, attributes, D)
    for name, mode in (args.get("directories") or {}).items():
        _make_directory(f, D, name, mode, uid)
    if args.get("create"):
        _make_path(f, args["target"])
    _attach(f, D, args["target"])
    if args.get("read_only") or "ro" in args.get("flags", ()):
        open_inside_root(f, ROOT, args["target"], _PATH_DIRECTORY, C)
        _set_attributes(f, C, c.MOUNT_ATTR_RDONLY)


def _make_directory(f: Fragment, parent: Argument, name: str, mode: int, uid: Argument) -> None:
    """In a file system that nobody else has seen yet: there is no link in it, and no umask to be in the way of the mode."""
    f.row("mkdirat", parent, Text(os.fsencode(name)), 0o700)
    if uid:
        f.row("fchownat", parent, Text(os.fsencode(name)), uid, uid, 0)
    f.row("openat", parent, Text(os.fsencode(name)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0, out=C)
    f.row("fchmod", C, mode)


def _scratch(f: Fragment, args: Args) -> None:
    # A file system costs many times what one more mount of it costs, so all of a container's scratch is in one. Kernels
    # before 6.15 clone only from what is attached: it is, in the copy of the launcher's tree that `pivot` detaches.
    uid: Argument = args.get("uid") or 0
    options = [("size", str(args["size"])), ("mode", "0755"), ("nr_inodes", str(args["nr_inodes"]))]
    _new_filesystem(f, "tmpfs", options, _attributes(args["flags"]), D)
    f.row("move_mount", D, Text(b""), c.AT_FDCWD, Text(WORKSHOP), c.MOVE_MOUNT_F_EMPTY_PATH)
    for number, (target, place) in enumerate(args["places"].items()):
        _make_directory(f, D, str(number), place["mode"], uid)
        for name, mode in (place.get("directories") or {}).items():
            _make_directory(f, D, f"{number}/{name}", mode, uid)
        f.row("open_tree", D, Text(str(number).encode()), c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC, out=A)
        if place.get("flags"):
            _set_attributes(f, A, _attributes(place["flags"]))
        if args.get("create"):
            _make_path(f, target)
        _attach(f, A, target)


def _proc(f: Fragment, args: Args) -> None:
    _new_filesystem(f, "proc", (), _DEFAULT_ATTRS | c.MOUNT_ATTR_NOEXEC, B)
    _attach(f, B, args["target"])


def _devpts(f: Fragment, args: Args) -> None:
    options: list[tuple[str, str | None]] = [("newinstance", None), ("ptmxmode", "0666"), ("mode", "0620")]
    options += [(key, str(args[key])) for key in ("uid", "gid") if args.get(key) is not None]
    _new_filesystem(f, "devpts", options, c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NOEXEC, B)
    _attach(f, B, args["target"])


def _mqueue(f: Fragment, args: Args) -> None:
    _new_filesystem(f, "mqueue", (), _DEFAULT_ATTRS | c.MOUNT_ATTR_NOEXEC, B)
    _attach(f, B, args["target"])


def _cgroup2(f: Fragment, args: Args) -> None:
    _new_filesystem(f, "cgroup2", (), _DEFAULT_ATTRS | c.MOUNT_ATTR_NOEXEC | c.MOUNT_ATTR_RDONLY, B)
    _attach(f, B, args["target"])


def _bind(f: Fragment, args: Args) -> None:
    attributes = _DEFAULT_ATTRS | (c.MOUNT_ATTR_RDONLY if args.get("read_only") else 0)
    _set_attributes(f, args["fd"], attributes)
    kind = args.get("create")
    if kind:
        _make_path(f, args["target"], kind=kind)
    _attach(f, args["fd"], args["target"], kind=0)


def _rebind(f: Fragment, args: Args) -> None:
    open_inside_root(f, ROOT, args["source"], os.O_PATH, B)
    f.row("open_tree", B, Text(b""), _CLONE_ALL | c.AT_EMPTY_PATH, out=A)
    if args.get("read_only"):
        _set_attributes(f, A, c.MOUNT_ATTR_RDONLY)
    _attach(f, A, args["target"], kind=0)


def _view_part(f: Fragment, args: Args) -> None:
    path = f"{VIEWS}/{args['view']}/{str(args['source']).lstrip('/')}"
    if args.get("create"):
        _make_path(f, args["target"], kind=args["create"])
    f.row("open_tree", c.AT_FDCWD, Text(os.fsencode(path)), _CLONE_ALL, out=A)
    # Through no link: it is asked for by no user, and one in a root directory could lead it over /proc, or over the root.
    _attach(f, A, args["target"], kind=0, resolve=_RESOLVE | c.RESOLVE_NO_SYMLINKS)


# --- protect, pivot ---------------------------------------------------------------------------------------------


def _mask(f: Fragment, args: Args) -> None:
    for path in args["paths"]:
        # Absent: skip to the end of this path. A directory is covered by an empty one, all else by an empty file.
        open_inside_root(f, ROOT, path, os.O_PATH, B, flags=JUMP_IF_FAIL, skip=4)
        open_inside_root(f, ROOT, path, _PATH_DIRECTORY, C, flags=JUMP_IF_FAIL, skip=1)
        f.row("open_tree", c.AT_FDCWD, Text(f"{MASKS}/directory".encode()), _CLONE_ALL, out=A, flags=JUMP_IF_OK, skip=1)
        f.row("open_tree", c.AT_FDCWD, Text(f"{MASKS}/file".encode()), _CLONE_ALL, out=A)
        f.row("move_mount", A, Text(b""), B, Text(b""), c.MOVE_MOUNT_F_EMPTY_PATH | c.MOVE_MOUNT_T_EMPTY_PATH)


def _read_only(f: Fragment, args: Args) -> None:
    for path in args["paths"]:
        open_inside_root(f, ROOT, path, os.O_PATH, B, flags=JUMP_IF_FAIL, skip=3)
        f.row("open_tree", B, Text(b""), _CLONE_ALL | c.AT_EMPTY_PATH, out=A)
        _set_attributes(f, A, c.MOUNT_ATTR_RDONLY | _DEFAULT_ATTRS | c.MOUNT_ATTR_NOEXEC)
        f.row("move_mount", A, Text(b""), B, Text(b""), c.MOVE_MOUNT_F_EMPTY_PATH | c.MOVE_MOUNT_T_EMPTY_PATH)


def _pivot(f: Fragment, args: Args) -> None:
    # pivot_root(2): new and old may be the same directory; the old root then lies on top of the new one.
    f.row("fchdir", ROOT)
    f.row("pivot_root", Text(b"."), Text(b"."))
    f.row("umount2", Text(b"."), c.MNT_DETACH)
    f.row("chdir", Text(b"/"))
    if args.get("read_only"):
        f.row("openat", c.AT_FDCWD, Text(b"/"), _PATH_DIRECTORY, 0, out=A)
        how = Data(_ATTR.pack(c.MOUNT_ATTR_RDONLY, 0, 0, 0))
        f.row("mount_setattr", A, Text(b""), c.AT_EMPTY_PATH, how, _ATTR.size)


MOUNT_COMPILERS: Mapping[str, Callable[[Fragment, Args], None]] = {
    "view": _view,
    "overlay": _overlay,
    "tree": _tree,
    "tmpfs": _tmpfs,
    "scratch": _scratch,
    "proc": _proc,
    "devpts": _devpts,
    "mqueue": _mqueue,
    "cgroup2": _cgroup2,
    "bind": _bind,
    "rebind": _rebind,
    "view_part": _view_part,
    "mask": _mask,
    "read_only": _read_only,
    "pivot": _pivot,
}
