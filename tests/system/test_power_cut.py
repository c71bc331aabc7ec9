"""The power fails in the middle of a busy run: what was promised is there, what ran is closed once, and the disk is sound.

What is simulated: a guest is killed (SIGKILL of its kernel) whose state is on an ext4 file system. All that it had not written to
its disk is gone, as from memory; the disk itself keeps what it was given, so a disk that loses or reorders what was not flushed is
not simulated. That something is lost without fsync is the last test here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.guest, pytest.mark.slow]
GUEST = Path(__file__).parent / "guest"
BUSY = [sys.executable, "-B", str(GUEST / "busy.py")]
IMPORT_ROOT = Path(__file__).resolve().parents[2] / "contrib" / "import-root"
LONGEST = 6.0  # seconds that a guest is busy before its power fails


def load(name: str) -> Any:
    """tests/system/guest/NAME.py as a module."""
    full = f"mesocosm_guest_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, GUEST / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty ext4 file system."""
    if not shutil.which("mke2fs") or not shutil.which("e2fsck"):
        pytest.skip("no e2fsprogs: apt-get install e2fsprogs")
    return made(tmp_path / "disk")


def made(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(48 * 2**20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(path)], check=True, capture_output=True)
    return path


def boot(disk: Path, options: str) -> Any:
    """A guest with the disk mounted, if it can be."""
    uml = load("uml")
    try:
        guest = uml.Guest(memory=384, disk=disk)
    except uml.NoGuestError as missing:
        pytest.skip(f"no guest: {missing}")
    guest.run(["sh", "-c", f"mkdir -p /disk && mount -t ext4 -o {options} /dev/ubda /disk"]).check()
    return guest


def one_cut(disk: Path, seed: int) -> dict[str, int]:
    """A busy run that is cut, and everything that must be so afterwards; what there was to lose."""
    chance = random.Random(seed)
    options = chance.choice(["data=ordered", "data=writeback", "data=journal"])
    environment = {"PYTHONPATH": f"{IMPORT_ROOT}:{os.pathsep.join(path for path in sys.path if path.endswith('-packages'))}"}
    moment = chance.uniform(0.2, LONGEST)
    print(f"seed {seed}: {options}, cut after {moment:.2f} s")
    guest = boot(disk, options)
    try:
        guest.run(["sh", "-c", 'nohup "$@" >/run/busy 2>&1 &', "sh", *BUSY, str(seed)], env=environment).check()
        deadline = time.monotonic() + 120
        while "READY" not in guest.said():
            assert time.monotonic() < deadline, guest.said() + guest.run(["cat", "/run/busy"]).out
            time.sleep(0.05)
        time.sleep(moment)
        guest.cut_power()
        promised = promises(guest.said())
    finally:
        guest.stop()

    guest = boot(disk, options)
    try:
        found = json.loads(guest.run([*BUSY, "check"], env=environment, timeout=240).check())
        guest.run(["umount", "/disk"]).check()
        guest.run(["sync"]).check()
    finally:
        guest.stop()

    checked = subprocess.run(["e2fsck", "-f", "-n", str(disk)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    lines = {(line["id"], line["life"]): line for line in found["first"]["lines"]}
    assert len(lines) == len(found["first"]["lines"]), "told twice"
    assert found["first"]["notes"] == [], found["log"]
    for line in promised:
        kept = lines.get((line["id"], line["life"]))
        assert kept is not None, f"promised and lost: {line}; {found['log']}"
        assert kept["started"] == line["started"] or line["started"] is None
        if line["state"] == "DEAD":
            assert kept == line
        elif kept["wait"]["reason"] == "rebooted":
            assert kept["error"] is None
    assert {line["state"] for line in lines.values()} <= {"DEAD"}, "closed, all of them"
    lives: Counter[str] = Counter(line["id"] for line in lines.values())
    assert {found_id: max(life for name, life in lines if name == found_id) for found_id in lives} == lives, "no gaps"
    again = [line for line in found["second"]["lines"] if not line["id"].startswith("after1")]
    assert again == found["first"]["lines"], "closed once"
    assert set(found["files"]) <= {"agent.lock", "history.db", "history.db-wal", "history.db-shm", "history.db.lock"}
    assert found["launched"] == "RUNNING"
    rebooted = sum(line["wait"]["reason"] == "rebooted" for line in lines.values())
    return {"promised": len(promised), "kept": len(lines), "rebooted": rebooted}


def promises(said: str) -> list[dict[str, Any]]:
    """The lines that were printed whole."""
    marked = [line for line in said.split("\n")[:-1] if "PROMISED " in line]
    return [json.loads(line.partition("PROMISED ")[2]) for line in marked]


def test_what_was_promised_survives_a_power_cut_at_any_moment(
    image: Path, rounds: Callable[[int, int], int], figure: Callable[..., None]
) -> None:
    first = int(os.environ.get("MESOCOSM_SEED", time.time_ns() % 10**6))
    totals: Counter[str] = Counter()
    cuts = rounds(2, 50)
    for seed in range(first, first + cuts):
        totals.update(one_cut(made(image), seed))

    figure(cuts=cuts, first=first, **totals)
    assert totals["promised"] > 0


def test_what_was_not_synced_is_lost_by_a_power_cut(image: Path) -> None:
    """The control: such a cut takes away what nobody has synced, and leaves what somebody has."""
    guest = boot(image, "data=ordered,commit=300")
    try:
        guest.run(["sh", "-c", "echo kept > /disk/kept; sync; echo lost > /disk/lost"]).check()
        guest.cut_power()
    finally:
        guest.stop()
    guest = boot(image, "data=ordered")
    try:
        listed = guest.run(["ls", "/disk"]).check().split()
    finally:
        guest.stop()

    assert "kept" in listed
    assert "lost" not in listed
