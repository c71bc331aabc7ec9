"""The pod's own program: a valid ELF file, sealed, small, and a PID 1 that keeps no zombies."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesocosm.kernel.launcher import pause
from mesocosm.kernel.linux import constants as c

pytestmark = pytest.mark.skipif(c.ARCH != "x86_64", reason=f"this machine cannot: there is no pause program for {c.ARCH}")
DEADLINE = 5.0


@pytest.fixture
def sealed() -> Iterator[int]:
    """A descriptor of the program."""
    fd = pause.sealed()
    yield fd
    os.close(fd)


def test_it_is_an_elf_file_with_one_segment_that_is_never_writable() -> None:
    image = pause.elf()
    kind, machine, version, entry, programs, sections = struct.unpack_from("<HHIQQQ", image, 16)
    header_size, program_size, count = struct.unpack_from("<HHH", image, 52)
    assert image[:7] == b"\x7fELF\x02\x01\x01"
    assert (kind, machine, version, sections) == (2, 62, 1, 0)
    assert (header_size, program_size, count) == (64, 56, 1)
    load, flags, offset, address, _, in_file, in_memory, align = struct.unpack_from("<IIQQQQQQ", image, programs)
    assert (load, flags, offset) == (1, 5, 0)
    assert in_file == in_memory == len(image)
    assert address % align == offset % align
    assert address + 64 + 56 == entry < address + in_file


def test_the_code_points_at_its_own_data() -> None:
    image = pause.elf()
    start = struct.unpack_from("<Q", image, 24)[0] - 0x400000
    lea = image.index(b"\x48\x8d\x35", start)
    distance = struct.unpack_from("<i", image, lea + 3)[0]
    assert struct.unpack_from("<QQQQ", image, lea + 7 + distance) == (1, 0, 0, 0)  # sa_handler = SIG_IGN
    loop = image.index(b"\xeb", start)
    again = image[loop + 2 + struct.unpack_from("<b", image, loop + 1)[0] :]
    assert again.startswith(b"\xb8" + struct.pack("<I", 34) + b"\x0f\x05\xeb")  # mov eax, 34; syscall; and so on


def test_nobody_can_change_it_any_more(sealed: int) -> None:
    with pytest.raises(OSError):
        os.write(sealed, b"x")
    with pytest.raises(PermissionError):  # not even root: F_SEAL_WRITE
        os.write(os.open(f"/proc/self/fd/{sealed}", os.O_WRONLY | os.O_CLOEXEC), b"x")
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{sealed}", 0)
    with pytest.raises(PermissionError):
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, 0)
    assert not os.get_inheritable(sealed)


def test_nobody_can_read_it_so_whoever_executes_it_may_not_be_traced(sealed: int) -> None:
    assert os.fstat(sealed).st_mode & 0o777 == 0o111


def start(fd: int) -> int:
    """Runs it as a child of ours."""
    return os.posix_spawn(f"/proc/self/fd/{fd}", ["pause"], {})


def wait_for(path: str, pattern: str) -> str:
    """The contents of a file of /proc once they match; there is nothing to wait on for these."""
    text = ""
    for _ in range(int(DEADLINE / 0.005)):
        text = Path(path).read_text()
        if re.search(pattern, text, re.M):
            return text
        select.select([], [], [], 0.005)
    raise AssertionError(f"{path} never matched {pattern}:\n{text}")


def test_it_runs_and_waits_in_16_kib_of_memory(sealed: int) -> None:
    pid = start(sealed)
    try:
        status = wait_for(f"/proc/{pid}/status", r"^SigIgn:\s*[0-9a-f]{11}[13579bdf][0-9a-f]{4}$")  # bit 16: SIGCHLD
        wait_for(f"/proc/{pid}/wchan", "pause")
        assert "SigCgt:\t0000000000000000" in status
        dirty = re.findall(r"^Private_Dirty:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        assert int(dirty[0]) <= 16
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_there_is_none_for_a_machine_we_have_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pause, "ARCH", "riscv64")
    with pytest.raises(OSError, match="no pause program for riscv64"):
        pause.elf()
