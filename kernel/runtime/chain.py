"""The cause chain: from the state that is reported down to what to do about it. Pure: records in, links out.

What lives here: the order of causes, and their words. What must not: where records come from (`status` makes them of the living,
`past` of those long gone), and how a chain is printed. Theory: an end has one reason, and the reason says where to look next: at
the member that decided, at the parent, at the limit, at the step. Each of these is one link, which says one thing; one that would
only repeat another is left out. Whoever reads the last link should know what to do without having read any of ours.

A link is {"kind", "says", …}; kinds, in this order: `state end error place kernel limit advice`. `state` begins what is told about
one container: the one that was asked about, then those whose end was the cause of its end.
"""

from __future__ import annotations

import errno as _errno
import os
import signal as _signal
from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]  # {"id", "state", "wait", "own_error", "reason", "group": {"id", "state", "blame", "error"}}
Link = dict[str, Any]
Find = Callable[[str], Record | None]

_DEEPEST = 8  # containers in one chain

# What it says, and what to do: by the signal that ended a program and was not sent by mesocosm.
_SIGNALS: Mapping[str, tuple[str, str]] = {
    "SIGSEGV": ("it used memory that it does not have", "a fault of the program: its core dump or a debugger says where"),
    "SIGBUS": ("it used memory behind which there is nothing", "a file that it had mapped became shorter, or its /dev/shm is full"),
    "SIGILL": ("its code has an instruction that this processor does not know", "it may be made for another processor"),
    "SIGFPE": ("it divided by zero, or the like", "a fault of the program"),
    "SIGABRT": ("it gave up by itself (abort)", "what it printed last says why: meso logs {id}"),
    "SIGSYS": ("it made a system call that its filter forbids", "a set without the seccomp plug-in, or another program"),
    "SIGXCPU": ("it used up its CPU time", "raise limits.cpu in the pod file"),
    "SIGXFSZ": ("it wrote a file larger than it may", "raise limits.fsize in the pod file"),
    "SIGPIPE": ("it wrote into a pipe or socket that nobody reads any more", "look at whoever should have read"),
    "SIGKILL": ("somebody killed it, and it was not mesocosm", "the kernel's log (dmesg) knows if memory was short on the machine"),
    "SIGTERM": ("somebody asked it to end, and it was not mesocosm", "a process inside, or somebody on the machine with kill(1)"),
}
_SHELL = {
    126: "a shell says 126 for a program that it found and could not execute",
    127: "a shell says 127 for a command that it did not find",
}


def make(record: Record, find: Find) -> list[Link]:
    """The chain of a container; `find` answers the record of another of the same pod, as it was then."""
    links: list[Link] = []
    seen: set[str] = set()
    at: Record | None = record
    while at is not None and at["id"] not in seen and len(seen) < _DEEPEST:
        seen.add(at["id"])
        links += _about(at)
        at = _next(at, find)
    return links


def _next(record: Record, find: Find) -> Record | None:
    """The container whose end was the cause of this one's."""
    reason, group = (record.get("wait") or {}).get("reason") or record.get("reason"), record["group"]
    if reason == "parent":
        return find(record["id"].rpartition(".")[0])
    if reason == "group" and group.get("blame"):
        return find(group["blame"])
    return None


def _about(record: Record) -> list[Link]:
    container_id, wait = record["id"], record.get("wait")
    links: list[Link] = [
        {"kind": "state", "id": container_id, "state": record["state"], "says": f"{container_id} is {record['state']}"}
    ]
    if wait is None:
        if record.get("reason"):
            links.append(_link("end", container_id, _ordered(record["reason"], record)))
        elif record["group"]["state"] == "ROLLING_BACK" and record["group"].get("error"):
            links += _of_error(record["group"]["error"], container_id)
        return links
    reason = wait.get("reason")
    error = record.get("own_error") or (record["group"].get("error") if reason in ("rolled_back", "killed") else None)
    says, advice = _ending(record, wait, reason)
    if record.get("own_error") and reason != "rolled_back":
        says, advice = "its program was not started", None  # execve failed behind the barrier
    links.append({**_link("end", container_id, says), "wait": dict(wait)})
    if error:
        links += _of_error(error, container_id)
        advice = None if error.get("hint") else advice
    if reason == "memory":
        owner = wait.get("message") or ""
        links.append({**_link("limit", container_id, owner.strip() or "killed for want of memory"), "limit": wait.get("limit")})
    if advice:
        links.append(_link("advice", container_id, advice.format(id=container_id)))
    return links


def _ending(record: Record, wait: Mapping[str, Any], reason: Any) -> tuple[str, str | None]:
    """What its end was, in words, and what to do if nothing below knows better."""
    if reason == "rolled_back":
        return "its program never ran: the launch failed, and all of it was undone", None
    if reason == "unknown" or (reason is None and wait.get("exit") is None and wait.get("signal") is None):
        why = f": {wait['message']}" if wait.get("message") else ""
        return f"nobody saw how it ended{why}", "what it wrote is in its logs, if they are still there: meso logs {id}"
    if reason == "rebooted":
        return "the machine went down while it ran (a reboot, or the power)", "start it again: meso run"
    if reason == "memory":
        return "the kernel killed it (SIGKILL): it wanted more memory than it may have", (
            "raise resources.memory there, or make the program need less; tmpfs volumes count as its memory too"
        )
    ordered = _ordered(reason, record)
    if reason in ("killed", "group", "parent"):
        return ordered, None
    if wait.get("exit") is not None:
        code = wait["exit"]
        if code == 0:
            return "its program ended by itself, with exit code 0: it had done its work", None
        shell = f"; {_SHELL[code]}" if code in _SHELL else ""
        return f"its program ended by itself, with exit code {code}{shell}", "what it printed last may say why: meso logs {id}"
    if wait.get("signal") is not None:
        name = signal_name(int(wait["signal"]))
        what, advice = _SIGNALS.get(
            name, ("somebody sent it, and it was not mesocosm", "look at what it printed last: meso logs {id}")
        )
        return f"the signal {name} ended it: {what}", advice
    return ordered, None


def _ordered(reason: Any, record: Record) -> str:
    group = record["group"]
    if reason == "killed":
        if record.get("own_error") or (group.get("error") and group.get("state") != "ROLLED_BACK"):
            return "mesocosm ended it"
        return "somebody asked for its end (meso kill, ctrl-C of meso run, or meso agent --stop)"
    if reason == "group":
        blame = group.get("blame")
        if blame == record["id"]:
            return "it was ended with its group, whose end it had decided itself"
        return (
            f"it was ended with its group, because {blame} had ended"
            if blame
            else "it was ended because its group had done its work"
        )
    if reason == "parent":
        return f"it was ended with its parent, {record['id'].rpartition('.')[0]}: nothing outlives what it lives in"
    if reason == "rolled_back":
        return "the launch failed, and is being undone"
    return f"it was ended: {reason}"


def _of_error(error: Mapping[str, Any], container_id: str) -> list[Link]:
    """Whose step it was, what the kernel said, which limit, what to do: each only if it is known and not said yet."""
    where = str(error.get("id") or container_id)
    links = [{**_link("error", where, str(error.get("message", "no message")).partition("\n")[0]), "error": dict(error)}]
    step, plugin = error.get("step"), error.get("plugin")
    if step or plugin:
        parts = [f"step {step['index']} of setting up {where} ({step['stage']}: {step['kind']})"] if step else []
        parts += [f"which the plug-in {plugin} had planned" if step else f"the plug-in {plugin}"] if plugin else []
        links.append({**_link("place", where, ", ".join(parts)), **_only(error, "plugin", "step")})
    if error.get("syscall") or error.get("errno"):
        call = f"{error['syscall']}()" if error.get("syscall") else "the call"
        target = f" for {error['target']}" if error.get("target") else ""
        meaning = _meaning(error.get("errno"))
        answer = f" answered {error['errno']}{f' ({meaning})' if meaning else ''}" if error.get("errno") else " failed"
        links.append({**_link("kernel", where, f"{call}{target}{answer}"), **_only(error, "syscall", "errno", "target")})
    if error.get("have") or error.get("need"):
        words = [
            f"there is {error['have']}" if error.get("have") else "",
            f"needed is {error['need']}" if error.get("need") else "",
        ]
        links.append({**_link("limit", where, ", ".join(word for word in words if word)), **_only(error, "have", "need", "path")})
    if error.get("hint"):
        links.append(_link("advice", where, str(error["hint"])))
    return links


def _meaning(name: Any) -> str:
    number = next((number for number, known in _errno.errorcode.items() if known == name), None)
    return os.strerror(number).lower() if number is not None else ""


def _link(kind: str, container_id: str, says: str) -> Link:
    return {"kind": kind, "id": container_id, "says": says}


def _only(error: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: error[name] for name in names if error.get(name) is not None}


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15, ``signal 40`` for one without a name."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
