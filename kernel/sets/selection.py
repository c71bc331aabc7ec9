"""Which plug-ins a set names, in which order: the merging of set files. Pure: texts in, a Selection out.

Files are given by precedence, the weakest first, as systemd's presets are: a file replaces all weaker ones of the
same name, an empty file thereby masks them, and what remains is read in the order of names within each layer. A
table ``[set.NAME]`` of a stronger file replaces the keys it has, list by list; lists are never joined, because the
order of isolators is the planning order.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from mesocosm.kernel.core.errors import SpecError

DEFAULT = "default"
KINDS = ("isolators", "providers", "executors", "allocators", "frontends")


class SetFile(NamedTuple):
    """One file: its path, for errors; the name that stronger files replace it by; its text."""

    path: str
    name: str
    text: str


class Selection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a set names. Names are those of entry points; `required` may hold names of any kind."""

    isolators: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    executors: tuple[str, ...] = ()
    allocators: tuple[str, ...] = ()
    frontends: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    name: str = DEFAULT

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The names of one of KINDS."""
        names: tuple[str, ...] = getattr(self, kind)
        return names


def select(files: Sequence[SetFile], name: str | None = None) -> Selection:
    """The set `name` (None: the default one); SpecError that names the file, or the sets that there are."""
    wanted = name or DEFAULT
    merged: dict[str, dict[str, Any]] = {}
    for file in _unmasked(files):
        for key, table in _tables(file).items():
            merged.setdefault(key, {}).update(table)
    if wanted not in merged:
        raise SpecError(
            f"there is no plug-in set {wanted[:63]!r}",
            path="--set",
            have=wanted[:63],
            need=" or ".join(sorted(merged)) or "a set file",
        )
    try:
        selection = msgspec.convert({**merged[wanted], "name": wanted}, Selection)
    except msgspec.ValidationError as error:
        raise SpecError(f"the set {wanted!r} is wrong: {error}", path=f"set.{wanted}") from None
    _check_names(selection)
    return selection


def _unmasked(files: Sequence[SetFile]) -> list[SetFile]:
    strongest = {file.name: index for index, file in enumerate(files)}
    return [file for index, file in enumerate(files) if strongest[file.name] == index and file.text.strip()]


def _tables(file: SetFile) -> dict[str, dict[str, Any]]:
    try:
        document = tomllib.loads(file.text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"not TOML: {error}", path=file.path) from None
    tables = document.get("set")
    if set(document) - {"set"} or not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise SpecError("a set file holds tables [set.NAME] and nothing else", path=file.path)
    known = {*KINDS, "required"}
    for name, table in tables.items():
        if unknown := sorted(set(table) - known):
            raise SpecError(
                f"{unknown[0]!r} is not a key of a set",
                path=f"{file.path}: set.{name}",
                hint=f"the keys are {' '.join(sorted(known))}",
            )
    return tables


def _check_names(selection: Selection) -> None:
    named: set[str] = set()
    for kind in KINDS:
        names = selection.of_kind(kind)
        for name in names:
            if names.count(name) > 1:
                raise SpecError(f"{name!r} is named twice", path=f"set.{selection.name}.{kind}")
        named.update(names)
    for name in selection.required:
        if name not in named:
            raise SpecError(f"{name!r} is required but not named in any list", path=f"set.{selection.name}.required")
