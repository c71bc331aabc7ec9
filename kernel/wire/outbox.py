"""What is on its way to one peer: a bounded queue in front of a socket.

Theory: nobody but the peer itself may pay for a peer that does not read. Bytes go out at once if the socket takes them
(no task is woken for an answer that fits); what it does not take is queued and sent by one task. Whoever wants
to send more than the queue holds waits here, and with it the reading of further requests: the peer is slowed
down by its own slowness. If the socket takes nothing for `patience` seconds, the peer is given up, unless all that
is queued are items of a stream that may be read as slowly as people read.
"""

from __future__ import annotations

import socket
from collections import deque
from itertools import islice

import trio

from mesocosm.kernel.wire.framing import PREFIX

_AT_ONCE = 16  # buffers per sendmsg: enough to fill a socket with small frames in one call


class Outbox:
    """The sending side of one connection. Exactly one task runs `run`."""

    def __init__(self, sock: socket.socket, *, bound: int, patience: float) -> None:
        self._sock = sock
        self._bound = bound
        self._patience = patience
        self._queue: deque[tuple[memoryview, bool]] = deque()
        self._waiting = trio.lowlevel.ParkingLot()  # senders, for room
        self._idle = trio.lowlevel.ParkingLot()  # `run`, for something to send
        self.queued = 0  # bytes
        self.impatient = 0  # queued frames that a peer must take within `patience`
        self.broken = False

    @property
    def has_room(self) -> bool:
        """Whether a frame may be put without waiting."""
        return self.queued < self._bound

    def put(self, body: bytes, *, patient: bool = False) -> None:
        """Sends one frame, or queues what the socket does not take now. Never waits, never fails: a broken one drops it."""
        if self.broken:
            return
        data = memoryview(len(body).to_bytes(PREFIX, "big") + body)
        if not self._queue:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                self.broken = True
                self._idle.unpark_all()
                return
            if not data:
                return
        self._queue.append((data, patient))
        self.queued += len(data)
        self.impatient += not patient
        self._idle.unpark_all()

    async def send(self, body: bytes, *, patient: bool = False) -> None:
        """Like `put`, but waits for room first. trio.BrokenResourceError when the peer is gone."""
        while not self.has_room and not self.broken:
            await self._waiting.park()
        if self.broken:
            raise trio.BrokenResourceError
        self.put(body, patient=patient)

    async def run(self) -> None:
        """Sends what is queued until the peer is gone, or was given up. Then `broken` is set and nothing more is taken."""
        try:
            while not self.broken:
                if not self._queue:
                    await self._idle.park()
                elif not await self._writable():
                    return
                else:
                    self._push()
        except OSError:
            pass
        finally:
            self.broken = True
            self._queue.clear()
            self._waiting.unpark_all()

    async def drain(self, seconds: float) -> None:
        """Gives the peer some time to take what is queued (the reason for a refusal, before the connection is closed)."""
        with trio.move_on_after(seconds):
            while self._queue and not self.broken:
                await self._waiting.park()

    async def _writable(self) -> bool:
        while True:
            with trio.move_on_after(self._patience) as scope:
                await trio.lowlevel.wait_writable(self._sock)
            if not scope.cancelled_caught:
                return True
            if self.impatient:
                return False

    def _push(self) -> None:
        try:
            sent = self._sock.sendmsg([data for data, _ in islice(self._queue, _AT_ONCE)])
        except BlockingIOError:
            return
        self.queued -= sent
        while sent:
            data, patient = self._queue.popleft()
            if sent < len(data):
                self._queue.appendleft((data[sent:], patient))
                break
            sent -= len(data)
            self.impatient -= not patient
        if self.queued < self._bound // 2 or not self._queue:  # wake senders for a stretch, not for every frame
            self._waiting.unpark_all()
