"""Mesos's TaskGroupInfo (v1 JSON), as `mesos-execute --task_group` and frameworks write it, in our words.

What lives here: the meaning of every field of TaskInfo that we know. What does not: checking of values that both
formats have in common; the pod file's types do that afterwards.

The rule for what cannot be honoured: a field that changes what runs, or when it ends, refuses the group, with
its path; one that only informs somebody else (agents, health checkers, service discovery) is listed as ignored.
An unknown field is refused.

Differences worth knowing: resources are limits here (Mesos's are requests; `limits` wins where given). A member's
name is its task id; ids outside our grammar are rewritten, and kept as the label `mesos.id`. A volume of the
sandbox of the PARENT is one shared by the pod.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import Any

from mesocosm.kernel import hookimpl
from mesocosm.kernel.contracts import Translation
from mesocosm.kernel.core.errors import SpecError, UnsupportedError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", re.ASCII)
_SANDBOX = "/sandbox"
_WRAPPER_IGNORED = ("type", "executor", "framework_id", "agent_id")


@hookimpl
def translate(document: Mapping[str, Any], name: str) -> Translation | None:
    """`{"tasks": [{"task_id": …}]}`, also inside `{"task_group": …}` (an operation of LAUNCH_GROUP)."""
    path = "$"
    ignored: list[str] = []
    inner: Any = document
    if isinstance(document.get("task_group"), Mapping):
        inner, path = document["task_group"], "$.task_group"
        ignored += [f"$.{key}" for key in document if key in _WRAPPER_IGNORED]
        _refuse_unknown(document, ("task_group", *_WRAPPER_IGNORED), "$")
    tasks = inner.get("tasks")
    if not isinstance(tasks, list) or not any(isinstance(task, Mapping) and "task_id" in task for task in tasks):
        return None
    _refuse_unknown(inner, ("tasks", "name"), path)
    reader = _Reader(ignored)
    group = inner.get("name", name)
    pod: dict[str, Any] = {"name": escape(_text(group, f"{path}.name"))}
    pod["tasks"] = [reader.task(task, f"{path}.tasks[{index}]") for index, task in enumerate(tasks)]
    return Translation(pod, tuple(ignored))


def escape(text: str) -> str:
    """`text` if it is a name; else its usable characters and eight digits of its hash: the same every time, and unique."""
    if _NAME.fullmatch(text):
        return text
    usable = re.sub(r"[^A-Za-z0-9_-]", "-", text)[:50].lstrip("-_") or "task"
    return f"{usable}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


class _Reader:
    """Reads TaskInfos; collects the paths of fields that were left out."""

    def __init__(self, ignored: list[str]) -> None:
        self.ignored = ignored

    def task(self, value: object, path: str) -> dict[str, Any]:
        info = _table(value, path)
        unsupported = {"executor": "an executor of the task's own", "max_completion_time": "a completion time"}
        for field, what in unsupported.items():
            if field in info:
                raise UnsupportedError(f"{what} is not supported", path=f"{path}.{field}", hint="leave it out")
        readers: dict[str, Callable[[Any, str, dict[str, Any]], None]] = {
            "resources": self._resources, "command": self._command, "container": self._container,
            "kill_policy": self._kill_policy, "limits": self._limits, "labels": self._labels,
        }  # fmt: skip
        told = ("agent_id", "slave_id", "data", "check", "health_check", "discovery")
        _refuse_unknown(info, ("name", "task_id", *readers, *told), path)
        self.ignored += [f"{path}.{field}" for field in info if field in told]
        given = _text(_get(info, "task_id", "value", path), f"{path}.task_id.value")
        task: dict[str, Any] = {"name": escape(given), "labels": {}}
        if task["name"] != given:
            task["labels"]["mesos.id"] = given
        if "name" in info and info["name"] != given:
            task["labels"]["mesos.name"] = _text(info["name"], f"{path}.name")
        if "command" not in info:
            raise SpecError("'command' is missing", path=f"{path}.command")
        for field, read in readers.items():  # in this order: limits replace resources
            if field in info:
                read(info[field], f"{path}.{field}", task)
        return task

    def _resources(self, value: object, path: str, task: dict[str, Any]) -> None:
        sums: dict[str, float] = {}
        for index, item in enumerate(_list(value, path)):
            at = f"{path}[{index}]"
            resource = _table(item, at)
            name, kind = _text(resource.get("name"), f"{at}.name"), resource.get("type")
            if name in ("cpus", "mem") and kind == "SCALAR":
                sums[name] = sums.get(name, 0.0) + _number(_get(resource, "scalar", "value", at), f"{at}.scalar.value")
                self.ignored += [f"{at}.{field}" for field in resource if field not in ("name", "type", "scalar")]
            elif (name, kind) in (("disk", "SCALAR"), ("ports", "RANGES")):
                self.ignored.append(at)
            else:
                need = "cpus, mem, disk (SCALAR) or ports (RANGES)"
                raise UnsupportedError("no such resource here", path=at, have=f"{name[:40]} ({str(kind)[:20]})", need=need)
        for name, amount in sums.items():
            _set_resource(task, name, amount, path)

    def _limits(self, value: object, path: str, task: dict[str, Any]) -> None:
        limits = _table(value, path)
        _refuse_unknown(limits, ("cpus", "mem"), path)
        for name in limits:
            amount = _get(limits, name, "value", path)
            at = f"{path}.{name}.value"
            if amount in ("Infinity", "infinity", math.inf):
                task.get("resources", {}).pop(_OURS[name], None)
            else:
                _set_resource(task, name, _number(amount, at), at)

    def _command(self, value: object, path: str, task: dict[str, Any]) -> None:
        command = _table(value, path)
        _refuse_unknown(command, ("value", "shell", "arguments", "environment", "user", "uris"), path)
        if command.get("uris"):
            raise UnsupportedError("this build fetches nothing", path=f"{path}.uris", hint="put the files into a volume")
        at = f"{path}.arguments"
        arguments = [_text(item, f"{at}[{index}]") for index, item in enumerate(_list(command.get("arguments", []), at))]
        program = command.get("value")
        if command.get("shell", True):
            task["command"] = _text(program, f"{path}.value")
            if arguments:
                self.ignored.append(f"{path}.arguments")  # as Mesos does
        else:
            # Mesos executes `value` with `arguments` as the whole argv, whose first is only what the program is called.
            file = arguments[0] if program is None and arguments else _text(program, f"{path}.value")
            if arguments and arguments[0] not in (file, posixpath.basename(file)):
                self.ignored.append(f"{path}.arguments[0]")
            task["command"] = [file, *arguments[1:]]
        if "user" in command:
            task["user"] = _text(command["user"], f"{path}.user")
        at = f"{path}.environment"
        environment = _table(command.get("environment", {}), at)
        _refuse_unknown(environment, ("variables",), at)
        for index, item in enumerate(_list(environment.get("variables", []), f"{at}.variables")):
            variable = _table(item, f"{at}.variables[{index}]")
            if variable.get("type", "VALUE") != "VALUE":
                raise UnsupportedError("secrets are not supported", path=f"{at}.variables[{index}].type", need="VALUE")
            name = _text(variable.get("name"), f"{at}.variables[{index}].name")
            task.setdefault("env", {})[name] = _text(variable.get("value"), f"{at}.variables[{index}].value")

    def _container(self, value: object, path: str, task: dict[str, Any]) -> None:
        container = _table(value, path)
        _refuse_unknown(container, ("type", "volumes", "rlimit_info", "mesos", "network_infos"), path)
        if container.get("type", "MESOS") != "MESOS":
            raise UnsupportedError("not a container of ours", path=f"{path}.type", have=str(container["type"])[:20], need="MESOS")
        for field in ("mesos", "network_infos"):
            if container.get(field):
                raise UnsupportedError(f"{field} is not supported", path=f"{path}.{field}", hint="leave it out")
        for index, item in enumerate(_list(container.get("volumes", []), f"{path}.volumes")):
            at = f"{path}.volumes[{index}]"
            task.setdefault("volumes", []).extend(_volume(_table(item, at), at, task["name"]))
        rlimits = _table(container.get("rlimit_info", {}), f"{path}.rlimit_info").get("rlimits", [])
        for index, item in enumerate(_list(rlimits, f"{path}.rlimit_info.rlimits")):
            limit = _table(item, f"{path}.rlimit_info.rlimits[{index}]")
            name = _text(limit.get("type"), f"{path}.rlimit_info.rlimits[{index}].type").removeprefix("RLMT_").lower()
            pair = [limit.get("soft", "unlimited"), limit.get("hard", "unlimited")]
            task.setdefault("limits", {})[name] = pair

    def _kill_policy(self, value: object, path: str, task: dict[str, Any]) -> None:
        policy = _table(value, path)
        _refuse_unknown(policy, ("grace_period",), path)
        at = f"{path}.grace_period.nanoseconds"
        nanoseconds = _number(_get(policy, "grace_period", "nanoseconds", path), at)
        task["kill"] = {"grace": f"{math.ceil(nanoseconds / 1e6)}ms" if nanoseconds else 0}

    def _labels(self, value: object, path: str, task: dict[str, Any]) -> None:
        for index, item in enumerate(_list(_table(value, path).get("labels", []), f"{path}.labels")):
            label = _table(item, f"{path}.labels[{index}]")
            text = _text(label.get("value", ""), f"{path}.labels[{index}].value")
            task["labels"][_text(label.get("key"), f"{path}.labels[{index}].key")] = text


_OURS = {"cpus": "cpus", "mem": "memory"}


def _set_resource(task: dict[str, Any], name: str, amount: float, path: str) -> None:
    if amount <= 0:
        raise SpecError(f"{name} must be more than 0", path=path, have=f"{amount:g}")
    # Mesos counts thousandths of a cpu and MiB with fractions.
    task.setdefault("resources", {})[_OURS[name]] = f"{max(1, round(amount * 1000))}m" if name == "cpus" else round(amount * 2**20)


def _volume(volume: Mapping[str, Any], path: str, task: str) -> list[dict[str, Any]]:
    _refuse_unknown(volume, ("container_path", "host_path", "mode", "source"), path)
    inside = _text(volume.get("container_path"), f"{path}.container_path")
    target = inside if inside.startswith("/") else f"{_SANDBOX}/{inside}"
    mode = volume.get("mode", "RW")
    if mode not in ("RO", "RW"):
        raise SpecError(f"{str(mode)[:20]!r} is not a mode", path=f"{path}.mode", need="RO or RW")
    read_only = {"read_only": True} if mode == "RO" else {}
    if "host_path" in volume:
        return [{"source": f"host:{_text(volume['host_path'], f'{path}.host_path')}", "target": target, **read_only}]
    source = _table(volume.get("source"), f"{path}.source")
    if source.get("type") == "HOST_PATH":
        host = _text(_get(source, "host_path", "path", f"{path}.source"), f"{path}.source.host_path.path")
        return [{"source": f"host:{host}", "target": target, **read_only}]
    if source.get("type") != "SANDBOX_PATH":
        need = "HOST_PATH or SANDBOX_PATH"
        raise UnsupportedError("no such volume source", path=f"{path}.source.type", have=str(source.get("type"))[:20], need=need)
    at = f"{path}.source.sandbox_path"
    sandbox = _table(source.get("sandbox_path"), at)
    where = posixpath.normpath(_text(sandbox.get("path"), f"{at}.path"))
    if where.startswith(("/", "..")) or where == ".":
        raise SpecError(f"{where[:80]!r} is not a path inside a sandbox", path=f"{at}.path")
    match sandbox.get("type"):
        case "PARENT":
            return [{"source": f"shared:{escape(where)}", "target": target, **read_only}]
        case "SELF":
            # One directory at two places: in the sandbox, and where it was asked for.
            shared = f"shared:{escape(f'{task}.{where}')}"
            return [{"source": shared, "target": f"{_SANDBOX}/{where}"}, {"source": shared, "target": target, **read_only}]
    raise SpecError("the sandbox is one's own or the parent's", path=f"{at}.type", need="SELF or PARENT")


def _refuse_unknown(value: Mapping[str, Any], known: tuple[str, ...], path: str) -> None:
    for field in value:
        if field not in known:
            raise SpecError(f"{str(field)[:80]!r} is not a field that is understood here", path=f"{path}.{str(field)[:80]}")


def _get(value: Mapping[str, Any], outer: str, inner: str, path: str) -> Any:
    """value[outer][inner]; SpecError if it is not there."""
    table = _table(value.get(outer), f"{path}.{outer}")
    if inner not in table:
        raise SpecError(f"{inner!r} is missing", path=f"{path}.{outer}.{inner}")
    return table[inner]


def _table(value: object, path: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError("an object is expected here" if value is not None else "an object is missing here", path=path)
    return value


def _list(value: object, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise SpecError("a list is expected here", path=path)
    return value


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise SpecError("text is expected here" if value is not None else "text is missing here", path=path)
    return value


def _number(value: object, path: str) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not 0 <= number < 2**62:
        raise SpecError("a number of 0 or more is expected here", path=path, have=str(value)[:40])
    return number
