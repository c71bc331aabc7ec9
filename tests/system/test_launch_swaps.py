"""The launch under attack: directories and links change places while something is mounted on them, executed, or taken away.

The swapper exchanges a directory and a link in one system call, as fast as it can (renameat2, RENAME_EXCHANGE). Between any
two looks at a path it may have become the other one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

# Two names that change places until a third one appears. By its number: older C libraries do not know the call.
SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
one, other, stop = (name.encode() for name in sys.argv[1:4])
print("ready", flush=True)
while not os.path.exists(stop):
    for _ in range(100):
        libc.syscall(316, -100, one, -100, other, 2)
"""


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Two paths of the host's change places all the while; the tree they are in may go away."""
    command = [sys.executable, "-I", "-c", SWAP, str(one), str(other), "/no/such/stop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as swapper:
        assert swapper.stdout is not None
        assert swapper.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            swapper.kill()


@pytest.fixture
def precious(attacks: Any) -> Path:
    """A directory of the host's that everybody may write to, with a file in it."""
    path: Path = attacks.directory("precious")
    (path / "file").write_text("x")
    (path / "file").chmod(0o666)
    return path


@pytest.fixture(autouse=True)
def cleared(world: Any) -> Iterator[None]:
    """The directories of a test go with it: the next one makes its own."""
    before = set(Path(world.directory).iterdir())
    yield
    for path in set(Path(world.directory).iterdir()) - before:
        shutil.rmtree(path, ignore_errors=True)


def test_targets_that_change_under_a_launch_lead_to_no_directory_of_the_hosts(
    attacks: Any, precious: Path, rounds: Any, figure: Any
) -> None:
    """A sibling swaps what volumes of the other are mounted on, with a link to a volume that is the host's."""
    swapper = attacks.program(
        "os.makedirs('/data/a/b', exist_ok=True)\nos.symlink('/given', '/data/link')\n" + SWAP,
        "/data/a",
        "/data/link",
        "/data/stop",
    )
    shared = {"source": "shared:data", "target": "/data"}
    attacks.client.launch_group({"name": "race", "tasks": [{"name": "swapper", "command": swapper, "volumes": [shared]}]})
    attacks.wait_for("race.swapper", "ready")
    given = {"source": f"host:{precious}", "target": "/given"}
    inner = [{"source": "tmpfs:1MiB", "target": "/data/a/b/tmp"}, {"source": "shared:other", "target": "/data/a/new/other"}]
    refused = 0
    many = rounds(40, 1000)

    for number in range(many):
        outcome = attacks.run(["/bin/true"], parent="race", name=f"n{number}", volumes=[shared, given, *inner])
        refused += outcome.error is not None
        assert outcome.error is None or outcome.error["code"] == "launch_failed", outcome
        assert outcome.error is None or outcome.error["step"]["kind"] in ("bind", "tmpfs"), outcome
        assert sorted(os.listdir(precious)) == ["file"]

    attacks.client.kill("race", "KILL")
    attacks.end("race")
    figure(launches=many, refused=refused, host_writes=0)
    assert many - refused > 0, "not one launch came through: the race was not run"


def test_a_root_directory_that_changes_under_a_launch_leads_nowhere_else(
    attacks: Any, precious: Path, rounds: Any, figure: Any
) -> None:
    """Somebody who may write to the root directory swaps the places in it while they are mounted on."""
    root = attacks.root("moving")
    (root / "data").mkdir()
    os.chown(root / "data", attacks.world.uid, attacks.world.gid)
    (root / "link").symlink_to("/given")
    volumes = [{"source": "tmpfs:1MiB", "target": "/data/tmp"}, {"source": f"host:{precious}", "target": "/given"}]
    refused = 0
    many = rounds(30, 1000)

    with swapping(root / "data", root / "link"):
        for _ in range(many):
            outcome = attacks.run(["/bin/sh", "-c", "echo > /data/tmp/written"], rootfs=str(root), volumes=volumes)
            refused += outcome.error is not None
            assert outcome.error is None or outcome.error["code"] == "launch_failed", outcome
            assert sorted(os.listdir(precious)) == ["file"]

    figure(launches=many, refused=refused, host_writes=0)
    assert many - refused > 0, "not one launch came through: the race was not run"


def test_whoever_makes_directories_by_path_is_led_to_the_host_by_the_same_swaps(attacks: Any, precious: Path) -> None:
    """The positive control of both races above."""
    root = attacks.directory("moving")
    (root / "data").mkdir()
    (root / "link").symlink_to(precious)

    with swapping(root / "data", root / "link"):
        for number in range(100_000):
            os.makedirs(root / "data" / str(number), exist_ok=True)
            if len(os.listdir(precious)) > 1:
                break

    assert len(os.listdir(precious)) > 1


def test_a_program_that_changes_after_it_was_looked_at_runs_inside_or_not_at_all(
    attacks: Any, world: Any, rounds: Any, figure: Any
) -> None:
    """A parent shares its mounts with its children, and swaps their program with a script that /proc/self/exe interprets."""
    program = (
        "put('/tmp/one', '#!/bin/sh\\nreadlink /proc/self/ns/mnt\\n')\n"
        "put('/tmp/other', '#!/proc/self/exe\\nimport os; print(os.readlink(\"/proc/self/ns/mnt\"))\\n')\n"
        "os.chmod('/tmp/one', 0o755); os.chmod('/tmp/other', 0o755)\nprint(os.readlink('/proc/self/ns/mnt'))\n"
    )
    parent = attacks.start_python(program + SWAP, "/tmp/one", "/tmp/other", "/tmp/stop")
    inside = attacks.text(parent).splitlines()[0]
    ended: dict[str, int] = {}

    for number in range(rounds(30, 1000)):
        outcome = attacks.run(["/tmp/one"], parent=parent, name=f"n{number}", namespaces={"mount": "parent"})
        if outcome.error is not None:
            assert outcome.error["target"] in ("/proc/self/exe", "/tmp/one"), outcome
        else:
            assert outcome.out in ("", f"{inside}\n"), outcome
        how = outcome.error["code"] if outcome.error else f"exit {outcome.code}"
        ended[how] = ended.get(how, 0) + 1

    attacks.kill(parent)
    figure(**ended)
    assert ended.get("exit 0"), ended


def test_a_tree_is_taken_away_while_it_changes_and_only_it(attacks: Any, precious: Path, rounds: Any, figure: Any) -> None:
    """What a container leaves is removed while somebody swaps a directory in it with a link to the host."""
    (precious / "below").mkdir()
    many = rounds(10, 500)

    for _ in range(many):
        name = attacks.start("mkdir -p a/b/c d/e/f; for i in 1 2 3 4 5 6 7 8 9; do > a/$i; > d/$i; done")
        attacks.client.wait(name)
        sandbox = attacks.world.run_dir / f"containers/{name}/sandbox"
        (sandbox / "link").symlink_to(precious)
        with swapping(sandbox / "a", sandbox / "link"):
            attacks.client.remove(name)

        deadline = time.monotonic() + 60
        while sandbox.exists():  # what could not be removed for all the swapping is parked, and tried again
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert sorted(os.listdir(precious)) == ["below", "file"]

    figure(removals=many, strangers_removed=0)


def test_what_a_container_leaves_behind_is_removed_and_nothing_it_points_to(attacks: Any, precious: Path) -> None:
    script = (
        f"ln -s {precious} s; ln -s / r; ln -s ../../../.. up; mkdir -p d/d/d locked; ln -s {precious} d/d/d/s; chmod 0 d/d locked;"
        f"ln -s {precious}/file f; ln -s {precious} /data/s; mkdir /data/x; ln -s /proc/1/root /data/x/y"
    )
    task = {"name": "t", "command": script, "volumes": [{"source": "shared:data", "target": "/data"}]}

    attacks.client.launch_group({"name": "mess", "tasks": [task]})
    attacks.client.wait("mess")
    left = [attacks.world.run_dir / "containers" / place for place in ("mess.t/sandbox", "mess/volumes/data")]
    assert [sorted(os.listdir(place)) for place in left] == [["d", "f", "locked", "r", "s", "up"], ["s", "x"]]
    attacks.client.remove("mess")

    assert not (attacks.world.run_dir / "containers/mess").exists()
    assert not (attacks.world.run_dir / "containers/mess.t").exists()
    assert (sorted(os.listdir(precious)), (precious / "file").read_text()) == (["file"], "x")


def test_whoever_removes_by_path_follows_the_same_swaps_out_of_the_tree(attacks: Any, precious: Path) -> None:
    """The positive control: look whether it is a link, then remove what is in it by its path."""
    tree = attacks.directory("tree")
    (tree / "a").mkdir()
    (tree / "link").symlink_to(precious)

    with swapping(tree / "a", tree / "link"):
        for _ in range(100_000):
            if not (tree / "a").is_symlink() and (tree / "a" / "file").exists():
                (tree / "a" / "file").unlink(missing_ok=True)
            if not (precious / "file").exists():
                break

    assert not (precious / "file").exists()
