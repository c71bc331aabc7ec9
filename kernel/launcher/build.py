"""Which build a launcher is of: agents compare it with their own, and ask one of another build to become one of theirs."""

from __future__ import annotations

import sys
import zlib
from functools import cache
from pathlib import Path


@cache
def build_id() -> str:
    """A word for all that a launcher is made of: its modules, the machine code, the interpreter. Reads some 30 files."""
    here = Path(__file__).resolve().parent
    files = [*here.glob("*.py"), *here.glob("*.bin"), *(here.parent / "linux").glob("*.py")]
    found = zlib.crc32(f"{sys.version} {sys.executable}".encode())
    for path in sorted(files):
        found = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), found))
    return f"{found:08x}"
