"""The launch under attack: masks, read-only mounts and propagation, against a root inside that may mount in a world of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

CAPABLE = ["SYS_ADMIN", "SETUID", "SETGID", "SETFCAP", "SYS_CHROOT", "DAC_OVERRIDE"]  # what brings mounts of one's own back
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
    "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware",
)  # fmt: skip
LOOK = f"""
for path in {MASKED!r}:
    try:
        found = os.listdir(path) if os.path.isdir(path) else get(path)
    except OSError:
        found = b""
    if found:
        print(path)
print("that was all")
"""
# In users and mounts of its own; first against a mask and a read-only mount that it has made itself.
UNDO = """
attempt() { if "$@" 2>/dev/null; then echo "done: $*"; else echo "refused: $*"; fi; }
mkdir /tmp/own /tmp/see && mount -t tmpfs none /tmp/own && echo secret >/tmp/own/file && mount --bind /dev/null /tmp/own/file
mkdir /tmp/own/ro && mount -t tmpfs none /tmp/own/ro && mount -o remount,bind,ro /tmp/own/ro
attempt umount /tmp/own/file
attempt mount -o remount,bind,rw /tmp/own/ro
attempt mount --bind /tmp/own /tmp/see
umount /tmp/see
attempt umount /proc/keys
attempt umount /proc/interrupts
attempt umount -l /proc
attempt mount -o remount,bind,rw /proc/sys
attempt mount -o remount,bind,rw /usr
attempt mount -o remount,rw /
attempt mount --bind /proc /tmp/see
attempt unshare -pf mount -t proc none /tmp/see
attempt mount -t sysfs none /tmp/see
attempt mount --make-shared /
echo x 2>/dev/null >/proc/sys/kernel/core_pattern && echo "done: write"
true
"""


@pytest.mark.parametrize("shares", [{}, {"pid": "parent"}, {"mount": "parent"}], ids=["own", "pids shared", "mounts shared"])
def test_masks_are_there_at_every_level(attacks: Any, shares: dict[str, str]) -> None:
    first = attacks.start("sleep 60")
    second = attacks.start("sleep 60", parent=first)

    outcomes = [attacks.python(LOOK), *(attacks.python(LOOK, parent=parent, namespaces=shares) for parent in (first, second))]

    attacks.kill(first)
    assert [outcome.out for outcome in outcomes] == ["that was all\n"] * 3


@pytest.mark.needs_root
def test_the_same_look_sees_them_where_the_hosts_mounts_were_given(attacks: Any) -> None:
    """The positive control."""
    outcome = attacks.python(LOOK, namespaces={"mount": "host", "user": "host"})

    assert "/proc/interrupts" in outcome.out


def test_no_mask_comes_off_and_nothing_becomes_writable(attacks: Any) -> None:
    """The first three are the positive control: the same commands against what the attacker has mounted itself."""
    outcome = attacks.run(["unshare", "-Urm", "sh", "-c", UNDO], capabilities=CAPABLE)

    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["done"] * 3, outcome
    done = [line for line in lines[3:] if line.startswith("done")]
    # Within a copy of its own a mount may be passed on or not: that changes no other.
    assert [line for line in done if "make-shared" not in line] == []
    assert len(lines) >= 13, outcome


@pytest.fixture
def shared(attacks: Any) -> Iterator[Path]:
    """A directory of the host's whose mounts are passed on to its peers, as those of most hosts are."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path: Path = attacks.directory("shared")
    subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True)
    subprocess.run(["mount", "--make-shared", path], check=True)
    (path / "below").mkdir()
    for place in (path, path / "below"):
        place.chmod(0o777)
    yield path
    subprocess.run(["umount", "-R", path], check=True)
    path.rmdir()


@pytest.mark.needs_root
def test_what_the_host_mounts_later_does_not_appear_in_a_volume(attacks: Any, shared: Path) -> None:
    script = "cat /proc/self/mountinfo; echo ready; while [ ! -e /data/go ]; do sleep 0.02; done; ls /data/below"
    name = attacks.start(script, volumes=[{"source": f"host:{shared}", "target": "/data"}])
    attacks.wait_for(name, "ready\n")

    subprocess.run(["mount", "-t", "tmpfs", "none", shared / "below"], check=True)
    (shared / "below" / "secret").touch()
    (shared / "go").touch()

    outcome = attacks.end(name)
    table, _, listed = outcome.out.partition("ready\n")
    assert listed == ""
    assert [line for line in table.splitlines() if "shared:" in line or "master:" in line or "propagate_from:" in line] == []


@pytest.mark.needs_root
def test_it_appears_in_a_clone_that_stayed_a_peer(shared: Path, tmp_path: Path) -> None:
    """The positive control: the same mounts, and a copy made as `mount --bind` makes it."""
    subprocess.run(["mount", "--bind", shared, tmp_path], check=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "none", shared / "below"], check=True)
        assert os.path.ismount(tmp_path / "below")
    finally:
        subprocess.run(["umount", "-R", tmp_path], check=True)


def test_what_a_container_mounts_on_a_volume_is_seen_by_nobody_else(attacks: Any) -> None:
    host = attacks.directory("volume")
    volumes = [{"source": f"host:{host}", "target": "/data"}]
    before = Path("/proc/self/mountinfo").read_text()
    mount = "mkdir /tmp/x; mount --make-rshared / ; mount -t tmpfs none /data && touch /data/mine && echo mounted && sleep 60"
    name = attacks.start(["unshare", "-Urm", "sh", "-c", mount], volumes=volumes, capabilities=CAPABLE)
    attacks.wait_for(name, "mounted")

    other = attacks.run("ls /data", volumes=volumes)

    assert os.listdir(host) == []
    assert other.out == ""
    assert Path("/proc/self/mountinfo").read_text() == before
    attacks.kill(name)
