"""What may be asked again when the connection broke before the answer came, and what has to be found out first.

What lives here: tables and decisions, shared by the clients with and without trio. What must not: sockets, clocks.

Theory: what only looks can be asked as often as one likes, and a stream goes on after the last item that was seen. What changes
something may have happened all the same. To end or to forget a container twice is to do it once, as long as it is the same
container: so the next agent is asked what became of it. Whether a launch was carried out cannot be told by looking, since
somebody else may have launched under that name; only that it was not, if nobody knows the name. The rest is an
`unknown_outcome`, and for the caller to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

from .dialling import RemoteError, problem

Params = dict[str, Any]
READS = frozenset({
    "GET_VERSION", "PING", "PLAN_GROUP", "WAIT_CONTAINER", "WAIT_NESTED_CONTAINER", "GET_CONTAINERS", "EXPLAIN", "GET_PLUGINS",
    "GET_HISTORY",
})  # fmt: skip

# Streams that can be asked for again: the parameters for what comes after an item.
RESUMED: Mapping[str, Callable[[Params, Any], Params]] = {
    "SUBSCRIBE_EVENTS": lambda params, item: params | {"since": item["seq"]},
    "READ_LOGS": lambda params, item: params | {"offset": item["offset"] + len(item["data"]) + item.get("dropped", 0)},
}


def find_out(method: str, params: Params, cut: RemoteError) -> Generator[tuple[str, Params], Any, Any]:
    """What to ask the next agent after a call that `cut` broke off: yields requests, is sent their results (or thrown their
    RemoteErrors), returns the result of the call. RemoteError `unknown_outcome` if that cannot be found out."""
    match method:
        case _ if method in READS or (method == "AUDIT" and not params.get("repair")):
            return (yield method, params)
        case "KILL_CONTAINER" | "KILL_NESTED_CONTAINER" if params.get("signal") is None:
            known = yield from _look(params["container_id"])
            # What has been begun is written down, and goes on with the next agent.
            if known is None or known["state"] == "DEAD" or known.get("reason") == "killed":
                return {}
            return (yield method, params)
        case "REMOVE_CONTAINER" | "REMOVE_NESTED_CONTAINER":
            if (yield from _look(params["container_id"])) is None:
                return {}
            try:
                return (yield method, params)
            except RemoteError as error:
                if error.code == "not_found":  # what was begun with the agent before has come to its end meanwhile
                    return {}
                raise
        case "LAUNCH_GROUP" | "LAUNCH_CONTAINER" | "LAUNCH_NESTED_CONTAINER":
            name = params.get("container_id") or params.get("group", {}).get("name")
            known = (yield from _look(name)) if isinstance(name, str) else {}
            if known is None:
                raise problem("agent_gone", "the agent ended before it began with the launch: nothing was launched", id=name)
            raise _unknown(method, cut, name, known.get("state"))
    raise _unknown(method, cut, params.get("container_id"), None)


def _look(container_id: str) -> Generator[tuple[str, Params], Any, Mapping[str, Any] | None]:
    """What the agent has by that name; None if nothing, though its history may remember somebody (`lives`: how many)."""
    try:
        found: Mapping[str, Any] = yield "EXPLAIN", {"container_id": container_id}
    except RemoteError as error:
        if error.code == "not_found":
            return None
        raise
    return None if "lives" in found else found


def _unknown(method: str, cut: RemoteError, container_id: Any, state: Any) -> RemoteError:
    fields = {"id": container_id, "have": state, "hint": "look with explain or ps before it is asked for again"}
    message = f"{method} may have been carried out: {cut.error.get('message', cut.code)}"
    return problem("unknown_outcome", message, **{key: value for key, value in fields.items() if value is not None})
