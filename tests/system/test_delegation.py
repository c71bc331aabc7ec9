"""A service with Delegate=yes starts its agent in the very group that is delegated; limits work from there, too."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


@pytest.fixture
def service(world: Any) -> Any:
    """A delegated group that nothing stands in, as a service manager makes one; the world's commands do not run there."""
    if world.cgroup is None:
        pytest.skip("this machine cannot: cgroup v2 with delegation is for the guest's ordinary user")
    group = Path(f"{world.cgroup}-service")
    group.mkdir()
    for path in (group, *(group / f"cgroup.{name}" for name in ("procs", "subtree_control", "threads"))):
        os.chown(path, world.uid, world.gid)
    yield group
    (group / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 10
    while group.exists():
        assert time.monotonic() < deadline, f"{group} cannot be removed"
        with contextlib.suppress(OSError):
            for directory in [*sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True), group]:
                directory.rmdir()


def test_an_agent_that_stands_in_its_delegated_group_makes_room(world: Any, service: Path) -> None:
    words = ["setpriv", f"--reuid={world.uid}", f"--regid={world.gid}", "--clear-groups", *world.command("agent")]
    agent = subprocess.Popen(
        ["sh", "-c", f'echo $$ > {service}/cgroup.procs && exec "$@"', "sh", *words],
        env=dict(world.environment), cwd="/", text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    world.children.append(agent)
    assert "serves" in agent.stderr.readline()

    hog = {"name": "hog", "command": ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"], "resources": {"memory": "16MiB"}}
    answer = world.run({"name": "hog", "executor": "command", "tasks": [hog]})

    assert answer.code == 137, (answer.out[-2000:], answer.err)
    assert answer.lines[-1]["containers"]["hog"]["reason"] == "memory"
    assert [path.name for path in service.iterdir() if path.name.endswith("-agent")]
    assert (service / "cgroup.procs").read_text() == ""
    assert world.meso("agent", "--stop").code == 0
    agent.communicate(timeout=30)
