"""A pod document from a file, from stdin, or from the options of the single form. Plain data; nothing is checked twice.

What lives here: reading TOML and JSON, and building the group of one task. What must not: the meaning of the fields
(`core.spec` checks them, in the agent or while planning; its errors name the field by the same path).

Errors: SpecError for what cannot be read as data at all, with the file as `target`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel.core.errors import MesoError, SpecError, TooLargeError

MAX_BYTES = 4 * 2**20  # far above what one frame carries; keeps /dev/zero from filling the memory


def group_document(arguments: argparse.Namespace, *, fixed_name: bool = False) -> dict[str, Any]:
    """The pod that `run` and `plan` were given. `fixed_name`: a single command's default name is the same every time."""
    if arguments.command is None:
        if arguments.file is None:
            raise SpecError(
                "nothing to run: no pod file and no command",
                hint=f"meso {arguments.verb} pod.toml, or meso {arguments.verb} -- COMMAND [ARGUMENT...]",
            )
        misplaced = [option for option, value in _single_options(arguments).items() if value]
        if misplaced:
            raise SpecError(f"--{misplaced[0]} is for a single command, not for a pod file", hint="say it in the pod file")
        document = read_document(arguments.file)
        return {**document, "name": arguments.name} if arguments.name is not None else document
    if arguments.file is not None:
        raise SpecError(
            f"a pod file ({arguments.file[:80]}) or a command after --, not both",
            hint="options come before --, the command behind it",
        )
    if not arguments.command:
        raise SpecError("no command after --", hint=f"meso {arguments.verb} -- echo hello")
    return single_document(arguments, default_name(arguments.command[0], fixed=fixed_name))


def nested_tasks(document: Mapping[str, Any], arguments: argparse.Namespace) -> list[Any]:
    """The tasks to launch inside a running container. What a pod says beside its tasks has been said there already."""
    if is_single(document):
        name = document["name"]
        more = sorted(set(document) - {"name", "executor", "tasks"})
        tasks: Any = [{**document["tasks"][0], "name": name}]
    else:
        more, tasks = sorted(set(document) - {"name", "tasks"}), document.get("tasks")
        if arguments.name is not None:
            raise SpecError("--name is for a single command: the tasks of a file have their own names", path="--name")
    if more:
        raise SpecError(f"{more[0][:80]!r} is the pod's, and the pod runs already", path=f"$.{more[0][:80]}", hint="leave it out")
    if not isinstance(tasks, list):
        raise SpecError("'tasks' is missing", path="$.tasks")
    return tasks


def is_single(document: Mapping[str, Any]) -> bool:
    """Whether this is one container of its own, without a pod around it."""
    return document.get("executor") == "command"


def read_document(file: str) -> dict[str, Any]:
    """The document in `file` (``-``: stdin): TOML or JSON, by the suffix, else by what it looks like."""
    shown = "stdin" if file == "-" else file
    data = _read(file, shown)
    if len(data) > MAX_BYTES:
        raise TooLargeError("a pod file is not that large", target=shown, need=f"≤ {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"not text in UTF-8 (byte {error.start})", target=shown) from None
    is_json = file.endswith(".json") or (not file.endswith(".toml") and text.lstrip()[:1] in ("{", '"'))
    try:
        document = _parse_json(text) if is_json else _parse_toml(text)
        _check_plain(document, "$")
    except SpecError as error:
        raise error.with_fields(target=shown) from None
    except RecursionError:
        raise SpecError("nested too deep to be read", target=shown) from None
    except ValueError as error:
        raise SpecError(f"not valid {'JSON' if is_json else 'TOML'}: {error}", target=shown) from None
    if not isinstance(document, dict):
        raise SpecError(f"a pod file is a table, not {_kind(document)}", path="$", target=shown)
    return document


def explain_size(document: Mapping[str, Any], error: MesoError) -> MesoError:
    """`error` (the document does not fit one frame) in terms of the document, where that can be told."""
    from mesocosm.kernel.core.spec import MAX_TASKS, too_many_tasks

    tasks = document.get("tasks")
    if isinstance(tasks, list) and len(tasks) > MAX_TASKS:
        return too_many_tasks(len(tasks), "$.tasks")
    return error.with_fields(path="$", hint="what is that long goes into a file on a volume")


def single_document(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The group of one task that the options of the single form describe."""
    task: dict[str, Any] = {"name": "main", "command": list(arguments.command)}
    resources = {key: value for key in ("cpus", "memory", "pids") if (value := getattr(arguments, key)) is not None}
    if resources:
        task["resources"] = resources
    for key in ("user", "cwd", "rootfs"):
        if (value := getattr(arguments, key)) is not None:
            task[key] = value
    for key in ("read_only", "init"):
        if getattr(arguments, key):
            task[key] = True
    if arguments.env:
        task["env"] = dict(_variable(text) for text in arguments.env)
    if arguments.volume:
        task["volumes"] = [_volume(text) for text in arguments.volume]
    if arguments.limit:
        task["limits"] = dict(_limit(text) for text in arguments.limit)
    if arguments.cap_add or arguments.cap_drop:
        task["capabilities"] = _capabilities(arguments.cap_add or [], arguments.cap_drop or [])
    name = arguments.name if arguments.name is not None else name
    document: dict[str, Any] = {"name": name, "executor": "command", "tasks": [task]}
    for key in ("network", "hostname"):
        if (value := getattr(arguments, key)) is not None:
            document[key] = value
    return document


def default_name(program: str, *, fixed: bool = False) -> str:
    """A name for a single command: its program's, and four digits by which two of them differ."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(program), flags=re.ASCII).strip("-_")[:40] or "command"
    return stem if fixed else f"{stem}-{os.urandom(2).hex()}"


def _single_options(arguments: argparse.Namespace) -> dict[str, Any]:
    keys = (
        "cpus", "memory", "pids", "limit", "env", "volume", "user", "cwd", "rootfs", "read_only", "network", "hostname",
        "cap_add", "cap_drop", "init",
    )  # fmt: skip
    return {key.replace("_", "-"): getattr(arguments, key) for key in keys}


def _read(file: str, shown: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read(MAX_BYTES + 1)
        with open(file, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except OSError as error:
        hint = f"for a command: meso run -- {file}" if isinstance(error, FileNotFoundError) and "." not in file else None
        raise SpecError(f"the pod file cannot be read: {(error.strerror or str(error)).lower()}", target=shown, hint=hint) from None


def _parse_toml(text: str) -> object:
    import tomllib

    return tomllib.loads(text)


def _parse_json(text: str) -> object:
    import json

    return json.loads(text, object_pairs_hook=_distinct)


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # JSON lets the last one win; a limit given twice must not
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise SpecError(f"the field {twice[:80]!r} is there twice")
    return found


def _check_plain(value: object, path: str) -> None:
    """Dates and numbers beyond 64 bits are TOML or JSON, but nothing that a pod file has, and no message can carry them."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, f"{path}.{key[:80]}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{path}[{index}]")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise SpecError("out of range", path=path)
    elif not isinstance(value, (str, int, float, type(None))):
        raise SpecError(f"{_kind(value)} is not something a pod file has", path=path)


def _kind(value: object) -> str:
    names = {"dict": "a table", "list": "a list", "str": "a text", "int": "a number", "float": "a number", "bool": "true or false"}
    return names.get(type(value).__name__, f"a {type(value).__name__}" if value is not None else "null")


def _variable(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key:
        raise SpecError(f"{text[:80]!r} is not a variable", path="--env", hint="--env NAME=VALUE, or --env NAME")
    if equals:
        return key, value
    if key not in os.environ:
        raise SpecError(f"the variable {key[:80]!r} is not set here", path="--env", hint=f"--env {key[:80]}=VALUE")
    return key, os.environ[key]


def _volume(text: str) -> dict[str, Any]:
    rest, read_only = text, False
    if text.endswith((":ro", ":rw")):
        rest, read_only = text[:-3], text.endswith(":ro")
    source, found, target = rest.rpartition(":/")
    if not found or not source:
        raise SpecError(
            f"{text[:80]!r} is not a volume",
            path="--volume",
            hint="--volume /dir:/target[:ro], tmpfs:16MiB:/target or shared:NAME:/target",
        )
    if source.startswith(("/", "./", "../")) or source in (".", ".."):
        source = "host:" + os.path.abspath(source)
    return {"source": source, "target": "/" + target, **({"read_only": True} if read_only else {})}


def _limit(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise SpecError(f"{text[:80]!r} is not a limit", path="--limit", hint="--limit nofile=1024, or nofile=512:1024 (soft:hard)")
    parts = [int(part) if part.isascii() and part.isdigit() and len(part) < 19 else part for part in value.split(":")]
    return name, parts[0] if len(parts) == 1 else parts


def _capabilities(added: Sequence[str], dropped: Sequence[str]) -> list[str]:
    from mesocosm.kernel.core.containers import CAPABILITIES, DEFAULT_CAPABILITIES

    def known(texts: Sequence[str], option: str) -> set[str]:
        found: set[str] = set()
        for text in texts:
            name = text.upper().removeprefix("CAP_")
            if name != "ALL" and name not in CAPABILITIES:
                raise SpecError(f"{text[:40]!r} is not a capability", path=option, hint="see capabilities(7)")
            found |= set(CAPABILITIES) if name == "ALL" else {name}
        return found

    minus, plus = known(dropped, "--cap-drop"), known(added, "--cap-add")
    # "--cap-drop ALL --cap-add X" means just X; otherwise what is dropped stays dropped.
    base = set() if len(minus) == len(CAPABILITIES) else set(DEFAULT_CAPABILITIES) - minus
    minus = set() if len(minus) == len(CAPABILITIES) else minus
    return [name for name in CAPABILITIES if name in base | (plus - minus)]
