"""unshare(2) and setns(2), through whichever of three providers this Python has.

In this order: the `unshare` module of python-unshare (an optional extra; its released version does not load on
Python 3, and another distribution of the same name lacks setns, so it is asked for what it can do, not for its
name), `os.unshare`/`os.setns` (Python 3.12), the system call. All three do the same; `provider` says which.
Only single-threaded processes may call these for user and mount namespaces: the launcher, and an agent that
has not started a thread yet.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from mesocosm.kernel.linux.libc import syscall


def _by_syscall_unshare(flags: int) -> None:
    syscall("unshare", flags)


def _by_syscall_setns(fd: int, flags: int) -> None:
    syscall("setns", fd, flags)


def _choose() -> tuple[str, Callable[[int], Any], Callable[[int, int], Any]]:
    try:
        module: Any = importlib.import_module("unshare")
        if hasattr(module, "unshare") and hasattr(module, "setns"):
            return "python-unshare", module.unshare, module.setns
    except ImportError:  # absent, or 0.2 built for Python 2: an undefined symbol
        pass
    if sys.version_info >= (3, 12) and hasattr(os, "unshare"):
        return "os", os.unshare, os.setns
    return "syscall", _by_syscall_unshare, _by_syscall_setns


provider, unshare, setns = _choose()
