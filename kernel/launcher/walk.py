"""Walkers: what runs a linked table in the cloned child.

Two of them, which the same tests hold to the same behaviour:

* `walk_in_python`, the reference: works on every machine;
* `Stub`, a few hundred bytes of machine code (x86-64), which touches no page of the interpreter in the child and so
  spares the copying of some thirty pages per container. Its listing is `stub.S`; the bytes are mapped from the
  installed file, readable and executable and never writable.

The first row is a clone that returns to the caller in the parent (RETURN_IF_ANY). In the child neither ever
returns: the last row is an execve, and everything that fails on the way ends the process with code 126 after
a RECORD on the status descriptor.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

from mesocosm.kernel.launcher.link import Linked
from mesocosm.kernel.launcher.table import (
    HEAD_BYTES,
    JUMP_IF_FAIL,
    JUMP_IF_OK,
    JUMP_IF_ZERO,
    LEAVE_IF_PARENT,
    OK_ANY,
    OK_EQUAL,
    RECORD,
    RETURN_IF_ANY,
    ROW_BYTES,
)
from mesocosm.kernel.linux.constants import ARCH, SYS
from mesocosm.kernel.linux.libc import address_of, function_at, get_errno, raw

_ROW = struct.Struct("=10q")
_WORD = struct.Struct("=q")
_INDIRECT = 0x3F00
Walker = Callable[[Linked, int], int]


def walk_in_python(linked: Linked, status: int) -> int:
    """Runs the table; in the parent: the pid of the clone, or minus the errno. `status` is the child's descriptor."""
    buffer, base = linked.buffer, linked.address
    row, rows = 0, linked.rows
    while row < rows:
        number, a0, a1, a2, a3, a4, a5, out, expect, flags = _ROW.unpack_from(buffer, HEAD_BYTES + row * ROW_BYTES)
        if flags & _INDIRECT:
            words = [a0, a1, a2, a3, a4, a5]
            for index in range(6):
                if flags >> (8 + index) & 1:
                    words[index] = _WORD.unpack_from(buffer, words[index] - base)[0]
            a0, a1, a2, a3, a4, a5 = words
        result = raw(number, a0, a1, a2, a3, a4, a5)
        if result < 0:
            result = -get_errno()
        if out:
            _WORD.pack_into(buffer, out - base, result)
        if flags & RETURN_IF_ANY and result != 0:
            return int(result)
        if (result == expect) if flags & OK_EQUAL else (flags & OK_ANY or result >= 0):
            if flags & LEAVE_IF_PARENT and result > 0:
                raw(SYS["exit_group"], 0, 0, 0, 0, 0, 0)
            row += 1 + (flags >> 32 if flags & JUMP_IF_OK or (flags & JUMP_IF_ZERO and result == 0) else 0)
        elif flags & JUMP_IF_OK:
            row += 1
        elif flags & JUMP_IF_FAIL:
            row += 1 + (flags >> 32)
        else:
            record = bytearray(RECORD.pack(row, -result, 0))
            raw(SYS["write"], status, address_of(record), RECORD.size, 0, 0, 0)  # must not raise: this is the child
            raw(SYS["exit_group"], 126, 0, 0, 0, 0, 0)
    return 0


_STUB = os.path.join(os.path.dirname(__file__), "stub.x86_64.bin")
_PROT_READ, _PROT_EXEC, _MAP_PRIVATE = 1, 4, 2


class Stub:
    """The machine code, mapped."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._walk = function_at(address)

    def __call__(self, linked: Linked, status: int) -> int:
        """As walk_in_python."""
        return int(self._walk(linked.address + HEAD_BYTES, linked.rows, status))

    def call(self, entry: int, a: int, b: int, c: int) -> int:
        """Calls the function at `entry` with three words."""
        return int(function_at(self.address + entry)(a, b, c))


def load_stub() -> Stub | None:
    """The machine-code walker, or None where there is none for this machine or it may not be mapped."""
    if ARCH != "x86_64":
        return None
    try:
        fd = os.open(_STUB, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        address = raw(SYS["mmap"], 0, size, _PROT_READ | _PROT_EXEC, _MAP_PRIVATE, fd, 0)
    finally:
        os.close(fd)
    if address < 0:  # noexec file system, or a policy against executable mappings
        return None
    return Stub(address, size)


def choose_walker(name: str | None = None) -> tuple[str, Walker]:
    """The walker called `name` ("stub", "python"), or the quickest there is. OSError ENOEXEC if it cannot be had."""
    if name != "python":
        walker = load_stub()
        if walker is not None:
            return "stub", walker
        if name == "stub":
            raise OSError(errno.ENOEXEC, "no machine-code walker on this machine", _STUB)
    return "python", walk_in_python
