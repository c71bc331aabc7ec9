"""A directory as a container's root: it sees that and nothing else of the host, and leaves it as it was."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def root(world: Any) -> Path:
    """A directory with a shell, its libraries and one file."""
    directory = Path(world.directory) / "root"
    needed = subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True, check=True).stdout
    for file in ["/bin/sh", *re.findall(r"(/\S+) \(0x", needed)]:
        copy = directory / file.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (directory / "file").write_text("below\n")
    for path in (world.directory, directory, *directory.rglob("*")):
        path.chmod(0o755)
    return directory


def run(world: Any, root: Path, script: str, **fields: Any) -> tuple[int, dict[str, str]]:
    """Exit code and output by stream."""
    task = {"name": "t", "command": ["/bin/sh", "-c", script], "rootfs": str(root), **fields}
    answer = world.run({"name": "rooted", "tasks": [task]})
    texts: dict[str, str] = {"stdout": "", "stderr": ""}
    for line in answer.lines:
        if line["type"] == "output":
            texts[line["stream"]] += line["data"]
    assert world.meso("rm", "rooted").code == 0, answer.err
    return answer.code, texts


def test_it_is_all_of_the_host_that_is_there(world: Any, root: Path) -> None:
    code, texts = run(world, root, "echo /*; read line < /file; echo $line")

    assert code == 0, texts
    listed, line = texts["stdout"].splitlines()
    own = {f"/{path.name}" for path in root.iterdir()}
    assert set(listed.split()) == own | {"/dev", "/proc", "/sandbox", "/sys"}
    assert line == "below"


def test_what_is_written_goes_with_the_container(world: Any, root: Path) -> None:
    before = sorted(root.rglob("*"))

    code, texts = run(world, root, "echo new > /new && read line < /new && echo $line")

    assert (code, texts["stdout"]) == (0, "new\n"), texts
    assert sorted(root.rglob("*")) == before
    assert run(world, root, "test -e /new")[0] == 1


def test_one_that_is_read_only_cannot_be_written(world: Any, root: Path) -> None:
    code, texts = run(world, root, "echo new > /new", read_only=True)

    assert code != 0
    assert "Read-only" in texts["stderr"]
