"""What a container sees as /: the host's view, or a directory, and the file systems every program expects.

What lives here: the allow-list of the host's files and the standard mounts. What does not: the sandbox and
volumes, which their own planners put on top, and masks over /proc (hardening).

Theory. `rootfs = "host"` is an allow-list, never the host minus something: a new secret on the host is not in it
by default. The launcher builds the *view* once; all containers share it, and a container's root costs one open.
Programs and libraries are overlays with nothing to write to, so they are read-only for ever, what is mounted
below them on the host does not show through, and a Unix socket in them cannot be connected to. Files of /etc are
copies, because an overlay of /etc would bring /etc/shadow along. Of /sys two corners are shown.

On that come places of the container's own: /tmp /run /home /root /var /dev/shm (together at most SCRATCH bytes, which
are charged to the container's memory limit), terminals, /proc. A volume that must appear where the view has nothing
gets a root of the container's own (`extra`), with the view's parts in it.

`rootfs = "/dir"` is an overlay: the directory below, the container's own layer above, which goes when it ends.
Its files keep their owners, so a root directory that belongs to the host's root is read-only in effect for a
container with users of its own, except for directories open to all, and / itself.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from mesocosm.kernel import Effect, Fact, Grant, Plan, Step, Undo, hookimpl
from mesocosm.kernel.contracts import ContainerPlan, ContainerSpec, HostFacts
from mesocosm.kernel.core.errors import SpecError, UnsupportedError
from mesocosm.kernel.core.plan import is_apart

VIEW = "host"
SCRATCH = 256 * 2**20
_KEPT = ("nosuid", "nodev")

# target: (mode, what is in it from the start)
_SCRATCH: dict[str, tuple[int, dict[str, int]]] = {
    "/tmp": (0o1777, {}),
    "/run": (0o755, {"lock": 0o1777}),
    "/var": (0o755, {"cache": 0o755, "lib": 0o755, "lock": 0o1777, "log": 0o755, "run": 0o755, "spool": 0o755, "tmp": 0o1777}),
    "/home": (0o755, {}),
    "/root": (0o700, {}),
    # Even where IPC is shared: POSIX shared memory is a directory, and sharing directories is what volumes are for.
    "/dev/shm": (0o1777, {}),
}
_READ_ONLY_SCRATCH = ("/tmp", "/run", "/var", "/dev/shm")  # what stays writable with read_only = true
_FLAGS = {"/dev/shm": ["noexec"]}
_TOP = re.compile(r"usr|bin|sbin|opt|lib(?:32|64|x32|exec)?")
_EMPTY = ("home", "media", "mnt", "proc", "root", "run", "sandbox", "srv", "tmp", "var")
_ETC_FILES = frozenset({
    "bash.bashrc", "bashrc", "ca-certificates.conf", "debian_version", "ethertypes", "gai.conf", "group",
    "host.conf", "inputrc", "ld.so.cache", "ld.so.conf", "locale.alias", "locale.conf", "localtime", "login.defs",
    "lsb-release", "magic", "magic.mime", "mailcap", "mime.types", "networks", "nsswitch.conf", "os-release", "passwd", "profile",
    "protocols", "resolv.conf", "rpc", "services", "shells", "system-release", "timezone", "vimrc",
})  # fmt: skip
_ETC_DIRECTORIES = re.compile(
    r"alternatives|ca-certificates|crypto-policies|fonts|java[-0-9a-z.]*|ld\.so\.conf\.d|perl|profile\.d|python[0-9.]*|terminfo|xml"
)
# Below these only what is named: private keys stand beside it.
_ETC_PARTS = {
    "ssl": (("openssl.cnf", "file"), ("cert.pem", "file"), ("certs", "overlay")),
    "pki": (("ca-trust", "overlay"),),
}
_HOSTS = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
_DEVICE_LINKS = (
    ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
)  # fmt: skip
_SYS = ("/sys/devices/system/cpu", "/sys/kernel/mm/transparent_hugepage")
_RESERVED = frozenset({"dev", "proc", "sys"})


@hookimpl
def host_effects(host: HostFacts) -> Sequence[Effect]:
    """The view, made once by the launcher and gone with it: nothing on the host itself needs an undo."""
    return [Effect("view", {"name": VIEW, "entries": view_entries(host)})]


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
    """Root, standard mounts, pivot. Nothing for a container that lives in somebody else's mounts."""
    if container.image is not None:
        raise UnsupportedError(
            "this build cannot unpack images yet",
            path=f"{container.path}.image",
            have=container.image,
            need="rootfs",
            hint='unpack it and give its directory: rootfs = "/dir"',
        )
    if container.namespaces.get("mount", "own") != "own":
        if container.rootfs != "host":
            hint = 'namespaces = { mount = "own" }'
            raise SpecError("a root directory needs mounts of its own", path=f"{container.path}.rootfs", hint=hint)
        return None
    has_users = is_apart("user", container.namespaces.get("user", "own"), parent)
    uid: Any = grants["uid_base"] if has_users else 0
    targets = _targets(container, host)
    if container.is_pause:
        return Plan(setup=[Step("view", {"name": VIEW}), Step("pivot", {"read_only": True})])
    standard = [Step("proc", {"target": "/proc"}), Step("devpts", {"target": "/dev/pts"})]
    if container.namespaces.get("ipc", "own") == "parent" and is_apart("ipc", "parent", parent):
        # A mount shows the queues of whoever makes it. The parent's are entered before all mounts; an IPC namespace of
        # the container's own comes only after, so its queues have no directory (mq_open works without).
        standard.append(Step("mqueue", {"target": "/dev/mqueue"}))
    if container.rootfs == "host":
        return Plan(setup=[*_host_root(container, host, targets, uid), *standard, Step("pivot", {"read_only": True})])
    steps = [*_directory_root(container, targets, uid), *standard, Step("pivot", {"read_only": container.read_only})]
    return Plan(effects=_layers(container, host, uid), setup=steps)


def _host_root(container: ContainerSpec, host: HostFacts, targets: Sequence[str], uid: object) -> list[Step]:
    scratch = _READ_ONLY_SCRATCH if container.read_only else tuple(_SCRATCH)
    args: dict[str, Any] = {"name": VIEW}
    if extra := _extra(targets, (*scratch, "/sandbox")):
        fresh = {"/" + path.split("/")[1] for path in extra}
        args |= {"extra": extra, "parts": {path: kind for path, kind in _parts(host).items() if path not in fresh}}
    return [Step("view", args), *_scratch(scratch, targets, uid)]


def _layers(container: ContainerSpec, host: HostFacts, uid: object) -> list[Effect]:
    base = f"{host.container_dir(container.id)}/root"
    upper, work = f"{base}/upper", f"{base}/work"
    return [
        Effect("directory", {"path": base, "mode": 0o700, "uid": 0}, (Undo("remove_tree", base),)),
        Effect("directory", {"path": upper, "mode": 0o755, "uid": uid}),
        Effect("directory", {"path": work, "mode": 0o700, "uid": 0}),
        Effect("directory", {"path": f"{upper}/proc", "mode": 0o555, "uid": 0}),  # a mount point, whatever is below
        Effect("mount_tree", {"source": container.rootfs}),
        Effect("mount_tree", {"source": base}),
    ]


def _directory_root(container: ContainerSpec, targets: Sequence[str], uid: object) -> list[Step]:
    steps = [
        Step("overlay", {"lower": [Fact(4, "fd")], "layer": Fact(5, "fd")}),
        Step("view_part", {"view": VIEW, "source": "/dev", "target": "/dev", "create": "dir"}),
        Step("view_part", {"view": VIEW, "source": "/sys", "target": "/sys", "create": "dir"}),
    ]
    scratch = ("/tmp", "/run", "/dev/shm") if container.read_only else ("/dev/shm",)
    return [*steps, *_scratch(scratch, targets, uid, create="dir")]


def _scratch(paths: Sequence[str], targets: Sequence[str], uid: object, create: str | None = None) -> list[Step]:
    """A step, unless volumes take all of these places."""
    left = tuple(path for path in paths if path not in targets)
    return [_scratch_step(left, uid, create)] if left else []


@cache  # the same few steps for every container: made once, and never changed
def _scratch_step(paths: Sequence[str], uid: object, create: str | None) -> Step:
    places = {}
    for path in paths:
        mode, directories = _SCRATCH[path]
        places[path] = {"mode": mode, "flags": _FLAGS.get(path, []), "directories": dict(directories)}
    args = {"size": SCRATCH, "nr_inodes": SCRATCH // 4096, "uid": uid, "flags": list(_KEPT), "places": places}
    return Step("scratch", {**args, "create": create})


def _targets(container: ContainerSpec, host: HostFacts) -> list[str]:
    """Where volumes will appear, normalised; SpecError for places that nothing may cover."""
    if not container.volumes:
        return []
    shown = {path.strip("/") for path in _parts(host)} - set(_EMPTY)
    refused = _RESERVED | shown if container.rootfs == "host" else _RESERVED
    found = []
    for index, volume in enumerate(container.volumes):
        target = posixpath.normpath("/" + volume.target.lstrip("/"))
        top = target.split("/")[1]
        if top in refused and target != "/dev/shm":
            raise SpecError(
                f"a volume cannot be below /{top}: it is {'the kernel' if top in _RESERVED else 'the host'}'s",
                path=f"{container.path}.volumes[{index}].target",
                have=target,
                hint="a directory of its own, like /data, or one below /tmp /run /home /root /var /srv /mnt /sandbox",
            )
        found.append(target)
    return found


def _extra(targets: Sequence[str], writable: Sequence[str]) -> list[str]:
    """Directories the view lacks: what the targets outside all that is writable stand in. The targets themselves are made
    with their mounts: only opening a volume tells whether it is a directory or a file."""
    there = {path.split("/")[1] for path in writable}
    lacking = [target for target in targets if target.split("/")[1] not in there and target[1:] not in _EMPTY]
    return sorted({posixpath.dirname(target) for target in lacking})


def _parts(host: HostFacts) -> dict[str, str]:
    """The entries at the top of the view: path → "dir", or "-> target" of a link. Sorted."""
    listed = {f"/{name}": kind for name, kind in host.listing.get("/", {}).items() if _TOP.fullmatch(name) and kind != "file"}
    return dict(sorted({**listed, **{f"/{name}": "dir" for name in (*_EMPTY, "dev", "etc", "sys")}}.items()))


def view_entries(host: HostFacts) -> list[dict[str, Any]]:
    """The view as data, parents before what is in them: see the `view` effect for what each kind means."""
    entries = []
    for path, kind in _parts(host).items():
        name = path[1:]
        if kind.startswith("-> "):
            entries.append({"target": path, "kind": "link", "link": kind[3:]})
        elif _TOP.fullmatch(name):
            entries.append({"target": path, "kind": "overlay", "source": path})
        else:
            mode = _SCRATCH[path][0] if path in _SCRATCH else 0o755
            entries.append(_directory(path, mode))
    entries += [_directory(f"/var/{name}", mode) for name, mode in _SCRATCH["/var"][1].items()]
    return entries + _etc(host) + _dev() + _sys()


def _directory(path: str, mode: int = 0o755) -> dict[str, Any]:
    return {"target": path, "kind": "directory", "mode": mode}


def _etc(host: HostFacts) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = [
        {"target": "/etc/hosts", "kind": "file", "content": _HOSTS, "mode": 0o644},
        {"target": "/etc/mtab", "kind": "link", "link": "/proc/self/mounts"},
    ]
    for name, kind in sorted(host.listing.get("/etc", {}).items()):
        path = f"/etc/{name}"
        if name in _ETC_PARTS and kind == "dir":
            entries.append(_directory(path))
            for part, how in _ETC_PARTS[name]:
                entries.append({"target": f"{path}/{part}", "kind": how, "source": f"{path}/{part}", "optional": True})
        elif kind == "dir" and _ETC_DIRECTORIES.fullmatch(name):
            entries.append({"target": path, "kind": "overlay", "source": path})
        elif kind.startswith("-> ") and (name in _ETC_FILES or _ETC_DIRECTORIES.fullmatch(name)) and _is_shown(kind[3:]):
            entries.append({"target": path, "kind": "link", "link": kind[3:]})
        elif name in _ETC_FILES and kind != "dir":
            # A link that leads out of the view (resolv.conf into /run, say) becomes a copy of what it leads to.
            entries.append({"target": path, "kind": "file", "source": path, "optional": True})
    return entries


def _is_shown(link: str) -> bool:
    target = posixpath.normpath(posixpath.join("/etc", link))
    return _TOP.fullmatch(target.split("/")[1]) is not None


def _dev() -> list[dict[str, Any]]:
    # A user namespace may not make devices: an ordinary user's view has the host's own nodes (`source`) bound into it.
    entries: list[dict[str, Any]] = []
    for name, major, minor in _DEVICES:
        path = f"/dev/{name}"
        entries.append({"target": path, "kind": "device", "source": path, "device": [major, minor], "mode": 0o666})
    entries += [{"target": f"/dev/{name}", "kind": "link", "link": link} for name, link in _DEVICE_LINKS]
    return [*entries, _directory("/dev/mqueue"), _directory("/dev/pts"), _directory("/dev/shm", 0o1777)]


def _sys() -> list[dict[str, Any]]:
    entries = [_directory("/sys/fs"), _directory("/sys/fs/cgroup")]
    made: set[str] = set()
    for path in _SYS:
        for depth in range(3, path.count("/") + 1):
            around = "/".join(path.split("/")[:depth])
            if around not in made:
                made.add(around)
                entries.append(_directory(around))
        entries.append({"target": path, "kind": "bind", "source": path, "optional": True})
    return entries
