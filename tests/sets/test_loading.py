"""Loading by allow-list: what is not named is not imported, what is broken is reported, what is doubled is named."""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, EntryPoint
from os import PathLike
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.contracts import ContainerSpec, HostFacts
from mesocosm.kernel.core.errors import InternalError, MesoError
from mesocosm.kernel.sets import loading
from mesocosm.kernel.sets.planning import Planner
from mesocosm.kernel.sets.selection import Selection

GOOD = """
from mesocosm.kernel import hookimpl, Plan, Effect, Step
@hookimpl
def plan(container, host):
    return Plan(effects=[Effect("directory", {"path": f"{host.run_dir}/{container.id}"})], setup=[Step("barrier")])
@hookimpl
def checks(host):
    return []
"""
BAD = {
    "raises": "raise ValueError('broken on import')",
    "misspelt": "from mesocosm.kernel import hookimpl\n@hookimpl\ndef plam(container): pass",
    "wrong_argument": "from mesocosm.kernel import hookimpl\n@hookimpl\ndef plan(kontainer): pass",
    "no_plan": "x = 1",
    "exits": "import missing_module_of_somebody",
}


class OneDistribution(Distribution):
    """A distribution that exists by its name."""

    def __init__(self, name: str) -> None:
        self._given = name

    @property
    def metadata(self) -> Any:
        """Name and version."""
        return {"Name": self._given, "Version": "1.0"}

    def read_text(self, filename: str) -> str | None:
        """Nothing."""
        return None

    def locate_file(self, path: str | PathLike[str]) -> Any:
        """Nowhere."""
        return Path(path)


def point(name: str, module: str, distribution: str = "dist", kind: str = "isolators") -> EntryPoint:
    """An entry point of a distribution."""
    made = EntryPoint(name, module, f"mesocosm.{kind}")
    vars(made)["dist"] = OneDistribution(distribution)
    return made


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules to load, in a directory of their own."""
    (tmp_path / "meso_good.py").write_text(GOOD)
    (tmp_path / "meso_unnamed.py").write_text("raise SystemExit('nobody may import this')")
    for name, text in BAD.items():
        (tmp_path / f"meso_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [found for found in sys.modules if found.startswith("meso_")]:
        del sys.modules[name]
    return tmp_path


def test_what_a_set_does_not_name_is_not_imported() -> None:
    plugins = loading.load_selection(Selection(isolators=("good",)), [point("good", "meso_good"), point("other", "meso_unnamed")])
    assert [line["name"] for line in plugins.report] == ["good"]
    assert plugins.report[0] == {
        "kind": "isolators",
        "name": "good",
        "distribution": "dist",
        "version": "1.0",
        "set": "default",
        "loaded": True,
        "error": None,
    }
    assert "meso_unnamed" not in sys.modules


@pytest.mark.parametrize("bad", [*BAD, "absent"])
def test_a_broken_plugin_is_reported_and_stops_nobody(bad: str) -> None:
    points = [point("good", "meso_good"), *([point(bad, f"meso_{bad}")] if bad in BAD else [])]
    plugins = loading.load_selection(Selection(isolators=(bad, "good")), points)
    broken, good = plugins.report
    assert not broken["loaded"]
    assert broken["error"]
    assert good["loaded"]
    assert Planner(plugins, HostFacts()).plan(ContainerSpec(id="x"), None).effects[0].plugin == "good"


def test_a_required_plugin_that_is_broken_is_an_error_with_its_name() -> None:
    with pytest.raises(InternalError) as caught:
        loading.load_selection(Selection(isolators=("raises",), required=("raises",)), [point("raises", "meso_raises")])
    assert caught.value.fields["plugin"] == "raises"
    assert "broken on import" in caught.value.fields["have"]


def test_two_distributions_with_one_name_are_both_named() -> None:
    points = [point("good", "meso_good", "first"), point("good", "meso_good2", "second")]
    plugins = loading.load_selection(Selection(isolators=("good",)), points)
    assert "first and second" in plugins.report[0]["error"]


def test_a_planner_asks_in_the_sets_order_and_names_who_is_wrong(modules: Path) -> None:
    (modules / "meso_late.py").write_text(GOOD.replace("directory", "log"))
    (modules / "meso_bug.py").write_text("from mesocosm.kernel import hookimpl\n@hookimpl\ndef plan(container):\n    return 1 / 0")
    (modules / "meso_odd.py").write_text("from mesocosm.kernel import hookimpl\n@hookimpl\ndef plan(container):\n    return 'x'")
    points = [point(name, f"meso_{name}") for name in ("good", "late", "bug", "odd")]
    for order in (("good", "late"), ("late", "good")):
        plan = Planner(loading.load_selection(Selection(isolators=order), points), HostFacts()).plan(ContainerSpec(id="x"), None)
        assert tuple(effect.plugin for effect in plan.effects) == order
    for wrong in ("bug", "odd"):
        planner = Planner(loading.load_selection(Selection(isolators=("good", wrong)), points), HostFacts())
        with pytest.raises(MesoError) as caught:
            planner.plan(ContainerSpec(id="x"), None)
        assert caught.value.fields["plugin"] == wrong
        assert caught.value.fields["id"] == "x"


def test_set_files_are_read_from_directories_the_weakest_first(tmp_path: Path) -> None:
    for name, text in (("a", '[set.mine]\nisolators = ["good"]\n'), ("b", "[set.mine]\nisolators = []\n")):
        folder = tmp_path / name / "sets.d"
        folder.mkdir(parents=True)
        (folder / "mine.toml").write_text(text)
    points = [point("good", "meso_good")]
    assert loading.load("mine", [str(tmp_path / "b"), str(tmp_path / "a")], points).report
    assert not loading.load("mine", [str(tmp_path / "a"), str(tmp_path / "b")], points).report
