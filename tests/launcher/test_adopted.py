"""Containers of an earlier launcher that cannot be taken over: nothing of them is kept, and they may be given again."""

from __future__ import annotations

import errno
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.launcher.adopted import Adopted
from mesocosm.kernel.launcher.births import Births
from mesocosm.kernel.linux.pidfds import identity


class Poll:
    """An epoll that has no room once."""

    def __init__(self, poll: select.epoll) -> None:
        self.poll, self.full = poll, True

    def register(self, fd: int, events: int) -> None:
        """As select.epoll.register."""
        if self.full:
            self.full = False
            raise OSError(errno.ENOSPC, "max_user_watches")
        self.poll.register(fd, events)


@pytest.fixture
def line() -> Iterator[dict[str, Any]]:
    """What is said of a container whose pidfd is its `fd`."""
    with subprocess.Popen(["sleep", "600"]) as process:
        fd = os.pidfd_open(process.pid)
        yield {"id": "a", "barrier": "b", "pid": process.pid, "birth": identity(fd, process.pid), "note": b"", "fd": fd}
        os.close(fd)
        process.kill()


@pytest.fixture
def births() -> Iterator[Births]:
    with select.epoll() as poll:
        yield Births(poll)


def test_one_that_cannot_be_watched_is_not_known_and_may_be_given_again(
    births: Births, line: dict[str, Any], tmp_path: Path
) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    with select.epoll() as poll:
        adopted = Adopted(Poll(poll), births, directory)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="max_user_watches"):
            adopted.adopt(line, line["fd"])
        assert births.by_id == {}
        assert not adopted.owns(line["fd"])
        assert adopted.adopt(line, line["fd"])
        assert adopted.owns(line["fd"])
        assert births.by_id["a"].pidfd == line["fd"]
    os.close(directory)


@pytest.mark.parametrize("other", ["another process", "a file"])
def test_a_descriptor_that_is_something_else_by_now_is_refused(
    births: Births, line: dict[str, Any], tmp_path: Path, other: str
) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    found = os.pidfd_open(os.getpid()) if other == "another process" else os.open("/dev/null", os.O_RDONLY)
    with select.epoll() as poll:
        adopted = Adopted(poll, births, directory)
        with pytest.raises(ProcessLookupError, match="not that of a"):
            adopted.adopt(line, found)
        assert births.by_id == {}
        assert adopted.adopt(line, line["fd"])
    os.close(found)
    os.close(directory)
