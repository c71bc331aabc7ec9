"""What a test of audits plants on the machine, beside what is mesocosm's: how it looks now, and how it is taken away again."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesocosm.kernel.linux import procfs


class Garden:
    """What has been planted: how it looks now, and how it is taken away again."""

    def __init__(self, world: Any, directory: Path) -> None:
        self.world, self.directory = world, directory
        self.targets: set[str] = set()
        self._looks: list[Callable[[], object]] = []
        self._removals: list[Callable[[], object]] = []

    def plant(self, target: str, look: Callable[[], object], remove: Callable[[], object]) -> None:
        """Something that an audit has to call `target`."""
        self.targets.add(target)
        self._looks.append(look)
        self._removals.append(remove)

    def snapshot(self) -> list[object]:
        """All of it as it is."""
        return [look() for look in self._looks]

    def clear(self) -> None:
        """Takes all of it away, the last first."""
        while self._removals:
            self._removals.pop()()

    def process(self, *argv: str, into: Path | None = None) -> procfs.Process:
        """A process of nobody's, in a control group of ours if one is named."""
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        if into is not None:
            (into / "cgroup.procs").write_text(str(child.pid))
        deadline = time.monotonic() + 30
        while (found := procfs.process(child.pid)) is None or found.name == Path(sys.executable).name:
            assert time.monotonic() < deadline
            time.sleep(0.01)

        def end() -> None:
            child.kill()
            child.wait()

        self.plant(f"{child.pid} ({found.name})", lambda: (procfs.is_same(found), procfs.groups_of(child.pid)), end)
        return found

    def group(self, path: Path) -> Path:
        """A control group."""
        path.mkdir()
        self.plant(str(path), lambda: (path.stat().st_ino, (path / "cgroup.procs").read_text()), lambda: until_removed(path))
        return path

    def entry(self, path: Path, content: str = "somebody's") -> None:
        """A file; its directory is made."""
        top = path if path.parent.exists() else path.parent
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        self.plant(str(top), lambda: (path.stat().st_ino, path.read_text()), lambda: remove(top))

    def mount(self, point: Path) -> None:
        """A file system of somebody's."""
        subprocess.run(["mount", "-t", "tmpfs", "somebody", str(point)], check=True)
        self.plant(
            str(point),
            lambda: [mount for mount in procfs.mounts_of() if mount.point == str(point)],
            lambda: subprocess.run(["umount", str(point)], check=True),
        )


def remove(path: Path) -> None:
    """A file or a tree."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def until_removed(path: Path) -> None:
    """A control group whose last process is on its way out."""
    deadline = time.monotonic() + 10
    while True:
        try:
            path.rmdir()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return
