"""The client: the standard library and msgpack, no threads, no trio. Copy it where you need it, with the three modules
beside it that it imports (hence relatively): `dialling`, `exchange` and `resuming`.

    from mesocosm.kernel.client import connect

    with connect() as client:
        client.launch_group({"name": "web", "tasks": [{"name": "db", "command": ["sleep", "10"]}]})

What lives here: the methods by name. What must not: frames (`exchange`), or anything of the agent. For
programs that use trio there is `open()`, which is loaded only then.

Theory: a stream that was cut must never look like one that ended. Items are numbered, the end says how many bytes there
were, and both are checked here; whatever does not agree is an `agent_gone`. An answer that did not come in time is an
`unknown_outcome`, since it may have happened all the same. Nothing that runs depends on the agent, so neither should a program
that looks at it: a client finds the agent that comes next by itself, and goes on where it was (see `resuming`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .dialling import RemoteError, default_run_dir, default_socket, dial
from .exchange import Exchange, Stream

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager as Block

    from mesocosm.kernel.wire.trio_client import TrioClient

__all__ = ["Client", "RemoteError", "Stream", "connect", "default_run_dir", "default_socket", "dial", "open"]

RECONNECT = 30.0  # seconds


def connect(path: str | os.PathLike[str] | None = None, *, timeout: float | None = 120.0, reconnect: float = RECONNECT) -> Client:
    """A connection to the agent on `path` (default: `default_socket`).

    `timeout` is the longest silence, in seconds, before an ordinary answer is given up; waits and streams have their own.
    `reconnect`: how many seconds to look for the next agent when this one is gone, 0 for not at all: `agent_gone` after that.
    RemoteError `agent_gone` when nobody answers there, `denied` when it may not be used, `timeout` when the crowd is too large.
    """
    return Client(dial(path, timeout), timeout, redial=lambda: dial(path, timeout), reconnect=reconnect)


class Client(Exchange):
    """One agent, and the next. Not for several threads at once; several streams and calls may be open beside each other."""

    def ping(self) -> None:
        """Returns when the agent has answered."""
        self.call("PING")

    def version(self) -> dict[str, Any]:
        """``{"version", "protocol", "features", "set"}`` of the agent; `set` is the name of its plug-in set."""
        return dict(self.call("GET_VERSION"))

    def plan_group(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        """What launching `pod` would do: the object of ``meso plan --json``. Nothing is touched."""
        return dict(self.call("PLAN_GROUP", group=pod))

    def launch_group(self, pod: Mapping[str, Any]) -> dict[str, Any]:
        """Launches a pod, whole or not at all: ``{"id", "state", "containers"}`` once it runs."""
        return dict(self.call("LAUNCH_GROUP", group=pod))

    def run_group(self, pod: Mapping[str, Any]) -> Stream:
        """Launches a pod; its event lines up to the ``end`` line. Closing the stream does not end the pod."""
        return self.stream("LAUNCH_GROUP", group=pod, stream=True)

    def launch_nested_group(self, container_id: str, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Launches tasks, whole or not at all, inside a running container."""
        return dict(self.call("LAUNCH_NESTED_GROUP", container_id=container_id, tasks=tasks))

    def launch_container(self, container_id: str, command: Sequence[str] | str, **fields: Any) -> dict[str, Any]:
        """Launches one container; `fields` are those of a task. A dotted id starts it inside that parent."""
        return dict(self.call("LAUNCH_CONTAINER", container_id=container_id, command=command, **fields))

    def wait(self, container_id: str, timeout: float | None = None) -> dict[str, Any]:
        """How a container ended, once it has: ``{"id", "status", "exit", "signal", …}``. RemoteError `timeout` after that."""
        return dict(self._ask("WAIT_CONTAINER", {"container_id": container_id}, timeout, "timeout"))

    def kill(self, container_id: str, signal: int | str | None = None) -> None:
        """Begins to end a container by its kill policy; with `signal`, sends that signal once."""
        self.call("KILL_CONTAINER", container_id=container_id, **({} if signal is None else {"signal": signal}))

    def remove(self, container_id: str) -> None:
        """Forgets a dead container and its output."""
        self.call("REMOVE_CONTAINER", container_id=container_id)

    def containers(self, *, all: bool = False) -> list[dict[str, Any]]:  # noqa: A002 - the option is called --all
        """``ps`` lines of the living containers, or of all."""
        return list(self.call("GET_CONTAINERS", all=all)["containers"])

    def explain(self, container_id: str, life: int | None = None) -> dict[str, Any]:
        """Why a container is as it is, or was; `chain` leads from its state to the cause."""
        return dict(self.call("EXPLAIN", container_id=container_id, **({} if life is None else {"life": life})))

    def history(self, container_id: str | None = None, **bounds: float) -> dict[str, Any]:
        """What has been: ``{"history", "next", "notes", "durable"}``; bounds `at since limit`, `cursor`: the last `next`."""
        return dict(self.call("GET_HISTORY", container_id=container_id, **bounds))

    def plugins(self) -> list[dict[str, Any]]:
        """``plugins`` lines: what is loaded, and what is not and why."""
        return list(self.call("GET_PLUGINS")["plugins"])

    def audit(self, *, repair: bool = False) -> dict[str, Any]:
        """The ledger against the machine: ``{"leftover", "missing", "strangers", "notes"}``, after `repair` if asked."""
        return dict(self.call("AUDIT", repair=repair))

    def events(self, since: int = 0, container_id: str | None = None) -> Stream:
        """Event lines numbered above `since`; never ends by itself."""
        return self.stream("SUBSCRIBE_EVENTS", since=since, container_id=container_id)

    def logs(
        self, container_id: str, stream: str = "stdout", offset: int = 0, *, follow: bool = False
    ) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of a container's output; with `follow`, up to its end. Where an offset is beyond the end of the bytes
        before it, those in between were dropped: the container had printed more than its budget."""
        items = self.stream("READ_LOGS", container_id=container_id, stream=stream, offset=offset, follow=follow)
        return ((item["offset"], item["data"]) for item in items if not item.get("dropped"))

    def stop_agent(self) -> None:
        """Ends every container, then the agent."""
        self.call("STOP_AGENT")


def open(  # noqa: A001 - the contract's name
    path: str | os.PathLike[str] | None = None, *, reconnect: float = RECONNECT
) -> Block[TrioClient]:
    """The client for trio programs: ``async with open() as client``. See `mesocosm.kernel.wire.trio_client`."""
    from mesocosm.kernel.wire.trio_client import open_client

    return open_client(path, reconnect=reconnect)
