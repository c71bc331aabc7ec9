"""Units: text with a unit on the outside, whole numbers inside.

Quantities are integers of the smallest unit that matters (millicpus, bytes, milliseconds), so sums and
comparisons are exact; a float never decides whether something fits. Accepted spellings are closed: a unit
that is not listed is an error, never a guess.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation

from mesocosm.kernel.core.errors import SpecError

MILLICPUS = {"": 1000, "m": 1}
BYTES = {
    "": 1, "B": 1,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
MILLISECONDS = {"": 1000, "ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000}
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)\s?([A-Za-z]{0,3})", re.ASCII)
_MAX = 2**62  # the cgroup files take 64-bit signed numbers
SMALLEST_LOG = 65_536  # bytes; every file may keep so many, whatever else happens
LOG_BUDGET = 64 * 2**20  # bytes that each of stdout and stderr keeps if nothing else was said


def _parse(value: str | float, units: dict[str, int], what: str, example: str, path: str) -> int:
    hint = f"write {what} as {example}; units: {' '.join(unit for unit in units if unit)}"
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise SpecError(f"{value!r} is not {what}", path=path, hint=hint)
    match = _QUANTITY.fullmatch(repr(value) if isinstance(value, float) else str(value))
    if not match or match[2] not in units:
        raise SpecError(f"{str(value)[:80]!r} is not {what}", path=path, hint=hint)
    try:
        exact = Decimal(match[1]) * units[match[2]]
    except InvalidOperation:  # pragma: no cover - the pattern admits only what Decimal reads
        raise SpecError(f"{value!r} is not {what}", path=path, hint=hint) from None
    whole = int(exact)
    if whole != exact:
        raise SpecError(f"{value!r} is finer than the smallest unit of {what}", path=path, hint=hint)
    if not 0 < whole < _MAX:
        raise SpecError(f"{value!r} is out of range for {what}", path=path, have=str(value), need="more than 0", hint=hint)
    return whole


def millicpus(value: str | float, path: str) -> int:
    """CPUs as thousandths of one: ``2`` → 2000, ``0.5`` and ``"500m"`` → 500."""
    return _parse(value, MILLICPUS, "a number of cpus", "2, 0.5 or '500m'", path)


def size(value: str | float, path: str) -> int:
    """Bytes: ``"64MiB"`` → 67108864."""
    return _parse(value, BYTES, "a size", "'64MiB' or a number of bytes", path)


def duration(value: str | float, path: str) -> int:
    """Milliseconds: ``"3s"`` → 3000, a bare number is seconds."""
    return _parse(value, MILLISECONDS, "a duration", "'3s' or '500ms'", path)


def show_size(count: int) -> str:
    """Bytes for people: the largest binary unit that keeps the number exact enough, ``64 MiB``."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count} B"
