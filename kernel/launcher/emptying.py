"""Rows that unmap a process's memory but for what it needs to go on in machine code."""

from __future__ import annotations

import mmap
from collections.abc import Iterable

from mesocosm.kernel.launcher.table import OK_ANY, Fragment
from mesocosm.kernel.linux.libc import highest_address, thread_pages


def add_unmapping(rows: Fragment, kept: Iterable[tuple[int, int]]) -> None:
    """Appends a munmap(2) for everything around `kept`, (address, size) each. The stack goes too, if it is not among them."""
    low = 0
    for start, size in (*sorted([*kept, *thread_pages()]), (highest_address(), 0)):
        first = start - start % mmap.PAGESIZE
        if first > low:
            rows.row("munmap", low, first - low, flags=OK_ANY)  # a kernel may seal some of it: then that stays
        low = max(low, first + -(-(start - first + size) // mmap.PAGESIZE) * mmap.PAGESIZE)
