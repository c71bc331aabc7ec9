"""The keeper: the process above the launcher, which does nothing but wait.

Theory: should the launcher be killed, its containers pass to the nearest subreaper, which this is; it reaps them, and leaves
when there is nothing to wait for any more. It needs no memory for that: where there is machine code (stub.S, at 16) it
unmaps all but a page, elsewhere it stays the copy of the interpreter that it began as.
"""

from __future__ import annotations

import os
from typing import NoReturn

from mesocosm.kernel.launcher.emptying import add_unmapping
from mesocosm.kernel.launcher.table import Fragment
from mesocosm.kernel.launcher.walk import load_stub
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux.libc import private_region, syscall, write_at

_REGION = 4096  # the rows at its low end, the stack at its high one
_ENTRY = 16


def keep() -> NoReturn:
    """Waits for the launcher and, after it, for whatever it leaves behind; nothing else. Never returns."""
    syscall("prctl", c.PR_SET_NAME, b"meso-keeper", 0, 0, 0)
    os.closerange(3, 64)  # the other end of what the launcher says when it is ready
    stub = load_stub()
    if stub is not None:
        region = private_region(_REGION)
        rows = Fragment()
        add_unmapping(rows, [(stub.address, stub.size), (region, _REGION)])
        write_at(region, rows.packed)
        stub.call(_ENTRY, region, rows.rows, region + _REGION)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)
        except InterruptedError:
            continue
