"""What the agent must offer to be served, and which call of it each method of the wire is.

`Service` is a Protocol, so that the server knows nothing of the agent and its tests need none. CALLS is the only place
where a method's parameters meet a call's arguments; a test holds it against METHODS.

All errors of a service are MesoErrors; any other exception is answered as `internal` and logged, and ends nothing but
its request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from mesocosm.kernel.wire import messages


class Service(Protocol):
    """The agent as the socket sees it. Documents are plain data, unchecked; answers are plain data.

    The streams are *pulled*: while the peer reads slowly nothing is asked of them. A service must not let that hold up
    anything else, nor keep without bound what nobody pulls. They are closed (``aclose``) when the peer goes away,
    which must not end a container.
    """

    async def launch_group(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Launches a pod; ``{"id", "state", "containers": [ids]}`` once it runs, an error if nothing of it is left."""
        ...

    def run_group(self, document: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        """Launches a pod and yields its event lines; the last has type ``end``. The pod goes on if this is closed early."""
        ...

    async def plan_group(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """What launching would do, as ``plan --json`` prints it; touches nothing."""
        ...

    async def launch_nested_group(self, container_id: str, tasks: Sequence[Any]) -> Mapping[str, Any]:
        """Launches tasks behind one barrier inside a running container."""
        ...

    def run_nested_group(self, container_id: str, tasks: Sequence[Any]) -> AsyncIterator[Mapping[str, Any]]:
        """The same, and yields the event lines of these tasks alone, up to their group's ``end``."""
        ...

    async def launch_container(self, document: Mapping[str, Any]) -> Mapping[str, Any]:
        """Launches one container: ``container_id`` and the fields of a task. A dotted id names the parent."""
        ...

    async def wait_container(self, container_id: str) -> Mapping[str, Any]:
        """How the container ended, once it has: the WAIT object."""
        ...

    def ended(self, container_id: str) -> Mapping[str, Any] | None:
        """What `wait_container` answers, if the container has ended; None if it has not."""
        ...

    async def kill_container(self, container_id: str, signal: int | str | None) -> None:
        """Begins to end the container (None: by its own kill policy), or sends it one signal."""
        ...

    def begin_removal(self, container_id: str) -> Awaitable[None] | None:
        """As `remove_container`, done if None is answered; else begun, and the rest is to be awaited, whoever goes away."""
        ...

    def get_containers(self, include_dead: bool) -> Sequence[Mapping[str, Any]]:  # noqa: FBT001 - one question, one answer
        """``ps`` lines, parents before children."""
        ...

    def explain(self, container_id: str, life: int | None) -> Mapping[str, Any] | Awaitable[Mapping[str, Any]]:
        """Why a container is as it is: state, plan, error, the chain of causes; of one that is gone, to be awaited."""
        ...

    def history(self, container_id: str | None, **bounds: Any) -> Awaitable[Mapping[str, Any]]:
        """What has been: ``{"history": lines, "next", "notes", "durable"}``; bounds `at since cursor limit`."""
        ...

    def plugins(self) -> Sequence[Mapping[str, Any]]:
        """``plugins`` lines."""
        ...

    async def audit(self, repair: bool) -> Mapping[str, Any]:  # noqa: FBT001 - one question, one answer
        """The ledger compared with the machine, both ways: ``{"leftover", "missing", "strangers", "notes"}``."""
        ...

    def set_aside(self, forget: bool) -> Mapping[str, Any]:  # noqa: FBT001 - one question, one answer
        """What of the agent's own records could not be read: ``{"path", "trouble", "set_aside": [{"time", "said"}]}``."""
        ...

    def events(self, since: int, container_id: str | None) -> AsyncIterator[Mapping[str, Any]]:
        """Event lines numbered above `since`; never ends by itself."""
        ...

    def read_logs(
        self, container_id: str, stream: str, offset: int, *, follow: bool, previous: bool
    ) -> AsyncIterator[tuple[int, bytes, int]]:
        """(offset, bytes, how many bytes from there on were dropped) of a container's output; with `follow`, until it is dead
        and all is read; `previous`: of the container before it."""
        ...

    async def stop_agent(self) -> None:
        """Ends every container; the agent itself ends after this has been answered."""
        ...


def _launch_container(service: Service, _request: Any, params: dict[str, Any]) -> Awaitable[Any]:
    return service.launch_container(params)


def _wait(service: Service, request: Any, _params: Any) -> Mapping[str, Any] | Awaitable[Any]:
    known = service.ended(request.container_id)
    return service.wait_container(request.container_id) if known is None else known


async def _kill(service: Service, request: Any, _params: Any) -> dict[str, Any]:
    await service.kill_container(request.container_id, request.signal)
    return {}


def _remove(service: Service, request: Any, _params: Any) -> dict[str, Any] | Awaitable[Any]:
    rest = service.begin_removal(request.container_id)
    return {} if rest is None else _finish(rest)


async def _finish(rest: Awaitable[None]) -> dict[str, Any]:
    await rest
    return {}


async def _stop(service: Service, _request: Any, _params: Any) -> dict[str, Any]:
    await service.stop_agent()
    return {}


async def _logs(service: Service, request: Any, _params: Any) -> AsyncIterator[Mapping[str, Any]]:
    options = {"follow": request.follow, "previous": request.previous}
    pieces = service.read_logs(request.container_id, request.stream, request.offset, **options)
    try:
        async for offset, data, dropped in pieces:
            yield {"offset": offset, "data": data, "dropped": dropped} if dropped else {"offset": offset, "data": data}
    finally:
        if (close := getattr(pieces, "aclose", None)) is not None:
            await close()


# GET_VERSION and PING are the server's own and never reach a service.
CALLS: Mapping[str, Callable[[Service, Any, dict[str, Any]], Any]] = {
    "PLAN_GROUP": lambda service, request, _: service.plan_group(request.group),
    "LAUNCH_GROUP": lambda service, request, _: service.launch_group(request.group),
    "LAUNCH_NESTED_GROUP": lambda service, request, _: service.launch_nested_group(request.container_id, request.tasks),
    "LAUNCH_CONTAINER": _launch_container,
    "LAUNCH_NESTED_CONTAINER": _launch_container,
    "WAIT_CONTAINER": _wait,
    "WAIT_NESTED_CONTAINER": _wait,
    "KILL_CONTAINER": _kill,
    "KILL_NESTED_CONTAINER": _kill,
    "REMOVE_CONTAINER": _remove,
    "REMOVE_NESTED_CONTAINER": _remove,
    "GET_CONTAINERS": lambda service, request, _: {"containers": service.get_containers(request.all)},
    "EXPLAIN": lambda service, request, _: service.explain(request.container_id, request.life),
    "GET_HISTORY": lambda service, request, _: service.history(
        request.container_id, at=request.at, since=request.since, cursor=request.cursor, limit=request.limit
    ),
    "GET_PLUGINS": lambda service, _, __: {"plugins": service.plugins()},
    "AUDIT": lambda service, request, _: service.audit(request.repair),
    "GET_SET_ASIDE": lambda service, request, _: service.set_aside(request.forget),
    "SUBSCRIBE_EVENTS": lambda service, request, _: service.events(request.since, request.container_id),
    "READ_LOGS": _logs,
    "STOP_AGENT": _stop,
}


RUNS: Mapping[str, Callable[[Service, Any], AsyncIterator[Mapping[str, Any]]]] = {
    "LAUNCH_GROUP": lambda service, request: service.run_group(request.group),
    "LAUNCH_NESTED_GROUP": lambda service, request: service.run_nested_group(request.container_id, request.tasks),
}


def call(method: messages.Method, service: Service, request: messages.Request, params: dict[str, Any]) -> Any:
    """What the service answers: an iterator for ``stream``; for all others an awaitable, or the value itself if there is
    nothing to wait for."""
    if method is messages.STREAMED.get(method.name):
        return RUNS[method.name](service, request)
    return CALLS[method.name](service, request, params)
