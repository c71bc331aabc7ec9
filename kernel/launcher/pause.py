"""`pause`: the program of a pod's own container, written down as an ELF file of a few hundred bytes.

It holds the pod's namespaces and waits. As PID 1 it must also not keep zombies: SIGCHLD is ignored, so the kernel
reaps orphans for it; SIGTERM ends it (PID 1 gets only signals it has a handler for, and a handler costs pages:
ending a pod is SIGKILL's business anyway). It is executed from a sealed memfd, so nobody can write to it, which nobody
can read either: who executes what it cannot read may not be traced or looked into (ptrace(2), "dumpable"), so a task that
shares the pod's process ids cannot make the pod's process work for it, outside its own limits. Its
8 KiB of memory are all that a pod costs beyond its tasks. A copied child that only waits would cost 324 KiB and
show the launcher's memory to its siblings.
"""

from __future__ import annotations

import fcntl
import os
import struct

from mesocosm.kernel.linux.constants import ARCH

# rt_sigaction(SIGCHLD, {SIG_IGN}, NULL, 8); for (;;) pause();
_X86_64 = bytes.fromhex(
    "b80d000000"  # mov  eax, 13          rt_sigaction
    "bf11000000"  # mov  edi, 17          SIGCHLD
    "488d3517000000"  # lea  rsi, [rip + 23]  action
    "31d2"  # xor  edx, edx
    "41ba08000000"  # mov  r10d, 8
    "0f05"  # syscall
    "b822000000"  # mov  eax, 34          pause
    "0f05"  # syscall
    "ebf7"  # jmp  -9
    "90909090"
)
_ACTION = struct.pack("<QQQQ", 1, 0, 0, 0)  # sa_handler = SIG_IGN
_BASE = 0x400000
_HEADER = 64 + 56


def elf() -> bytes:
    """The program as an ELF executable: one segment, readable and executable, elf(5)."""
    if ARCH != "x86_64":
        raise OSError(8, f"no pause program for {ARCH} yet")
    code = _X86_64 + _ACTION
    size = _HEADER + len(code)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _BASE + _HEADER, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code


def sealed() -> int:
    """A descriptor of the program in memory that nobody can change any more. memfd_create(2), fcntl(2) F_ADD_SEALS."""
    writable = os.memfd_create("pause", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(writable, elf())
    fcntl.fcntl(writable, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    # Reopened for reading only: execveat refuses a file that somebody holds open for writing (ETXTBSY).
    readable = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    os.fchmod(writable, 0o111)
    os.close(writable)
    return readable
