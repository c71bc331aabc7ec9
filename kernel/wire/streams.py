"""One stream to one peer: numbered items, parts of what is too long for a frame, and an end that cannot be missed.

A stream is a row of notifications ``[2, "STREAM", [{"stream": N, "seq": 0, …}]]``, numbered from 0. An item is in
``item``; one too long for a frame comes as several ``part`` (bytes of its MessagePack), the last with ``last``. The end
has ``end`` and ``bytes``: the sum of the lengths of all earlier frames of the stream, as their 4-byte prefixes
said. A reader that has seen no end, or counted differently, has not seen everything. An ``error`` in the end says why there
is no more; ``lagged`` that it is the reader's own slowness.
"""

from __future__ import annotations

from typing import Any

import trio

from mesocosm.kernel.core.errors import LaggedError, MesoError
from mesocosm.kernel.wire import framing, messages
from mesocosm.kernel.wire.outbox import Outbox

PART = 192 * 1024  # bytes of one part; leaves room in its frame for the names beside it
_STRETCH = 16  # items sent before others get a turn, if nothing else makes us wait


class Stream:
    """The sending side of a stream. `lag`: seconds to wait for a slow reader, None for as long as it likes."""

    def __init__(self, outbox: Outbox, number: int, lag: float | None) -> None:
        self.number = number
        self._outbox = outbox
        self._lag = lag
        self._seq = 0
        self._bytes = 0

    async def item(self, value: Any) -> None:
        """Sends one item. LaggedError for a reader that does not keep up, trio.BrokenResourceError for one that is gone."""
        body = messages.item(self.number, self._seq, {"item": value})
        if len(body) <= framing.MAX_FRAME:
            await self._send(body)
        else:
            await self.parts(framing.pack(value))

    async def parts(self, packed: bytes) -> None:
        """Sends one item, already packed, in as many parts as it needs."""
        for start in range(0, len(packed), PART):
            fields: dict[str, Any] = {"part": packed[start : start + PART]}
            if start + PART >= len(packed):
                fields["last"] = True
            await self._send(messages.item(self.number, self._seq, fields))

    def end(self, error: MesoError | None = None) -> None:
        """The last frame. It is small and always taken, so that a reader that wakes up learns how it ended."""
        fields: dict[str, Any] = {"end": True, "bytes": self._bytes}
        if error is not None:
            fields["error"] = error.as_object()
        if isinstance(error, LaggedError):
            fields["lagged"] = True
        self._outbox.put(messages.item(self.number, self._seq, fields), patient=self._lag is None)

    async def _send(self, body: bytes) -> None:
        if self._outbox.has_room:
            self._outbox.put(body, patient=self._lag is None)
            if self._seq % _STRETCH == _STRETCH - 1:
                await trio.lowlevel.checkpoint()
        elif self._lag is None:
            await self._outbox.send(body, patient=True)
        else:
            with trio.move_on_after(self._lag) as scope:
                await self._outbox.send(body)
            if scope.cancelled_caught:
                raise LaggedError(
                    "lagged: this reader did not keep up, and the stream was ended",
                    have=f"nothing read for {self._lag:g} s",
                    hint="read faster, or ask again from the last number seen",
                )
        self._seq += 1
        self._bytes += len(body)
