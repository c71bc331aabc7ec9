"""The one door to system calls that Python has no function for.

`syscall` calls by name and raises `SyscallError` (an OSError that remembers the call and what it was done to).
The walker in a cloned child uses `raw` instead: it must not raise, allocate or look anything up.

PyDLL, not CDLL: the lock of the interpreter stays held over the call. The launcher has one thread, and a
child cloned in the middle of a released lock would wait for it for ever. Calls that may block for long go
through `slow`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

from mesocosm.kernel.linux.constants import SYS

_held = ctypes.PyDLL(None, use_errno=True)
_freed = ctypes.CDLL(None, use_errno=True)
raw: Any = _held.syscall
raw.restype = ctypes.c_long
raw.argtypes = [ctypes.c_long] * 7
slow: Any = _freed.syscall
slow.restype = ctypes.c_long
slow.argtypes = [ctypes.c_long] * 7
get_errno = ctypes.get_errno
_openat2: Any = _held["syscall"]  # its own instance: a signature of its own, no copies of what it is given
_openat2.restype = ctypes.c_long
_openat2.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
Buffer = ctypes.Array[ctypes.c_char]


class SyscallError(OSError):
    """An OSError that says which system call it was; `filename` is what it was done to."""

    def __init__(self, errno: int, name: str, target: str | None = None) -> None:
        super().__init__(errno, os.strerror(errno), target)
        self.syscall = name


def syscall(name: str, *arguments: int | bytes | Buffer | None, target: str | None = None) -> int:
    """Calls `name` with integers, NUL-terminated bytes, buffers or None (0); the result, or SyscallError."""
    keep = []
    words = [0, 0, 0, 0, 0, 0]
    for index, argument in enumerate(arguments):
        if isinstance(argument, int):
            words[index] = argument
        elif argument is not None:
            buffer = ctypes.create_string_buffer(argument) if isinstance(argument, bytes) else argument
            keep.append(buffer)
            words[index] = ctypes.addressof(buffer)
    result: int = raw(SYS[name], *words)
    if result < 0:
        raise SyscallError(get_errno(), name, target)
    return result


def openat2(dirfd: int, path: str, how: bytes) -> int:
    """openat2(2) with `how` as bytes; a descriptor, or SyscallError. Quicker than `syscall`: every launch does it often."""
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte")
    result: int = _openat2(SYS["openat2"], dirfd, encoded, how, len(how))
    if result < 0:
        raise SyscallError(get_errno(), "openat2", path)
    return result


def address_of(buffer: bytearray) -> int:
    """Where a bytearray's bytes are; it must not be resized while the address is in use."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def shared_words(count: int) -> tuple[memoryview, int]:
    """`count` words of 8 bytes that a copying clone shares with its parent, and their address."""
    page = mmap.mmap(-1, count * 8)
    return memoryview(page).cast("q"), ctypes.addressof(ctypes.c_char.from_buffer(page))


def function_at(address: int) -> Any:
    """A C function `long f(long, long, long)` at `address`, called with the interpreter's lock held."""
    return ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)(address)


def private_region(size: int) -> int:
    """The address of `size` bytes of new, private memory; `munmap` gives it back."""
    prot_read_write, private_anonymous = 3, 0x22
    return syscall("mmap", 0, size, prot_read_write, private_anonymous, -1, 0)


def write_at(address: int, data: bytes) -> None:
    """Copies bytes to an address. Nothing checks that something is there."""
    ctypes.memmove(address, data, len(data))


def highest_address() -> int:
    """Where this process's memory ends (the kernel's own page at the very top is not a part of it)."""
    with open("/proc/self/maps") as maps:
        ends = [int(line.split(" ", 1)[0].partition("-")[2], 16) for line in maps]
    return max(end for end in ends if end < 1 << 63)


def thread_pages() -> list[tuple[int, int]]:
    """(address, size) of the memory of this thread that the kernel writes to on its own account.

    That is its area of restartable sequences, rseq(2), which the C library has registered if it knows them: a thread
    without that memory is killed when it is next given a processor. x86-64 only.
    """
    try:
        offset = ctypes.c_ssize_t.in_dll(_held, "__rseq_offset").value
        size = ctypes.c_uint.in_dll(_held, "__rseq_size").value
    except ValueError:
        return []
    if not size:
        return []
    base = ctypes.c_ulong()
    arch_get_fs = 0x1003
    if raw(SYS["arch_prctl"], arch_get_fs, ctypes.addressof(base), 0, 0, 0, 0) < 0:
        raise SyscallError(get_errno(), "arch_prctl")
    start = base.value + offset
    first = start - start % mmap.PAGESIZE
    return [(first, start + max(size, 32) - first)]  # 32: the first version of the area, whatever the library uses of it
