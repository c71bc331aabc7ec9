"""What the kernel has that no process is: network links and addresses, loop devices, bound sockets, keys, cgroup hierarchies.

What lives here: reading the kernel's tables. What must not: an opinion about whose a thing is. An OSError means that this kernel,
or this user's view of it, does not show the table at all.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from mesocosm.kernel.linux import procfs

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_KEY_TYPE, _KEY_DESCRIPTION = 7, 8  # columns of /proc/keys


class Key(NamedTuple):
    """One key of keyrings(7) that this user may see."""

    serial: str
    uid: int
    kind: str
    description: str


def links(pid: int | str = "self") -> list[str]:
    """The network devices in a process's network namespace. OSError if that cannot be read."""
    with open(f"/proc/{pid}/net/dev") as file:
        return [line.partition(":")[0].strip() for line in file if ":" in line]


def addresses(link: str) -> Iterator[str]:
    """The first IPv4 address (the kernel's old call tells no more) and all IPv6 addresses of a device of our own namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("16s24x", link.encode()))
            yield socket.inet_ntoa(answer[20:24])
        except OSError:
            pass  # it has none
    try:
        with open("/proc/self/net/if_inet6") as file:
            for line in file:
                fields = line.split()
                if fields[-1] == link:
                    yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[0]))
    except OSError:
        return  # a kernel without IPv6


def loops() -> Iterator[tuple[str, str]]:
    """(device, file) of every loop device that has a file. OSError without sysfs."""
    for name in sorted(os.listdir("/sys/block")):
        if name.startswith("loop"):
            try:
                with open(f"/sys/block/{name}/loop/backing_file", errors="surrogateescape") as file:
                    yield f"/dev/{name}", file.read().strip().removesuffix(" (deleted)")
            except OSError:
                continue  # free


def bound_sockets() -> Iterator[str]:
    """The paths that Unix sockets of our network namespace have been bound to, and still are. OSError without /proc/net/unix."""
    with open("/proc/net/unix", errors="surrogateescape") as file:
        next(file, None)
        for line in file:
            fields = line.rstrip("\n").split(None, 7)
            if len(fields) > 7 and fields[7].startswith("/"):
                yield fields[7]


def visible_keys() -> Iterator[Key]:
    """The keys that this user may see: of others' none, not even for root. OSError without CONFIG_PROC_KEYS."""
    with open("/proc/keys", errors="replace") as file:
        for line in file:
            fields = line.split(None, _KEY_DESCRIPTION)
            if len(fields) > _KEY_DESCRIPTION:
                description = fields[_KEY_DESCRIPTION].rstrip("\n").rpartition(":")[0]
                yield Key(fields[0], int(fields[5]), fields[_KEY_TYPE], description)


def key_users() -> Iterator[tuple[int, int]]:
    """(uid, how many keys) of every user who has any. OSError where keys are not compiled in."""
    with open("/proc/key-users") as file:
        for line in file:
            uid, _, counts = line.partition(":")
            yield int(uid), int(counts.split()[1].partition("/")[0])


def hierarchies() -> list[str]:
    """Where cgroup hierarchies are mounted, v1 and v2, each once (by its file system), the shortest path of each."""
    found: dict[str, str] = {}
    for mount in procfs.mounts_of():
        if mount.kind in ("cgroup", "cgroup2"):
            have = found.get(mount.device)
            if have is None or len(mount.point) < len(have):
                found[mount.device] = mount.point
    return list(found.values())
