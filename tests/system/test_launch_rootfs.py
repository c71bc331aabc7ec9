"""The launch under attack: root directories full of traps. What is mounted lands inside the root, or the launch fails by name.

A root directory may come from anybody: each place that a launch mounts or makes something at can be a link to the host, a
loop, a file; a program can be made to confuse whoever looks at it before it is run.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

PLACES = ("proc", "sys", "dev", "etc", "sandbox", "data", "dev/null", "dev/pts", "dev/console", "dev/shm", "tmp/inner")
# What a place is a link to; {host} is a directory of the host's that everybody may write to.
LINKS = {
    "absolute": "{host}", "relative": "../../../../../../../..{host}", "dangling": "/no/such/place", "to itself": "{place}",
    "to the root": "/", "by a process": "/proc/1/root{host}", "by a descriptor": "/proc/self/fd/3", "to proc": "/proc",
}  # fmt: skip


def trap(root: Path, place: str, link: str) -> None:
    """Puts a link where the launch would have a directory."""
    target = root / place
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(link)


def fingerprint(directory: Path) -> str:
    """Names, kinds and owners of all that is in a directory."""
    found = [f"{path} {path.lstat().st_mode:o} {path.lstat().st_uid}" for path in sorted(directory.rglob("*"))]
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


@pytest.mark.parametrize("kind", LINKS)
def test_a_place_that_is_a_link_leads_nowhere_but_into_the_root(attacks: Any, kind: str) -> None:
    host = attacks.directory(f"host-{kind.replace(' ', '-')}")
    (host / "precious").write_text("x")
    root = attacks.root(f"root-{kind.replace(' ', '-')}")
    before, mounts = fingerprint(host), Path("/proc/self/mountinfo").read_text()
    volumes = [{"source": "tmpfs:1MiB", "target": target} for target in ("/data", "/tmp/inner")]
    script = "read mounts < /proc/self/mountinfo && echo inside; [ -d /proc/1 ] && echo proc; echo x > /dev/null && echo null"
    ended = []
    for place in PLACES:
        hostile = root.with_name(f"{root.name}-{place.replace('/', '-')}")
        os.rename(root, hostile)
        trap(hostile, place, LINKS[kind].format(host=host, place=f"/{place}"))

        outcome = attacks.run(["/bin/sh", "-c", script], rootfs=str(hostile), volumes=volumes)

        (hostile / place).unlink()
        os.rename(hostile, root)
        if outcome.error is None:
            # Its own volume may be led over its own /proc: then it has none.
            assert outcome.code == 0, (place, outcome)
            assert outcome.out == "inside\nproc\nnull\n" or (kind == "to proc" and outcome.out == "null\n"), (place, outcome)
        else:
            assert outcome.error["code"] == "launch_failed", (place, outcome)
            named = outcome.error.get("target", "").strip("/").split("/")[0] == place.split("/")[0]
            assert named or (kind == "to the root" and "over the root" in outcome.error["hint"]), (place, outcome)
        ended.append((place, outcome.error is None))
        assert fingerprint(host) == before, place
        assert Path("/proc/self/mountinfo").read_text() == mounts, place
    assert ("etc", True) in ended  # a launch has no business there: only the trapped places fail


def test_the_same_link_leads_to_the_host_for_whoever_follows_it_as_a_path(attacks: Any) -> None:
    """The positive control: what a launcher would do that made its directories by path."""
    host = attacks.directory("host-control")
    root = attacks.root("root-control")
    trap(root, "data", str(host))

    os.makedirs(f"{root}/data/made", exist_ok=True)

    assert (host / "made").is_dir()
    (host / "made").rmdir()


def test_what_is_mounted_over_proc_is_the_real_one_whatever_the_root_has_there(attacks: Any) -> None:
    """A fake /proc in the root would take the masks, and be shown what is written to the real one."""
    root = attacks.root("fake")
    for name in ("kcore", "sysrq-trigger", "keys", "self", "sys"):
        (root / "proc").mkdir(exist_ok=True)
        (root / "proc" / name).write_text("fake")

    outcome = attacks.run('read word < /proc/keys; echo "[$word]"; echo $$; [ -d /proc/self/fd ] && echo real', rootfs=str(root))

    assert (outcome.code, outcome.out) == (0, "[]\n1\nreal\n")


def test_devices_of_the_root_are_not_devices(attacks: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    root = attacks.root("devices")
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.mknod(root / "kmsg", 0o020666, os.makedev(1, 11))
    for name in ("null", "kmsg"):
        (root / name).chmod(0o666)

    outcome = attacks.run("echo x > /null || echo refused; read word < /kmsg || echo refused; echo x > /dev/null", rootfs=str(root))

    assert (outcome.code, outcome.out) == (0, "refused\nrefused\n")


def elf(table: int, size: int, count: int) -> bytes:
    """An ELF header that says where its program headers are."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    return head + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, table, 0, 0, 64, size, count, 0, 0, 0)


LIES = {
    "an interpreter that is no text": b"#!/bin/\xff\xfe\n",
    "an interpreter with a NUL": b"#!\0/bin/sh\n",
    "an interpreter with escape sequences": b"#!/bin/\x1b]0;taken\x07\n",
    "headers before the file": elf(2**64 - 1, 56, 1),
    "as many headers as can be said": elf(64, 65535, 65535),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_program_that_lies_is_refused_by_name_and_ends_nothing_else(attacks: Any, lie: str) -> None:
    root = attacks.root(f"lie-{list(LIES).index(lie)}")
    (root / "program").write_bytes(LIES[lie])
    (root / "program").chmod(0o755)
    parent = attacks.start("sleep 60")

    for outcome in (attacks.run(["/program"], rootfs=str(root)), attacks.run(["/program"], rootfs=str(root), parent=parent)):
        assert outcome.error["code"] == "launch_failed", outcome
        assert "/program cannot be executed" in outcome.error["message"]

    attacks.kill(parent)


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "loop", "device"])
def test_a_program_that_is_none_is_refused_and_nobody_waits_for_it(attacks: Any, kind: str) -> None:
    root = attacks.root(f"none-{kind}")
    path = root / "program"
    match kind:
        case "fifo":
            os.mkfifo(path, 0o777)
        case "directory":
            path.mkdir()
        case "socket":
            os.mknod(path, 0o140777)
        case "loop":
            path.symlink_to("/program")
        case "device" if os.geteuid() == 0:
            os.mknod(path, 0o020777, os.makedev(1, 5))
        case _:
            pytest.skip("needs root")

    outcome = attacks.run(["/program"], rootfs=str(root))

    assert outcome.error["code"] == "launch_failed", outcome
    assert outcome.error["target"].endswith("/program")


def test_accounts_of_a_root_directory_are_never_read(attacks: Any) -> None:
    """Its passwd may be endless, or never answer: a user is a number there."""
    root = attacks.root("accounts")
    (root / "etc").mkdir()
    for name in ("passwd", "group", "nsswitch.conf"):
        os.mkfifo(root / "etc" / name, 0o666)

    refused = attacks.run("true", rootfs=str(root), user="daemon")
    served = attacks.run("echo served", rootfs=str(root), user="0")

    assert (refused.error["code"], refused.error["path"]) == ("unsupported", "$.user")
    assert (served.code, served.out) == (0, "served\n")
