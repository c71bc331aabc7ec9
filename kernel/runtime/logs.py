"""Reading a container's output: plain files, read at the reader's speed; and the last output of one that was replaced.

Nothing stands between a program and its log, so nothing here can stall a program. A follower looks again at
growing intervals while nothing comes; when the container is dead, what it wrote is complete. Where the file has a hole (see
`budgets`), bytes were dropped, and the reader is told how many: they are never zeros, and never silently skipped.

What a container printed is kept for one more life of its id, in FORMER/ID: who looks into why something keeps ending finds
it started anew. It is no container's, has no entry in the ledger and needs none: what lies there belongs to an id that is known,
or goes with the next agent.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import trio

from mesocosm.kernel.core.advice import ADVICE
from mesocosm.kernel.core.errors import ConflictError, NotFoundError, SpecError
from mesocosm.kernel.core.host import HostFacts
from mesocosm.kernel.core.names import is_within
from mesocosm.kernel.linux import holes
from mesocosm.kernel.runtime.undo import Attempt, remove_tree
from mesocosm.kernel.runtime.world import Cell

STREAMS = ("stdout", "stderr")
FORMER = "former"
_PIECE = 65_536
_SHORTEST, _LONGEST = 0.005, 0.1


class Piece(NamedTuple):
    """`data` at `offset`; or, where there is none any more, how many bytes from `offset` on were `dropped`."""

    offset: int
    data: bytes
    dropped: int = 0


def read(host: HostFacts, cell: Cell, stream: str, offset: int, *, follow: bool, previous: bool = False) -> AsyncIterator[Piece]:
    """Of a container, or (`previous`) of the one before it that had its name."""
    if previous:
        return read_log(former_dir(host, cell.id), None, stream, offset, follow=False)
    return read_log(host.container_dir(cell.id), cell, stream, offset, follow=follow)


async def read_log(directory: str, cell: Cell | None, stream: str, offset: int, *, follow: bool) -> AsyncIterator[Piece]:
    """Pieces from `offset` on. Ends at the end of the file; with `follow` only once the container (None: a former one) is dead."""
    if stream not in STREAMS:
        raise SpecError(f"{stream[:40]!r} is not a stream", path="$.stream", hint="stdout or stderr")
    if offset < 0:
        raise SpecError("an offset is a number of bytes from the start", path="$.offset", have=str(offset), need="0 or more")
    path = os.path.join(directory, stream)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        name = os.path.basename(directory)
        where: dict[str, Any] = {"id": name, "target": path, "errno": errno.errorcode.get(error.errno or 0)}
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise _unreadable(name, stream, path, error) from error
        if cell is None:
            raise NotFoundError(
                f"no {stream} of an earlier {name} is kept", hint="only that of the last one is", **where
            ) from error
        raise NotFoundError(f"{name} has no {stream}", hint="the pod's own container runs no program", **where) from error
    try:
        pause = _SHORTEST
        while True:
            complete = cell is None or cell.dead.is_set()  # asked before reading: what is written later is by nobody
            try:
                piece = _read(fd, offset)
            except OSError as error:
                raise _unreadable(os.path.basename(directory), stream, path, error) from error
            if piece is not None:
                yield piece
                offset += len(piece.data) + piece.dropped
                pause = _SHORTEST
                await trio.lowlevel.checkpoint()
            elif complete or not follow or cell is None:
                return
            else:
                with trio.move_on_after(pause):
                    await cell.dead.wait()
                pause = min(pause * 2, _LONGEST)
    finally:
        os.close(fd)


def _unreadable(name: str, stream: str, path: str, error: OSError) -> ConflictError:
    """There is output, and it cannot be read now."""
    code = errno.errorcode.get(error.errno or 0, str(error.errno))
    hint = f"{ADVICE.get(code, 'see dmesg')}; the output is kept, and can be read later"
    return ConflictError(
        f"the {stream} of {name} cannot be read: {(error.strerror or code).lower()}", id=name, target=path, errno=code, hint=hint
    )


def _read(fd: int, offset: int) -> Piece | None:
    """What there is at `offset`: between the two questions nobody of ours can punch a hole."""
    first = holes.data_from(fd, offset)
    if first is None:  # nothing but a hole, or nothing at all
        dropped = os.fstat(fd).st_size - offset
        # Asked once more: something may have been written between the two questions.
        if dropped <= 0 or holes.data_from(fd, offset) is not None:
            return None
        return Piece(offset, b"", dropped)
    if first > offset:
        return Piece(offset, b"", first - offset)
    data = os.pread(fd, _PIECE, offset)
    return Piece(offset, data) if data else None


# -- the former output of an id -----------------------------------------------------------------------------------


def former_dir(host: HostFacts, container_id: str) -> str:
    """Where the output of the last container of this name is, if there was one."""
    return f"{host.run_dir}/{FORMER}/{container_id}"


def keep_former(host: HostFacts, container_id: str) -> list[str]:
    """Puts the output of a dead container where it outlives its record; the paths. That of one before it goes."""
    source, target = host.container_dir(container_id), former_dir(host, container_id)
    kept = []
    for stream in STREAMS:
        if not os.path.lexists(f"{source}/{stream}"):
            continue
        os.makedirs(target, mode=0o700, exist_ok=True)
        os.rename(f"{source}/{stream}", f"{target}/{stream}")
        kept.append(f"{target}/{stream}")
    return kept


def forget_former(host: HostFacts, container_id: str) -> str | None:
    """Removes the former output of this container and of all below it; None, or why some of it may still be there."""
    try:
        for found in _formers(host):
            if is_within(found, container_id):
                _remove(former_dir(host, found))
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        return f"remove_tree {error.filename or former_dir(host, container_id)}: {name}"
    return None


def sweep_former(host: HostFacts, known: Collection[str]) -> Iterable[str]:
    """Removes the former output of those that nobody knows any more; the paths of what stays."""
    with contextlib.suppress(OSError):  # it is in nobody's way, and the next agent comes by
        for found in _formers(host):
            if found in known:
                yield from (f"{former_dir(host, found)}/{stream}" for stream in STREAMS)
            else:
                _remove(former_dir(host, found))


def _formers(host: HostFacts) -> Iterator[str]:
    try:
        yield from os.listdir(f"{host.run_dir}/{FORMER}")
    except FileNotFoundError:
        return


def _remove(path: str) -> None:
    while remove_tree(path) is Attempt.PROGRESS:
        pass
