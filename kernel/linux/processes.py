"""What a process is up to, from what /proc says of it."""

from __future__ import annotations

_EXITING = 0x4  # PF_EXITING, linux/sched.h


def is_exiting(stat: str) -> bool:
    """Whether the text of a /proc/PID/stat has PF_EXITING among its flags (field 9)."""
    return bool(int(stat.rpartition(")")[2].split()[6]) & _EXITING)
