"""Checksums of what the ledger keeps: a bit that fell over is noticed, and never obeyed.

Theory: SQLite has checksums for what is in its log, and none for what is in its file. A wrong letter in a program's name
hurts one container; one in a path that is to be undone hurts another. So a blob is stored behind a CRC-32 of itself and of
the columns that must not change beside it (whose it is, its range of ids). It is against accidents; against people there
is the file's mode.
"""

from __future__ import annotations

from zlib import crc32

_BYTES = 4


class BrokenSealError(ValueError):
    """What is there is not what was written."""


def seal(blob: bytes, *about: object) -> bytes:
    """`blob` with a checksum before it, over `about` as well."""
    return crc32(blob, crc32(repr(about).encode())).to_bytes(_BYTES, "little") + blob


def unseal(sealed: object, *about: object) -> bytes:
    """What was sealed; BrokenSealError if it, or what it is about, is not what it was."""
    if not isinstance(sealed, bytes) or len(sealed) < _BYTES:
        raise BrokenSealError("it is not what was written: no checksum")
    blob = sealed[_BYTES:]
    if crc32(blob, crc32(repr(about).encode())) != int.from_bytes(sealed[:_BYTES], "little"):
        raise BrokenSealError("it is not what was written: another checksum")
    return blob


def sealed_line(text: str, *about: object) -> str:
    """The same for a short text that people may read: the checksum is its last word."""
    return f"{text} {crc32(text.encode(), crc32(repr(about).encode())):08x}"


def unsealed_line(line: object, *about: object) -> str:
    """What was sealed; BrokenSealError if it is not what it was."""
    text = str(line).rpartition(" ")[0]
    if line != sealed_line(text, *about):
        raise BrokenSealError("it is not what was written: another checksum")
    return text
