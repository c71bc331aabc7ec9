"""Names and container ids: one grammar for every path part mesocosm ever makes.

A *name* labels one member of one parent. A container *id* is the chain of names from the root container
down, joined by dots (``web.db.dump``), so the whole ancestry is the identity and a parent can be read off
without asking anybody. Names become directory and cgroup names; the grammar therefore has no ``/``, no
``.``, no leading dash and a length that leaves room for suffixes.
"""

from __future__ import annotations

import re

from mesocosm.kernel.core.errors import SpecError

MAX_DEPTH = 32  # the kernel nests PID and user namespaces 32 deep (pid_namespaces(7), user_namespaces(7))
MAX_NAME = 63
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", re.ASCII)


def check_name(name: str, path: str) -> str:
    """The name itself, or a SpecError that names the field `path` (``$.tasks[0].name``)."""
    if _NAME.fullmatch(name):
        return name
    raise SpecError(
        f"{name[:80]!r} is not a name",
        path=path,
        hint=f"a name is 1 to {MAX_NAME} letters, digits, '-' or '_', and starts with a letter or digit",
    )


def parse_id(text: str, path: str = "$.container_id") -> tuple[str, ...]:
    """The names in a container id, outermost first; SpecError for anything else."""
    names = tuple(text.split(".")) if len(text) <= MAX_DEPTH * (MAX_NAME + 1) else ()
    if not names or len(names) > MAX_DEPTH:
        raise SpecError(
            f"{text[:80]!r} is not a container id",
            path=path,
            have=str(len(text)),
            need=f"1 to {MAX_DEPTH} names joined by dots",
        )
    for name in names:
        check_name(name, path)
    return names


def join(parent: str | None, name: str) -> str:
    """The id of the child `name` of `parent` (None: a root container)."""
    return f"{parent}.{name}" if parent else name


def parent_of(container_id: str) -> str | None:
    """The id one level up, None for a root container."""
    parent, dot, _ = container_id.rpartition(".")
    return parent if dot else None


def leaf_of(container_id: str) -> str:
    """The container's own name."""
    return container_id.rpartition(".")[2]


def root_of(container_id: str) -> str:
    """The id of the outermost container, which is also the name of its group."""
    return container_id.partition(".")[0]


def depth_of(container_id: str) -> int:
    """1 for a root container, 32 at the deepest."""
    return container_id.count(".") + 1


def is_within(container_id: str, ancestor: str) -> bool:
    """Whether `container_id` is `ancestor` itself or lies anywhere below it."""
    return container_id == ancestor or container_id.startswith(ancestor + ".")
