"""The keeper: the process above the launcher, which does nothing but wait, and write down what it has reaped.

Theory: should the launcher be killed, its containers pass to the nearest subreaper, which this is; it reaps them, and leaves
when there is nothing to wait for any more. How they ended goes into RUN_DIR/reaped (`reaped` reads it), one write for each.
It needs no memory for that: where there is machine code (stub.S, at 16) it unmaps all but a page and walks rows in a circle,
elsewhere it stays the copy of the interpreter that it began as. What a container without process ids of its own leaves
behind is reaped here as well, so the file has a limit that none of them can push further.
"""

from __future__ import annotations

import os
import resource
import struct
import time
from typing import NoReturn

from mesocosm.kernel.launcher.emptying import add_unmapping
from mesocosm.kernel.launcher.reaped import BOOT_AT, INODE_AT, MOST_BYTES, RECORD_BYTES, TIME_AT, USAGE_AT, as_record
from mesocosm.kernel.launcher.table import JUMP_IF_OK, OK_ANY, Fragment, Slot, pairs
from mesocosm.kernel.launcher.walk import load_stub
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux.libc import private_region, syscall, write_at

_REGION = 4096  # the rows at its low end, the record in the middle, the stack at its high end
_RECORD = 2560  # words from here on are the slots of the rows; system calls write up to 232 bytes
_PID = Slot(2)  # si_pid of the siginfo that the record begins with: as an argument, its low half counts
_FD = Slot(30)
_ENTRY = 16
_ECHILD = 10
_FILE = 3


def keep(file: int) -> NoReturn:
    """Waits for the launcher and, after it, for whatever it leaves behind; writes that to `file`. Never returns."""
    syscall("prctl", c.PR_SET_NAME, b"meso-keeper", 0, 0, 0)
    os.dup2(file, _FILE, inheritable=False)
    os.closerange(_FILE + 1, 64)  # the other end of what the launcher says when it is ready
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = MOST_BYTES if hard == resource.RLIM_INFINITY else min(MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))  # SIGXFSZ is blocked like every other signal: EFBIG
    stub = load_stub()
    if stub is not None:
        region = private_region(_REGION)
        rows = Fragment()
        add_unmapping(rows, [(stub.address, stub.size), (region, _REGION)])
        add_waiting(rows, region + _RECORD)
        words = list(rows.words)
        for at, number in pairs(rows.relocations[1] if rows.packed else b""):
            words[at] = region + _RECORD + 8 * number
        write_at(region, struct.pack(f"={len(words)}q", *words))
        stub.call(_ENTRY, region, rows.rows, region + _REGION)
    _keep_in_python()


def add_waiting(rows: Fragment, record: int) -> None:
    """Appends the circle: look who has ended, open its pidfd (a number for it that is never used again), reap, write down."""
    waitid = c.WEXITED | c.WALL
    rows.row("waitid", c.P_ALL, 0, record, waitid | c.WNOWAIT, 0, expect=-_ECHILD, flags=JUMP_IF_OK, skip=7)
    rows.row("pidfd_open", _PID, 0, out=_FD, flags=OK_ANY)
    rows.row("waitid", c.P_PID, _PID, record, waitid, record + USAGE_AT, flags=OK_ANY)
    rows.row("fstat", _FD, record + INODE_AT - 8, flags=OK_ANY)  # st_ino is its second word; before, usage has left 0 there
    rows.row("close", _FD, flags=OK_ANY)
    rows.row("clock_gettime", time.CLOCK_REALTIME, record + TIME_AT, flags=OK_ANY)
    rows.row("clock_gettime", time.CLOCK_BOOTTIME, record + BOOT_AT, flags=OK_ANY)
    rows.row("write", _FILE, record, RECORD_BYTES, flags=OK_ANY | JUMP_IF_OK, skip=-8)  # and back to the first
    rows.row("exit_group", 0)


def _keep_in_python() -> NoReturn:
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | c.WALL)
            assert found is not None  # it would be with WNOHANG
            inode = 0
            try:
                pidfd = os.pidfd_open(found.si_pid)
                inode = os.fstat(pidfd).st_ino
                os.close(pidfd)
            except OSError:
                pass  # then it is known by its number alone
            pid, status, usage = os.wait4(found.si_pid, c.WALL)
            os.write(_FILE, as_record(pid, status, usage, inode))
        except ChildProcessError:
            os._exit(0)
        except OSError:
            continue  # interrupted, or no room to write it down
