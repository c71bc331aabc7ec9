"""Logs and the kernel's own kinds, on real files."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path

import pytest
import trio

from mesocosm.kernel.contracts import Descriptor, EffectContext, HostFacts
from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.errors import ConflictError, LaunchError, NotFoundError, SpecError
from mesocosm.kernel.core.plan import ContainerPlan
from mesocosm.kernel.runtime.kinds import DirectoryKind, LogKind
from mesocosm.kernel.runtime.logs import read_log
from mesocosm.kernel.runtime.world import Cell, Group

CONTEXT = EffectContext(HostFacts(), "x")


def cell() -> Cell:
    """A container that lives."""
    return Cell(ContainerSpec(id="x"), ContainerPlan("x", {}, (), ()), Group("x", "b", "e"))


async def test_a_follower_reads_until_the_container_is_dead_and_all_is_read(tmp_path: Path) -> None:
    living, read = cell(), bytearray()
    log = tmp_path / "stdout"
    log.write_bytes(b"before ")

    async def follow() -> None:
        async for offset, data, _ in read_log(str(tmp_path), living, "stdout", 3, follow=True):
            assert offset == 3 + len(read)
            read.extend(data)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await trio.sleep(0.02)
            with log.open("ab") as file:
                file.write(b"while " * 20_000)
            await trio.sleep(0.05)
            with log.open("ab") as file:
                file.write(b"end")
            living.dead.set()
    assert bytes(read) == b"ore " + b"while " * 20_000 + b"end"


async def test_without_follow_it_ends_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "stderr").write_bytes(b"x")
    assert [piece async for piece in read_log(str(tmp_path), cell(), "stderr", 0, follow=False)] == [(0, b"x", 0)]


async def test_output_that_cannot_be_read_now_is_not_told_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdout").write_bytes(b"x")
    for place, name in (("open", "EMFILE"), ("lseek", "EIO")):
        with monkeypatch.context() as failing:
            failing.setattr(os, place, partial(fail, getattr(errno, name)))
            with pytest.raises(ConflictError, match="cannot be read") as told:
                [piece async for piece in read_log(str(tmp_path), cell(), "stdout", 0, follow=False)]
        assert told.value.fields["errno"] == name
    assert [piece async for piece in read_log(str(tmp_path), cell(), "stdout", 0, follow=False)] == [(0, b"x", 0)]


def fail(number: int, *_: object, **__: object) -> None:
    """A system call that does."""
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("stream", "offset", "error"), [("stdin", 0, SpecError), ("stdout", -1, SpecError), ("stdout", 0, NotFoundError)]
)
async def test_what_cannot_be_read_is_said(tmp_path: Path, stream: str, offset: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        async for _ in read_log(str(tmp_path), cell(), stream, offset, follow=False):
            pass


async def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "stdout").symlink_to("/etc/passwd")
    with pytest.raises(NotFoundError):
        async for _ in read_log(str(tmp_path), cell(), "stdout", 0, follow=False):
            pass


def test_directories_have_exactly_their_mode_and_are_found_again(tmp_path: Path) -> None:
    path = str(tmp_path / "d")
    for _ in range(2):
        assert DirectoryKind().do({"path": path, "mode": 0o1777}, CONTEXT) == {}
    assert os.stat(path).st_mode & 0o7777 == 0o1777
    assert list(DirectoryKind().find(str(tmp_path))) == [str(tmp_path), path]
    os.symlink("/tmp", tmp_path / "link")
    with pytest.raises(LaunchError, match=r"mkdir .*/link failed: file exists"):
        DirectoryKind().do({"path": str(tmp_path / "link"), "mode": 0o755}, CONTEXT)


def test_a_log_is_appended_to_and_never_through_a_link(tmp_path: Path) -> None:
    for text in (b"a", b"b"):
        fd = LogKind().do({"path": str(tmp_path / "stdout")}, CONTEXT)["fd"]
        assert type(fd) is Descriptor
        os.write(fd, text)
        os.close(fd)
    assert (tmp_path / "stdout").read_bytes() == b"ab"
    (tmp_path / "stderr").symlink_to(tmp_path / "stdout")
    with pytest.raises(LaunchError, match=r"open .*/stderr failed: too many levels of symbolic links"):
        LogKind().do({"path": str(tmp_path / "stderr")}, CONTEXT)
