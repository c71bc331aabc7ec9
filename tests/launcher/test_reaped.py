"""What keepers write down, and how it is found again: by what nobody else ever has."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mesocosm.kernel.launcher.reaped import MOST_BYTES, NAME, RECORD_BYTES, Reaped, as_record, empty, open_for_writing

TICKS = os.sysconf("SC_CLK_TCK")


class Usage:
    ru_utime, ru_stime, ru_maxrss = 1.5, 0.25, 4096


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def write(directory: int, *records: bytes) -> None:
    fd = open_for_writing(directory)
    for record in records:
        os.write(fd, record)
    os.close(fd)


def born(record: bytes, seconds: float) -> bytes:
    """The same, written so many seconds after boot."""
    return record[:104] + struct.pack("=2q", int(seconds), 0) + record[120:]


@pytest.mark.parametrize("status", [0, 3 << 8, 255 << 8, 9, 15, 6 | 0x80])
def test_a_record_gives_back_what_was_written(directory: int, status: int) -> None:
    write(directory, as_record(100, status, Usage, 7777))
    found = Reaped(directory).find(100, "pidfd:7777")
    assert found is not None
    assert (found.status, found.user_us, found.system_us, found.max_rss_kib) == (status, 1_500_000, 250_000, 4096)


def test_of_two_who_had_the_same_pid_each_is_found_by_its_inode_and_nobody_else_is(directory: int) -> None:
    write(directory, as_record(100, 1 << 8, Usage, 7), as_record(100, 2 << 8, Usage, 8), as_record(101, 3 << 8, Usage, 9))
    reaped = Reaped(directory)
    assert [found and found.status for found in (reaped.find(100, "pidfd:7"), reaped.find(100, "pidfd:8"))] == [1 << 8, 2 << 8]
    assert [reaped.find(100, "pidfd:9"), reaped.find(101, "pidfd:7"), reaped.find(102, "pidfd:7")] == [None] * 3


def test_without_inodes_it_is_the_first_with_that_pid_after_its_birth(directory: int) -> None:
    records = (born(as_record(100, code << 8, Usage, 1), seconds) for code, seconds in ((1, 50), (2, 150), (3, 250)))
    write(directory, *records)
    reaped = Reaped(directory)
    found = [reaped.find(100, f"start:{seconds * TICKS}") for seconds in (40, 60, 200, 260)]
    assert [record and record.status >> 8 for record in found] == [1, 2, 3, None]


def test_whatever_is_no_record_is_passed_over(directory: int) -> None:
    good = as_record(100, 0, Usage, 7)
    write(directory, bytes(RECORD_BYTES), os.urandom(RECORD_BYTES - 4) + bytes(4), good, good[:60])
    assert Reaped(directory).find(100, "pidfd:7") is not None
    assert [Reaped(directory).find(100, birth) for birth in ("", "pidfd:", "pidfd:x", "pidfd:-7")] == [None] * 4


def test_what_comes_later_is_read_and_an_emptied_file_is_begun_again(directory: int, tmp_path: Path) -> None:
    reaped = Reaped(directory)
    assert reaped.find(100, "pidfd:7") is None
    write(directory, as_record(100, 0, Usage, 7), as_record(100, 0, Usage, 8))
    assert reaped.find(100, "pidfd:7") is not None
    empty(str(tmp_path))
    write(directory, as_record(100, 0, Usage, 9))
    assert reaped.find(100, "pidfd:9") is not None
    assert reaped.find(100, "pidfd:7") is None


def test_the_file_is_its_owners_alone_and_records_never_cross_a_page(directory: int, tmp_path: Path) -> None:
    write(directory, as_record(1, 0, Usage, 1))
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    assert len(as_record(1, 0, Usage, 1)) == RECORD_BYTES
    assert os.sysconf("SC_PAGESIZE") % RECORD_BYTES == 0
    assert MOST_BYTES % RECORD_BYTES == 0


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/passwd", path)])
def test_whatever_else_has_its_name_is_put_aside_and_kept(directory: int, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / NAME)
    kind = (tmp_path / NAME).lstat().st_mode
    write(directory, as_record(100, 0, Usage, 7))
    assert Reaped(directory).find(100, "pidfd:7") is not None
    aside = [name for name in os.listdir(tmp_path) if name != NAME]
    assert len(aside) == 1
    assert (tmp_path / aside[0]).lstat().st_mode == kind
