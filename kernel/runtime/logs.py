"""Reading a container's output: plain files, read at the reader's speed.

Nothing stands between a program and its log, so nothing here can stall a program. A follower looks again at
growing intervals while nothing comes; when the container is dead, what it wrote is complete.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from typing import Any

import trio

from mesocosm.kernel.core.errors import NotFoundError, SpecError
from mesocosm.kernel.runtime.world import Cell

STREAMS = ("stdout", "stderr")
_PIECE = 65_536
_SHORTEST, _LONGEST = 0.005, 0.1


async def read_log(directory: str, cell: Cell, stream: str, offset: int, *, follow: bool) -> AsyncIterator[tuple[int, bytes]]:
    """(offset, bytes) from `offset` on. Ends at the end of the file; with `follow` only once the container is dead."""
    if stream not in STREAMS:
        raise SpecError(f"{stream[:40]!r} is not a stream", path="$.stream", hint="stdout or stderr")
    if offset < 0:
        raise SpecError("an offset is a number of bytes from the start", path="$.offset", have=str(offset), need="0 or more")
    path = os.path.join(directory, stream)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        where: dict[str, Any] = {"id": cell.id, "target": path, "errno": errno.errorcode.get(error.errno or 0)}
        raise NotFoundError(f"{cell.id} has no {stream}", hint="the pod's own container runs no program", **where) from error
    try:
        pause = _SHORTEST
        while True:
            complete = cell.dead.is_set()  # asked before reading: what is written later is by nobody
            data = os.pread(fd, _PIECE, offset)
            if data:
                yield offset, data
                offset += len(data)
                pause = _SHORTEST
                await trio.lowlevel.checkpoint()
            elif complete or not follow:
                return
            else:
                with trio.move_on_after(pause):
                    await cell.dead.wait()
                pause = min(pause * 2, _LONGEST)
    finally:
        os.close(fd)
