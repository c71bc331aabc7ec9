"""The pod file's types: what a user may write, with every default in one place.

A document (TOML, JSON, msgpack: all become the same dict) is converted here into frozen values and checked
as a whole; a problem is a SpecError whose path names the field. What a container *is* once defaults and
inheritance are applied is a `ContainerSpec` (containers.py): isolators see only that.

Unknown keys are errors: a limit that is misspelt must not silently be no limit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import msgspec

from mesocosm.kernel.core import names
from mesocosm.kernel.core.errors import SpecError

EXECUTOR = "default"  # of a group that does not name one
MAX_TASKS = 1000  # a group is staged whole: its members all stand at one barrier at the same time
MAX_ARGUMENT = 131_072  # MAX_ARG_STRLEN, execve(2): one string of argv or environment
Share = Literal["own", "parent", "host"]
Network = Literal["pod", "host", "none"]
NAMESPACES = ("user", "mount", "pid", "uts", "ipc", "net", "cgroup", "time")
Quantity = str | int | float
T = TypeVar("T")


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a container may use at most; each limit holds for the container and everything below it."""

    cpus: Quantity | None = None
    memory: Quantity | None = None
    pids: int | None = None


class Kill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a container is asked to end: `signal` first, SIGKILL after `grace`."""

    signal: str | int = "TERM"
    grace: Quantity = "3s"


class Volume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A directory (or file) from `source` seen at `target`."""

    source: str
    target: str
    read_only: bool = False


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One member of a task group, and its nested tasks."""

    name: str
    command: list[str] | str
    env: dict[str, str] = {}
    user: str | int | None = None
    cwd: str | None = None
    rootfs: str | None = None
    image: str | None = None
    read_only: bool = False
    resources: Resources = Resources()
    limits: dict[str, int | str | list[int | str]] = {}
    log: Quantity | None = None
    kill: Kill = Kill()
    essential: bool = True
    sidecar: bool = False
    api: bool = False
    init: bool = False
    volumes: list[Volume] = []
    namespaces: dict[str, Share] = {}
    capabilities: list[str] | None = None
    labels: dict[str, str] = {}
    tasks: list[Task] = []


class Pod(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task group: started whole or not at all."""

    name: str
    tasks: list[Task]
    network: Network = "pod"
    role: str = "default"
    executor: str = EXECUTOR
    hostname: str | None = None
    resources: Resources = Resources()
    namespaces: dict[str, Share] = {}
    labels: dict[str, str] = {}


_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*?)`(?: - at `(?P<at>.*)`)?$", re.S)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*?)`(?: - at `(?P<at>.*)`)?$", re.S)
_NEEDED = {
    "name": "every pod and every task has a name",
    "command": 'command = ["sleep", "10"] or "sleep 10"',
    "tasks": "a pod has at least one task: [[tasks]]",
    "source": 'source = "shared:NAME", "host:/path" or "tmpfs:16MiB"',
    "target": 'target = "/data", from the container\'s root',
}
_ENUM = re.compile(r"Invalid enum value (?P<value>'.*'|.*)$", re.S)
_WORDS: Mapping[str, Sequence[str]] = {"network": get_args(Network), "namespaces": get_args(Share)}
_OTHER = re.compile(r"(?P<what>.*?)(?: - at `(?P<at>.*)`)?$", re.S)


def convert(document: object, kind: type[T], root: str = "$") -> T:
    """`document` as a value of `kind`; SpecError with the JSON path of the first field that does not fit."""
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        for pattern, say in ((_UNKNOWN, "is not a known field"), (_MISSING, "is missing")):
            if match := pattern.match(text):
                at, field = match["at"] or "$", match["field"]
                hint = _near(field) if pattern is _UNKNOWN else _NEEDED.get(field)
                raise SpecError(f"{field[:80]!r} {say}", path=f"{root}{at[1:]}.{field}", hint=hint) from None
        match = _OTHER.match(text)
        at = (match and match["at"]) or "$"
        what = (match and match["what"]) or text
        if enum := _ENUM.match(what):
            words = _WORDS.get(at.removesuffix("[...]").rpartition(".")[2], ())
            need = " or ".join(map(repr, words)) or None
            raise SpecError(f"{enum['value'][:80]} is none of the words for it", path=root + at[1:], need=need) from None
        raise SpecError(what[0].lower() + what[1:], path=root + at[1:]) from None
    except (RecursionError, OverflowError, UnicodeError) as error:
        raise SpecError(f"the document cannot be read: {type(error).__name__}", path=root) from None


def _near(field: str) -> str | None:
    import difflib  # not at every start

    known = {name for kind in (Pod, Task, Resources, Kill, Volume) for name in kind.__struct_fields__}
    found = difflib.get_close_matches(field[:80], known, n=1)
    return f"did you mean {found[0]!r}?" if found else None


def too_many_tasks(count: int, path: str) -> SpecError:
    """Nested ones are counted, too."""
    have, need = str(count), f"≤ {MAX_TASKS}"
    return SpecError("too many tasks for one group", path=path, have=have, need=need, hint="make several groups of them")


def parse_pod(document: object, root: str = "$") -> Pod:
    """A checked Pod. What needs only the document is checked here; what needs the host is checked by planning."""
    if not isinstance(document, Mapping):
        raise SpecError(f"a pod file is a table, not {type(document).__name__}", path=root)
    pod = convert(document, Pod, root)
    names.check_name(pod.name, f"{root}.name")
    _check_shares(pod.namespaces, f"{root}.namespaces")
    if pod.hostname is not None:
        names.check_name(pod.hostname, f"{root}.hostname")
    if not pod.tasks:
        raise SpecError("a group needs at least one task", path=f"{root}.tasks")
    counted = _check_tasks(pod.tasks, root, depth=2)
    if counted > MAX_TASKS:
        raise too_many_tasks(counted, f"{root}.tasks")
    return pod


def parse_tasks(document: object, parent: str, root: str = "$") -> list[Task]:
    """The checked `tasks` of a LAUNCH_NESTED_GROUP below the container `parent`."""
    tasks = convert(document, list[Task], f"{root}.tasks")
    if not tasks:
        raise SpecError("a group needs at least one task", path=f"{root}.tasks")
    counted = _check_tasks(tasks, root, depth=names.depth_of(parent) + 1)
    if counted > MAX_TASKS:
        raise too_many_tasks(counted, f"{root}.tasks")
    return tasks


def _check_tasks(tasks: Sequence[Task], path: str, depth: int) -> int:
    if tasks and depth > names.MAX_DEPTH:
        raise SpecError("nested too deep", path=f"{path}.tasks", have=str(depth), need=f"≤ {names.MAX_DEPTH} levels")
    seen: dict[str, int] = {}
    counted = 0
    for index, task in enumerate(tasks):
        at = f"{path}.tasks[{index}]"
        names.check_name(task.name, f"{at}.name")
        if task.name in seen:
            raise SpecError(f"two tasks are named {task.name!r}", path=f"{at}.name", hint=f"the first is tasks[{seen[task.name]}]")
        seen[task.name] = index
        _check_task(task, at)
        counted += 1 + _check_tasks(task.tasks, at, depth + 1)
    return counted


def _check_task(task: Task, at: str) -> None:
    argv = ["/bin/sh", "-c", task.command] if isinstance(task.command, str) else task.command
    if not argv or not argv[0]:
        raise SpecError("a command needs a program", path=f"{at}.command", hint='command = ["sleep", "10"] or "sleep 10"')
    for text in argv:
        _check_string(text, f"{at}.command")
    for key, value in task.env.items():
        if not key or "=" in key:
            raise SpecError(f"{key[:80]!r} is not the name of a variable", path=f"{at}.env")
        _check_string(f"{key}={value}", f"{at}.env.{key[:80]}")
    for field in ("cwd", "rootfs"):
        value = getattr(task, field)
        if value is not None and (value != "host" or field == "cwd"):
            check_absolute(value, f"{at}.{field}")
    if task.image is not None and task.rootfs is not None:
        raise SpecError("a task has a rootfs or an image, not both", path=f"{at}.image")
    _check_shares(task.namespaces, f"{at}.namespaces")
    if task.resources.pids is not None and not 0 < task.resources.pids < 2**22:
        raise SpecError("out of range", path=f"{at}.resources.pids", have=str(task.resources.pids), need="1 to 4194303")


def _check_shares(shares: Mapping[str, str], at: str) -> None:
    for name in shares:
        if name not in NAMESPACES:
            raise SpecError(f"{name[:80]!r} is not a namespace", path=f"{at}.{name[:80]}", hint=f"one of {' '.join(NAMESPACES)}")


def _check_string(text: str, path: str) -> None:
    if "\0" in text:
        raise SpecError("a string given to execve cannot hold a NUL", path=path)
    try:
        length = len(text.encode()) + 1
    except UnicodeEncodeError:
        raise SpecError("not valid Unicode (a lone surrogate)", path=path) from None
    if length > MAX_ARGUMENT:
        raise SpecError(
            "longer than execve takes", path=path, have=str(length), need=f"≤ {MAX_ARGUMENT} bytes (MAX_ARG_STRLEN)",
            hint="hand it over in a file on a volume",
        )  # fmt: skip


def check_absolute(text: str, path: str) -> str:
    """A path that starts at the container's root and cannot climb: absolute, no ``..``, no NUL."""
    if not text.startswith("/") or "\0" in text or ".." in text.split("/") or len(text) > 4095:
        raise SpecError(f"{text[:80]!r} is not an absolute path without '..'", path=path, hint="from the container's root: /data")
    return text


def to_document(pod: Pod) -> dict[str, Any]:
    """The pod as plain data again, defaults left out: what goes into the ledger and over the wire."""
    built: dict[str, Any] = msgspec.to_builtins(pod)
    return built
