"""Messages: the table of methods, and what a request must look like. No IO, no calls.

A message is one of ``[0, id, "METHOD", [params]]`` (request), ``[1, id, error, result]`` (answer) and
``[2, "METHOD", [params]]`` (notification). METHODS is the whole of what the socket can do: for each name the type of
its parameters, the right it needs, and how it is answered. A name that is not in it is answered `unsupported`.

Groups and tasks stay plain data here: the agent checks them against the pod file's types, so that a path in an error
is the same whether a pod came from a file, the socket or a front end: it starts at the pod (``$.tasks[0].name``). A
path that starts elsewhere in the parameters starts at these (``$.container_id``).

How a method is answered:

* ``now``     by the reader itself, before the next frame is looked at: nothing that waits for anybody, though what takes long
  (a large plan) lets others have their turn;
* ``call``    by a task of its own, which goes on to its end even if the peer goes away: what changes the world
  must not be half done because somebody closed a terminal;
* ``wait``    by a task that ends with the connection;
* ``stream``  by a task that ends with the connection and sends items.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from mesocosm.kernel.core import names
from mesocosm.kernel.core.errors import FrameError, MesoError, SpecError, UnsupportedError
from mesocosm.kernel.core.spec import convert
from mesocosm.kernel.wire import framing

PROTOCOL = 1
FEATURES: tuple[str, ...] = ()
REQUEST, ANSWER, NOTIFICATION = 0, 1, 2

Right = Literal["read", "write"]
Kind = Literal["now", "call", "wait", "stream"]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a method that takes none."""


class Group(Request, frozen=True):
    """A pod as plain data."""

    group: dict[str, Any]


class LaunchGroup(Group, frozen=True):
    """A pod to launch; with `stream`, the answer is the group's event lines up to its end."""

    stream: bool = False


class NestedGroup(Request, frozen=True):
    """Tasks to launch, behind one barrier, inside the container `container_id`; `stream` as for a pod."""

    container_id: str
    tasks: list[Any]
    stream: bool = False


class Container(Request, frozen=True):
    """One container by its dotted id."""

    container_id: str


class LaunchContainer(Container, frozen=True, forbid_unknown_fields=False):
    """One container: its own id, and beside it the fields of a task, which the agent checks."""


class Kill(Container, frozen=True):
    """`signal` absent: what the container's own kill policy says."""

    signal: str | int | None = None


class Explain(Container, frozen=True):
    """One container; `life`: not the latest of that id, but this one of those that have been (1 is the first)."""

    life: int | None = None


class GetHistory(Request, frozen=True):
    """What has been: of one id and what is below it, or of all; who was there `at` a moment, or who has been `since` one (seconds
    since 1970). `cursor`: what an earlier answer said is `next`."""

    container_id: str | None = None
    at: float | None = None
    since: float | None = None
    cursor: int | None = None
    limit: int = 100


class Containers(Request, frozen=True):
    """Which containers: the living ones, or `all`."""

    all: bool = False


class Audit(Request, frozen=True):
    """The ledger against the machine; with `repair`, what is proven to be left over is undone first."""

    repair: bool = False


class SetAside(Request, frozen=True):
    """What could not be read of the agent's own records; with `forget`, that has been seen and is forgotten afterwards."""

    forget: bool = False


class Events(Request, frozen=True):
    """Events after the number `since`, of `container_id` and below it, or of all."""

    since: int = 0
    container_id: str | None = None


class ReadLogs(Container, frozen=True):
    """Bytes of one output file from `offset` on; with `follow` up to the end of the container; `previous`: of the one before."""

    stream: Literal["stdout", "stderr"] = "stdout"
    offset: int = 0
    follow: bool = False
    previous: bool = False


class Method(msgspec.Struct, frozen=True):
    """One line of the table. A `patient` stream waits for a slow reader; any other drops it (see `connection`)."""

    name: str
    request: type[Request]
    kind: Kind
    right: Right
    patient: bool = False


def _table(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS: Mapping[str, Method] = _table(
    Method("GET_VERSION", Request, "now", "read"),
    Method("PING", Request, "now", "read"),
    Method("PLAN_GROUP", Group, "now", "read"),
    Method("LAUNCH_GROUP", LaunchGroup, "call", "write"),
    Method("LAUNCH_NESTED_GROUP", NestedGroup, "call", "write"),
    Method("LAUNCH_CONTAINER", LaunchContainer, "call", "write"),
    Method("LAUNCH_NESTED_CONTAINER", LaunchContainer, "call", "write"),
    Method("WAIT_CONTAINER", Container, "wait", "read"),
    Method("WAIT_NESTED_CONTAINER", Container, "wait", "read"),
    Method("KILL_CONTAINER", Kill, "call", "write"),
    Method("KILL_NESTED_CONTAINER", Kill, "call", "write"),
    Method("REMOVE_CONTAINER", Container, "call", "write"),
    Method("REMOVE_NESTED_CONTAINER", Container, "call", "write"),
    Method("GET_CONTAINERS", Containers, "now", "read"),
    Method("EXPLAIN", Explain, "wait", "read"),
    Method("GET_HISTORY", GetHistory, "wait", "read"),
    Method("GET_PLUGINS", Request, "now", "read"),
    Method("AUDIT", Audit, "call", "write"),
    Method("GET_SET_ASIDE", SetAside, "call", "write"),
    Method("SUBSCRIBE_EVENTS", Events, "stream", "read"),
    Method("READ_LOGS", ReadLogs, "stream", "read", patient=True),
    Method("STOP_AGENT", Request, "call", "write"),
)

# What these are with `stream`; not names of their own on the wire, so that one name launches groups.
STREAMED: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("LAUNCH_GROUP", LaunchGroup, "stream", "write", patient=True),
        Method("LAUNCH_NESTED_GROUP", NestedGroup, "stream", "write", patient=True),
    )
}


class Parsed(msgspec.Struct, frozen=True):
    """A message that came in: a request with its `id`, or a notification (`id` None)."""

    id: int | None
    method: str
    params: dict[str, Any]


def parse(message: Any) -> Parsed:
    """The outer form of a message from a peer; FrameError when it has none of ours."""
    match message:
        case [int(kind), number, str(method), [*params]] if is_request(kind, number):
            return Parsed(number, method, _params(params))
        case [int(kind), str(method), [*params]] if kind == NOTIFICATION:
            return Parsed(None, method, _params(params))
    raise FrameError("not a request", need='[0, id, "METHOD", [{…}]] with an id from 0 to 2^63-1')


def is_request(kind: Any, number: Any) -> bool:
    """Whether a message that begins with these two is a request; types count, since 0.0 and False equal 0 as well."""
    return type(kind) is int and kind == REQUEST and type(number) is int and 0 <= number < 2**63


def _params(params: list[Any]) -> dict[str, Any]:
    if not params:
        return {}
    if len(params) > 1 or not isinstance(params[0], dict):
        raise FrameError("parameters are one map in a list of one", need="[{…}]")
    found: dict[str, Any] = params[0]
    return found


def find(name: str) -> Method:
    """The line of the table; UnsupportedError for a name it has not."""
    method = METHODS.get(name)
    if method is None:
        raise UnsupportedError(f"no method {name[:80]!r}", hint="GET_VERSION says what this agent speaks")
    return method


def select(method: Method, params: dict[str, Any]) -> tuple[Method, Request]:
    """The checked request, and the line of the table that answers it (of STREAMED for a streamed launch).

    SpecError with a path for parameters that do not fit; ids are checked here, by the one grammar, for all.
    """
    request = convert(params, method.request)
    container_id = getattr(request, "container_id", None)
    if container_id is not None:
        names.parse_id(container_id)
    for field in ("since", "offset", "at", "cursor", "life", "limit"):
        number = getattr(request, field, 0)
        if number is not None and not 0 <= number < 2**63:
            raise SpecError("out of range", path=f"$.{field}", have=str(number), need="0 to 2^63-1")
    if method.name in STREAMED and getattr(request, "stream", False):
        return STREAMED[method.name], request
    return method, request


_IN_GROUP = re.compile(r"\$\[3\]\[0\](?:\.group(?=[.\[]))?")


def rooted(error: MesoError) -> MesoError:
    """The same error with a path from the message's start made one from the parameters' (or the pod's) start."""
    path = error.fields.get("path")
    if isinstance(path, str) and path.startswith("$[3][0]"):
        return type(error)(error.message, **(error.fields | {"path": _IN_GROUP.sub("$", path, count=1)}))
    return error


def answer(number: int | None, result: Any) -> bytes:
    """The body (no length) of the answer to request `number`."""
    return framing.pack([ANSWER, number, None, result])


def refusal(number: int | None, error: MesoError) -> bytes:
    """The body of an error answer; `number` None when the request's id could not be read."""
    return framing.pack([ANSWER, number, error.as_object(), None])


def item(stream: int, seq: int, fields: Mapping[str, Any]) -> bytes:
    """The body of one notification of a stream."""
    return framing.pack([NOTIFICATION, "STREAM", [{"stream": stream, "seq": seq, **fields}]])
