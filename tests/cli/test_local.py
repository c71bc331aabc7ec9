"""Verbs without an agent: what they print, and that they leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.cli import local, plans
from mesocosm.kernel.cli.output import escape_line
from mesocosm.kernel.contracts import Check

PLAN: dict[str, Any] = {
    "v": 1,
    "group": "web",
    "containers": [
        {
            "id": "web",
            "namespaces": {"net": "own", "pid": "own", "time": "host"},
            "effects": [
                {
                    "index": 0, "kind": "directory", "plugin": "sandbox", "args": {"path": "/run/web", "mode": 0o750},
                    "undo": [{"verb": "rmdir", "target": "/run/web"}],
                },
            ],
            "setup": [
                {
                    "index": 0, "stage": "clone", "kind": "into_cgroup", "plugin": "cgroups", "syscall": "clone3",
                    "args": {"fd": {"$fact": [0, "fd"]}, "uid": {"$grant": "uid_base"}, "keep": ["CHOWN"], "x": None, "y": True},
                },
            ],
        }
    ],
}  # fmt: skip


def test_a_plan_in_words_names_effects_undo_steps_and_references() -> None:
    text = "\n".join(plans.plan_lines(PLAN, 120, lambda value: escape_line(str(value)), lambda value, _: value))
    assert "own: net pid   host: time" in text
    assert "directory  sandbox  path=/run/web mode=0750" in text
    assert "undo: rmdir /run/web" in text
    assert "into_cgroup  cgroups  fd=<effect 0: fd> uid=<uid_base> keep=[CHOWN] x=- y=yes" in text
    assert "1 container, 1 effect, 1 step. Nothing has been made" in text
    assert max(map(len, "\n".join(plans.plan_lines(PLAN, 50, str, lambda value, _: value)).splitlines()[:-1])) <= 50


def test_planning_refuses_what_is_no_pod_and_writes_nothing(meso: Any, run_dir: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "x.toml").write_text("name = 'x'\nbogus = 1\n")
    said = meso("plan", "--json", str(tmp_path / "x.toml"))
    assert said.code in (1, 2)  # 1: an environment without our entry points cannot load the set
    assert "error" in json.loads(said.out)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "x.toml"])


@pytest.mark.parametrize("ok", [True, False])
def test_doctor_ends_with_6_if_something_is_missing(ok: bool, meso: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    checks = [Check("kernel", ok=True, have="Linux 6"), Check("limits", ok=ok, have="none", need="delegation", hint="loginctl")]
    monkeypatch.setattr(local, "_checks", lambda _: checks)
    said = meso("doctor")
    assert said.code == (0 if ok else 6)
    assert ("hint: loginctl" in said.out) is not ok
    lines = [json.loads(line) for line in meso("doctor", "--json").out.splitlines()]
    assert lines[1] == {"check": "limits", "ok": ok, "have": "none", "need": "delegation", "hint": "loginctl"}
