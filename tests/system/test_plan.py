"""A plan is what happens: the same steps in the same words; and making one touches nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

POD = {
    "name": "planned",
    "tasks": [
        {"name": "one", "command": ["sh", "-c", "echo one"], "volumes": [{"source": "shared:data", "target": "/data"}]},
        {
            "name": "two",
            "command": "echo two",
            "env": {"A": "b"},
            "cwd": "/tmp",
            "volumes": [{"source": "shared:data", "target": "/data"}, {"source": "tmpfs:1MiB", "target": "/scratch"}],
        },
    ],
}


def test_the_plan_and_the_run_that_follows_are_equal(world: Any) -> None:
    plan = world.meso("plan", "--json", "-", given=json.dumps(POD))
    assert plan.code == 0, plan.err
    planned = plan.lines[0]

    run = world.run(POD)

    assert run.code == 0, (run.out, run.err)
    for container in planned["containers"]:
        lines = [line for line in run.lines if line["id"] == container["id"]]
        effects = [bare(line) for line in lines if line["type"] == "effect"]
        steps = [bare(line) for line in lines if line["type"] == "step"]
        assert effects == container["effects"]
        assert steps == container["setup"]
        assert len(steps) > 5
    assert {line["id"] for line in run.lines if line["type"] == "step"} == {each["id"] for each in planned["containers"]}


def bare(line: dict[str, Any]) -> dict[str, Any]:
    """An event line without what every event has: the E or S it carries."""
    return {key: value for key, value in line.items() if key not in ("v", "seq", "time", "id", "type")}


def test_a_plan_is_the_same_bytes_every_time(world: Any) -> None:
    first, second = (world.meso("plan", "--json", "-", given=json.dumps(POD)) for _ in range(2))

    assert first.out == second.out
    assert first.code == 0


def test_the_agent_plans_as_the_command_does(world: Any) -> None:
    plan = world.meso("plan", "--json", "-", given=json.dumps(POD))
    world.meso("ps")  # starts the agent
    code = (
        "import json, sys; from mesocosm.kernel.client import connect\n"
        f"print(json.dumps(connect({str(world.run_dir / 'agent.sock')!r}).call('PLAN_GROUP', group=json.load(sys.stdin))))"
    )
    command = world.as_user(world.python, "-c", code)
    asked = subprocess.run(command, input=json.dumps(POD), capture_output=True, text=True, env=dict(world.environment), check=True)

    assert json.loads(asked.stdout) == plan.lines[0]


# System calls that change something outside the process, and opens for writing.
_CHANGES = (
    "mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat,renameat2,link,linkat,symlink,symlinkat,mknod,mknodat,chmod,fchmod,fchmodat,"
    "chown,fchown,fchownat,lchown,truncate,ftruncate,mount,umount2,pivot_root,unshare,setns,fsopen,fsmount,move_mount,open_tree,"
    "bind,connect,kill,tkill,pidfd_send_signal,sethostname,setxattr,utimensat,clone3,fork,vfork"
)


def test_planning_touches_nothing(world: Any, tmp_path: Any) -> None:
    """Under a tracer: no file is opened for writing, nothing is made, mounted, signalled, connected to or forked."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    pod = tmp_path / "pod.json"
    pod.write_text(json.dumps(POD))
    trace = tmp_path / "trace"
    before = sorted(str(path) for path in world.directory.rglob("*"))

    done = subprocess.run(
        ["strace", "-f", "-o", str(trace), "-e", f"trace={_CHANGES},open,openat,openat2,creat", *world.command("plan", str(pod))],
        env=dict(world.environment), capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    lines = [line for line in trace.read_text().splitlines() if "(" in line]
    opens = [line for line in lines if re.search(r"\bopen(at2?)?\(", line)]
    assert opens, "the tracer saw nothing at all"
    changed = [line for line in lines if line not in opens and not _FAILED_PROBE.search(line)]
    changed += [line for line in opens if re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", line) and "/dev/null" not in line]
    assert changed == []
    assert sorted(str(path) for path in world.directory.rglob("*")) == before


# The probe asks whether system calls exist by calling them with what they must refuse.
_FAILED_PROBE = re.compile(r"= -1 (EBADF|EFAULT|EINVAL|ENOSYS|ENOENT)")


def test_a_plan_leaves_the_machine_as_it_was(canary: Any) -> None:
    before = canary.census()

    canary.world.meso("plan", "-", given=json.dumps(POD))

    assert left_over(before) == []
