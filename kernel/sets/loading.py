"""Loading what a set names: entry points by allow-list, one by one, each failure its own.

What lives here: reading set files, importing plug-ins, registering them with pluggy. Theory: an installed package is
not a used one. Nothing that the set does not name is imported; a plug-in that cannot be loaded is reported with its
distribution and its error and stops nothing, unless the set says that it is required.
"""

from __future__ import annotations

import importlib.metadata
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, NamedTuple

import pluggy

from mesocosm.kernel import hookspecs
from mesocosm.kernel.contracts import Check, EffectKind, Executor, HostFacts, SlowEffectKind
from mesocosm.kernel.core.errors import ConflictError, InternalError, MesoError, SpecError
from mesocosm.kernel.sets.selection import KINDS, Selection, SetFile, select

_PACKAGED = os.path.join(os.path.dirname(__file__), "default.toml")


class Loaded(NamedTuple):
    """One plug-in: its name in the set and its module (or whatever the entry point names)."""

    name: str
    plugin: Any


class Plugins:
    """All that a set brought: by kind, in the set's order, and a report line for each that it names."""

    def __init__(self) -> None:
        self.isolators: list[Loaded] = []
        self.frontends: list[Loaded] = []
        self.executors: dict[str, Executor] = {}
        self.kinds: dict[str, EffectKind | SlowEffectKind] = {}
        self.report: list[dict[str, Any]] = []
        self.set_name = "default"
        self.manager = pluggy.PluginManager("mesocosm")
        self.manager.add_hookspecs(hookspecs)

    def implementations(self, loaded: Loaded, hook: str) -> list[pluggy.HookImpl]:
        """What a plug-in implements of a hook (one function, or none)."""
        return [found for found in getattr(self.manager.hook, hook).get_hookimpls() if found.plugin is loaded.plugin]

    def checks(self, host: HostFacts) -> list[Check]:
        """The plug-ins' lines for ``meso doctor``; one that fails is a failed check."""
        found: list[Check] = []
        for loaded in (*self.isolators, *self.frontends):
            for implementation in self.implementations(loaded, "checks"):
                try:
                    found.extend(ask(implementation, {"host": host}))
                except Exception as error:
                    found.append(
                        Check(loaded.name, ok=False, have=f"{type(error).__name__}: {error}", hint="a bug of this plug-in")
                    )
        return found

    def take(self, kind: str, name: str, plugin: Any) -> None:
        """Registers a plug-in, with everything it offers or with nothing; raises what is wrong with it."""
        self.manager.register(plugin, name=f"{kind}:{name}")
        try:
            self.manager.check_pending()
            loaded = Loaded(name, plugin)
            kinds = {
                made.name: made
                for implementation in self.implementations(loaded, "effect_kinds")
                for made in ask(implementation, {})
            }
            executors = {
                made.name: made for implementation in self.implementations(loaded, "executor") for made in [ask(implementation, {})]
            }
            for what, have, new in (("effect kind", self.kinds, kinds), ("executor", self.executors, executors)):
                if twice := sorted(have.keys() & new.keys()):
                    raise ConflictError(f"the {what} {twice[0]!r} is there already", have=type(have[twice[0]]).__module__)
            if kind == "isolators" and not self.implementations(loaded, "plan"):
                raise InternalError("an isolator needs a hookimpl `plan`")
        except Exception:
            self.manager.unregister(plugin)
            raise
        self.kinds.update(kinds)
        self.executors.update(executors)
        if kind == "isolators":
            self.isolators.append(loaded)
        elif kind == "frontends":
            self.frontends.append(loaded)


def ask(implementation: pluggy.HookImpl, arguments: Mapping[str, Any]) -> Any:
    """Calls one implementation with those of the hook's arguments that it takes."""
    return implementation.function(*[arguments[name] for name in implementation.argnames])


def read_set_files(config_dirs: Sequence[str]) -> list[SetFile]:
    """The packaged file, then ``DIR/sets.d/*.toml`` of each directory, the weakest directory first."""
    files = [_read(_PACKAGED)]
    for directory in config_dirs:
        folder = os.path.join(directory, "sets.d")
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".toml"))
        except OSError:
            continue
        files.extend(_read(os.path.join(folder, name)) for name in names)
    return files


def _read(path: str) -> SetFile:
    try:
        with open(path, encoding="utf-8") as file:
            return SetFile(path, os.path.basename(path), file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"a set file cannot be read: {error}", path=path) from None


def load(name: str | None = None, config_dirs: Sequence[str] = (), entry_points: Iterable[EntryPoint] | None = None) -> Plugins:
    """The plug-ins of the set `name`. InternalError, with the traceback's last line, if a required one cannot be loaded.

    `entry_points`: instead of those installed, for tests.
    """
    selection = select(read_set_files(config_dirs), name)
    return load_selection(selection, installed() if entry_points is None else entry_points)


def installed() -> list[EntryPoint]:
    """All entry points of ours in this environment; none of them is imported by being listed."""
    found = importlib.metadata.entry_points()
    return [point for kind in KINDS for point in found.select(group=f"mesocosm.{kind}")]


def load_selection(selection: Selection, entry_points: Iterable[EntryPoint]) -> Plugins:
    """The plug-ins that a selection names, out of `entry_points`."""
    plugins = Plugins()
    plugins.set_name = selection.name
    found: dict[tuple[str, str], list[EntryPoint]] = {}
    for point in entry_points:
        found.setdefault((point.group.removeprefix("mesocosm."), point.name), []).append(point)
    for kind in KINDS:
        for name in selection.of_kind(kind):
            _load_one(plugins, selection, kind, name, found.get((kind, name), []))
    return plugins


def _load_one(plugins: Plugins, selection: Selection, kind: str, name: str, points: list[EntryPoint]) -> None:
    points = list({(point.value, _origin(point)): point for point in points}.values())
    distribution, version = _origin(points[0]) if points else (None, None)
    line: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "distribution": distribution,
        "version": version,
        "set": selection.name,
        "loaded": False,
        "error": None,
    }
    plugins.report.append(line)
    try:
        if not points:
            raise SpecError(f"no installed distribution has it (entry point mesocosm.{kind}: {name})")
        if len(points) > 1:
            both = " and ".join(str(_origin(point)[0]) for point in points)
            raise ConflictError(f"{both} both have an entry point mesocosm.{kind}: {name}", hint="uninstall one of them")
        plugins.take(kind, name, points[0].load())
    except Exception as error:
        line["error"] = _describe(error)
        if name in selection.required:
            raise InternalError(
                f"the plug-in {name!r} is required by the set {selection.name!r} and cannot be loaded",
                plugin=name,
                target=f"{distribution} {version}" if distribution else None,
                have=str(error) or type(error).__name__,
                hint="meso plugins --set NAME shows another set; reinstall the distribution, or mend the set file",
            ) from error
    else:
        line["loaded"] = True


def _origin(point: EntryPoint) -> tuple[str | None, str | None]:
    distribution = point.dist
    return (distribution.name, distribution.version) if distribution is not None else (None, None)


def _describe(error: Exception) -> str:
    if isinstance(error, MesoError):
        return error.message
    return "".join(traceback.format_exception(error)).strip()


def from_modules(isolators: Mapping[str, Any] | None = None, others: Mapping[str, Any] | None = None) -> Plugins:
    """Plug-ins given as modules or objects, for tests of plug-ins and for the simulated host."""
    plugins = Plugins()
    for name, plugin in (isolators or {}).items():
        plugins.take("isolators", name, plugin)
    for name, plugin in (others or {}).items():
        plugins.take("frontends" if hasattr(plugin, "translate") else "executors", name, plugin)
    return plugins
