"""A group starts whole or not at all: every way in which one member cannot start, and what is left then (nothing)."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system


def members(world: Any, bad: dict[str, Any]) -> dict[str, Any]:
    """Two members that leave a mark when they run, around one that cannot start."""
    return {
        "name": "broken",
        "tasks": [
            {"name": "first", "command": "echo ran; sleep 30"},
            {"name": "bad", "command": ["true"]} | bad,
            {"name": "last", "command": "echo ran; sleep 30"},
        ],
    }


def volume(world: Any, file: str, content: bytes, mode: int = 0o755) -> list[dict[str, Any]]:
    """A host directory with one file, mounted at /data."""
    directory = Path(world.directory) / "volume"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o755)
    (directory / file).write_bytes(content)
    (directory / file).chmod(mode)
    return [{"source": f"host:{directory}", "target": "/data"}]


def missing_program(world: Any) -> dict[str, Any]:
    return {"command": ["/no/such/program"]}


def missing_on_path(world: Any) -> dict[str, Any]:
    return {"command": ["no-such-program"]}


def not_executable(world: Any) -> dict[str, Any]:
    return {"command": ["/data/file"], "volumes": volume(world, "file", b"#!/bin/sh\n", 0o644)}


def missing_interpreter(world: Any) -> dict[str, Any]:
    return {"command": ["/data/script"], "volumes": volume(world, "script", b"#!/no/such/interpreter\n")}


def missing_loader(world: Any) -> dict[str, Any]:
    program = Path("/bin/true").read_bytes().replace(b"/lib64/ld-linux-x86-64.so.2", b"/lib64/no-such-loader.so.2\0")
    return {"command": ["/data/program"], "volumes": volume(world, "program", program)}


def garbage(world: Any) -> dict[str, Any]:
    return {"command": ["/data/garbage"], "volumes": volume(world, "garbage", os.urandom(64).replace(b"#!", b"xx"))}


def absent_volume(world: Any) -> dict[str, Any]:
    return {"volumes": [{"source": "host:/no/such/directory", "target": "/data"}]}


def missing_cwd(world: Any) -> dict[str, Any]:
    return {"cwd": "/no/such/directory"}


# (how the member is broken, exit code, errno, what the error points at)
WAYS: list[tuple[Callable[[Any], dict[str, Any]], int, str, str]] = [
    (missing_program, 127, "ENOENT", "/no/such/program"),
    (missing_on_path, 127, "ENOENT", "no-such-program"),
    (not_executable, 126, "EACCES", "/data/file"),
    (missing_interpreter, 127, "ENOENT", "/no/such/interpreter"),
    (missing_loader, 127, "ENOENT", "/lib64/no-such-loader.so.2"),
    (garbage, 126, "ENOEXEC", "/data/garbage"),
    (absent_volume, 125, "ENOENT", "/no/such/directory"),
    (missing_cwd, 125, "ENOENT", "/no/such/directory"),
]


@pytest.mark.parametrize(("way", "code", "errno", "target"), WAYS, ids=[way[0].__name__ for way in WAYS])
def test_a_member_that_cannot_start_leaves_nothing_and_nobody_ran(
    canary: Any, way: Callable[[Any], dict[str, Any]], code: int, errno: str, target: str
) -> None:
    world = canary.world
    pod = members(world, way(world))
    before = canary.census()

    answer = world.run(pod)

    assert answer.code == code, (answer.out, answer.err)
    end = answer.lines[-1]
    assert end["type"] == "end"
    assert end["state"] == "ROLLED_BACK"
    error = answer.error
    assert error["errno"] == errno, error
    assert error["target"] == target, error
    assert error["id"] == "broken.bad"
    assert error["plugin"]
    assert error["step"]["stage"] if way is not absent_volume else error["step"]["kind"] == "mount_tree"
    assert error["message"]
    assert not [line for line in answer.lines if line["type"] in ("committed", "started", "output")]
    assert world.meso("rm", "broken").code == 0
    assert left_over(before) == []
    canary.assert_untouched()


def test_a_limit_that_cannot_be_set_refuses_the_group(canary: Any) -> None:
    before = canary.census()

    answer = canary.world.run(members(canary.world, {"limits": {"nofile": 2**40}}))

    assert answer.code in (2, 125), (answer.out, answer.err)
    assert "nofile" in json.dumps(answer.error)
    assert answer.error["have"]
    assert answer.error["need"]
    canary.world.meso("rm", "broken")
    assert left_over(before) == []
    canary.assert_untouched()


def _is_gone(group: Path) -> bool:
    if group.exists():
        with contextlib.suppress(OSError):
            group.rmdir()
    return not group.exists()


@pytest.mark.needs_root
def test_a_name_whose_control_groups_are_somebody_elses_conflicts_and_leaves_them_alone(canary: Any) -> None:
    victim = {"name": "victim", "tasks": [{"name": "t", "command": "true"}]}
    plan = canary.world.meso("plan", "--json", "-", given=json.dumps(victim))
    groups = [
        Path(effect["args"]["path"]) for effect in plan.lines[0]["containers"][0]["effects"] if effect["kind"].startswith("cgroup")
    ]
    assert groups
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        for group in groups:
            group.mkdir(parents=True)
            (group / "cgroup.procs").write_text(str(sleeper.pid))

        answer = canary.world.run(victim)

        assert answer.error["code"] == "conflict", answer.error
        assert "in use" in answer.error["message"]
        assert sleeper.poll() is None
        assert all(group.exists() for group in groups)
    finally:
        sleeper.kill()
        sleeper.wait()
        deadline = time.monotonic() + 30
        while left := [group for group in groups if not _is_gone(group)]:  # the kernel takes its time to notice that it is empty
            assert time.monotonic() < deadline, left
            time.sleep(0.02)
    canary.world.meso("rm", "victim")
    assert canary.world.run(victim).code == 0
    canary.world.meso("rm", "victim")
    canary.assert_untouched()


def test_explain_names_the_step_of_a_group_that_was_rolled_back(canary: Any) -> None:
    canary.world.run(members(canary.world, missing_program(canary.world)))

    answer = canary.world.meso("explain", "broken")

    assert answer.code == 0, answer.err
    for word in ("/no/such/program", "ENOENT", "check", "program"):
        assert word in answer.out, answer.out
    assert canary.world.meso("rm", "broken").code == 0


def test_all_members_pass_the_barrier_together(canary: Any) -> None:
    """No member's first instruction comes before the last one's last preparation: `committed` precedes every `started`."""
    names = [f"t{number}" for number in range(10)]
    answer = canary.world.run({"name": "ten", "tasks": [{"name": name, "command": "date +%s.%N"} for name in names]})

    assert answer.code == 0, (answer.out, answer.err)
    kinds = [line["type"] for line in answer.lines]
    committed = kinds.index("committed")
    assert kinds.count("staged") == 11
    assert max(index for index, kind in enumerate(kinds) if kind == "staged") < committed
    assert min(index for index, kind in enumerate(kinds) if kind == "started") > committed
    assert canary.world.meso("rm", "ten").code == 0


def test_the_sandbox_of_a_member_can_be_entered_by_nobody_else(canary: Any) -> None:
    directory = Path(canary.world.run_dir) / "containers" / "canary.bird"

    assert stat.S_IMODE(directory.stat().st_mode) & 0o007 == 0


def test_a_group_of_two_hundred_starts_whole(canary: Any) -> None:
    tasks = [{"name": f"t{number}", "command": ["true"]} for number in range(200)]

    answer = canary.world.run({"name": "many", "tasks": tasks})

    assert answer.code == 0, (answer.out[-2000:], answer.err)
    assert len([line for line in answer.lines if line["type"] == "started"]) == 201
    assert canary.world.meso("rm", "many").code == 0


def test_a_file_can_be_a_volume_where_the_view_has_nothing(canary: Any) -> None:
    volumes = volume(canary.world, "letter", b"hello\n", 0o644)
    volumes = [{"source": volumes[0]["source"] + "/letter", "target": "/letter", "read_only": True}]

    answer = canary.world.run(
        {"name": "post", "executor": "command", "tasks": [{"name": "t", "command": "cat /letter", "volumes": volumes}]}
    )

    assert answer.code == 0, (answer.out, answer.err)
    assert [line["data"] for line in answer.lines if line["type"] == "output"] == ["hello\n"]
    assert canary.world.meso("rm", "post").code == 0


def test_nothing_is_made_inside_a_directory_of_the_host(canary: Any) -> None:
    volumes = volume(canary.world, "file", b"")
    inside = [*volumes, {"source": "tmpfs:1MiB", "target": "/data/new"}]

    answer = canary.world.run(
        {"name": "nosy", "executor": "command", "tasks": [{"name": "t", "command": "true", "volumes": inside}]}
    )

    assert answer.code == 125, (answer.out, answer.err)
    assert sorted(path.name for path in Path(volumes[0]["source"].removeprefix("host:")).iterdir() if path.is_dir()) == []
    assert canary.world.meso("rm", "nosy").code == 0
