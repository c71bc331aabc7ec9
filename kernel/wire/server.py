"""The server: takes connections, one task each, and keeps what must outlive them.

Its nursery holds the connections and, beside them, the calls that go on when their caller goes away. No exception of a
peer's task ever reaches it: a peer can end its own connection and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable

import trio

from mesocosm.kernel.core.errors import OverBudgetError
from mesocosm.kernel.wire import authority, framing, messages
from mesocosm.kernel.wire.authority import Access, Principal
from mesocosm.kernel.wire.connection import Connection, Limits
from mesocosm.kernel.wire.listening import Listener
from mesocosm.kernel.wire.service import Service

log = logging.getLogger("mesocosm.wire")
_PAUSE = 0.1  # seconds between two tries to accept when this process has no file descriptor left


class Server:
    """Serves one service on one socket.

    `stopped` is set once a STOP_AGENT has been answered: the agent then cancels `serve`. `idle_since` is for an agent
    that ends when nobody uses it. `set_name`: of the plug-ins behind the service, for GET_VERSION.
    """

    def __init__(
        self,
        service: Service,
        *,
        version: str,
        run_id: str,
        set_name: str | None = None,
        access: Access,
        limits: Limits | None = None,
        identify: Callable[[socket.socket, str], Principal] = authority.identify,
    ) -> None:
        self.service = service
        self.version = version
        self.set_name = set_name
        self.access = access
        self.limits = limits or Limits()
        self.stopped = trio.Event()
        self.connections = 0
        self._strangers = 0  # of these
        self.tasks: trio.Nursery
        self._run_id = run_id
        self._identify = identify
        self._last_seen: float | None = None

    @property
    def idle_since(self) -> float | None:
        """The trio time since which no connection is open; None while one is, or before `serve`."""
        return None if self.connections else self._last_seen

    async def serve(self, listener: Listener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; that ends connections and calls alike. The listener remains the caller's to close."""
        async with trio.open_nursery() as self.tasks:
            self._last_seen = trio.current_time()
            task_status.started()
            while True:
                try:
                    peer = listener.accept()
                except BlockingIOError:
                    with contextlib.suppress(trio.ClosedResourceError):  # it listens elsewhere now
                        await trio.lowlevel.wait_readable(listener.sock)
                    continue
                except OSError as error:
                    log.error("cannot accept: %s", error)
                    await trio.sleep(_PAUSE)
                    continue
                if peer is not None:
                    self._take(peer, listener)
                await trio.lowlevel.checkpoint()

    def _take(self, peer: socket.socket, listener: Listener) -> None:
        principal = self._who(peer)
        if principal.kind == "unknown" and listener.make_way():
            principal = self._who(peer)
        # Those who may do nothing are counted apart: a container that was given the socket could else keep everybody out.
        is_stranger = authority.may(principal, "read", self.access) is not None
        have, most = (
            (self._strangers, self.limits.strangers)
            if is_stranger
            else (self.connections - self._strangers, self.limits.connections)
        )
        if have >= most:
            body = messages.refusal(None, OverBudgetError("too many connections", have=str(have), need=f"≤ {most}"))
            with contextlib.suppress(OSError), peer:
                peer.send(len(body).to_bytes(framing.PREFIX, "big") + body)
            return
        self.connections += 1
        self._strangers += is_stranger
        self.tasks.start_soon(self._serve_one, peer, principal, is_stranger, listener)

    def _who(self, peer: socket.socket) -> Principal:
        try:
            return self._identify(peer, self._run_id)
        except Exception:
            log.exception("a peer could not be identified in a way that it must not")
            return Principal("unknown", why="finding out failed")

    async def _serve_one(
        self,
        peer: socket.socket,
        principal: Principal,
        is_stranger: bool,  # noqa: FBT001 - by start_soon
        listener: Listener,
    ) -> None:
        try:
            with peer:
                await Connection(self, peer, principal).run()
        except Exception:
            log.exception("a connection ended in a way that it must not")
        finally:
            self.connections -= 1
            self._strangers -= is_stranger
            if listener.sock.fileno() >= 0:
                listener.replenish()
            self._last_seen = trio.current_time()
