"""The request that stages a container: what it says, and the descriptors that go with it. What must not be here: sending it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.launcher.compile import Compiled, spoil
from mesocosm.kernel.launcher.contract import StageRequest
from mesocosm.kernel.launcher.protocol import MAX_FDS, MAX_MESSAGE


@contextmanager
def packed(request: StageRequest, compiled: Compiled) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Body and descriptors, good until the answer is there; a table that no message takes goes in a file. LaunchError."""
    fds = list(compiled.fds)
    if len(fds) >= MAX_FDS:
        message = f"{len(fds)} descriptors for one container; {MAX_FDS - 1} fit into a message"
        raise LaunchError(message, id=request.container_id, hint="fewer volumes, or one directory above several of them")
    table = compiled.table if request.fault is None else spoil(compiled, request)
    body: dict[str, Any] = {
        "id": request.container_id,
        "barrier": request.barrier,
        "parent": request.parent,
        "note": request.note,
        "fds": len(fds),
        "user_map": compiled.user_map,
        "owner": compiled.owner,
        "enter_pid": compiled.enter_pid,
    }
    if len(table.rows) + len(table.blob) <= MAX_MESSAGE // 2:
        yield body | table._asdict(), fds
        return
    file = os.memfd_create("table", os.MFD_CLOEXEC)
    try:
        os.write(file, msgpack.packb(table._asdict()))
        yield body, [*fds, file]
    finally:
        os.close(file)
