"""Runs of effects, resolving, faults: the small parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesocosm.kernel.contracts import EffectContext
from mesocosm.kernel.core.errors import LaunchError, SpecError, UnsupportedError
from mesocosm.kernel.core.plan import Effect, Fact, Grant, Plan, Step, merge, resolve_steps
from mesocosm.kernel.core.transaction import Run
from mesocosm.kernel.runtime.effects import check, failure, runs_of
from mesocosm.kernel.runtime.faults import Faults
from mesocosm.kernel.runtime.kinds import DirectoryKind
from mesocosm.kernel.testing.simulation import simulated_host


class Slow:
    """A kind with a deadline."""

    deadline = 1.0


KINDS = {"quick": object(), "slow": Slow()}


def test_quick_neighbours_are_one_run_and_slow_ones_go_beside_each_other() -> None:
    kinds = ["quick", "quick", "slow", "slow", "quick", "slow"]
    effects = [Effect(kind) for kind in kinds]
    assert runs_of(effects, KINDS) == (  # type: ignore[arg-type]
        Run(0, 2), Run(2, 3, (0,)), Run(3, 4, (0,)), Run(4, 5, (0, 1, 2)), Run(5, 6, (0, 3)),
    )  # fmt: skip
    assert runs_of([], {}) == ()


def test_a_slow_effect_waits_for_the_facts_it_uses() -> None:
    effects = [Effect("slow"), Effect("slow", {"deep": [{"of": Fact(0, "name")}]}), Effect("slow")]
    assert [run.after for run in runs_of(effects, KINDS)] == [(), (0,), ()]  # type: ignore[arg-type]


def test_steps_without_references_are_passed_on_as_they_are() -> None:
    plain, fact = (
        Step("tmpfs", {"target": "/t"}),
        Step("bind", {"fd": Fact(0, "fd"), "deep": [Grant("uid_base")], "target": "/x"}, "p"),
    )
    plan = merge("x", {}, [("p", Plan(setup=(plain, fact)))])
    assert plan.referring == (1,)
    first, second = resolve_steps(plan, [{"fd": 7}], {"uid_base": 5})
    plain = plan.setup[0]
    assert first is plain
    assert (second.args, second.plugin) == ({"fd": 7, "deep": [5], "target": "/x"}, "p")


def test_an_effect_that_nobody_can_make_is_refused_before_anything_is_made() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check([Effect("magic", plugin="p")], {}, "x")
    assert caught.value.fields["plugin"] == "p"


def test_any_exception_of_an_effect_becomes_an_error_that_says_whose() -> None:
    effect = Effect("thing", {"path": "/x"}, plugin="p")
    for error, code in (
        (OSError(28, "No space left on device"), "launch_failed"),
        (ValueError("x"), "internal"),
        (LaunchError("y"), "launch_failed"),
    ):
        made = failure(error, effect, 3, "web.a")
        assert made.code == code
        assert (made.fields["id"], made.fields["plugin"], made.fields["step"]["index"]) == ("web.a", "p", 3)


@pytest.mark.parametrize("text", ["effect", "effect:x", "step:a", "member:", "boom:1"])
def test_a_fault_that_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        Faults(text)


def test_faults_strike_once() -> None:
    faults = Faults("effect:2")
    faults.strike("effect", "first")
    faults.strike("member", "another kind")
    with pytest.raises(LaunchError):
        faults.strike("effect", "second")
    faults.strike("effect", "third")
    for kind in ("step", "row"):
        inside = Faults(f"{kind}:a:4")
        assert (inside.inside("b"), inside.inside("a"), inside.inside("a")) == (None, (kind, 4), None)


def test_a_fresh_directory_has_nothing_of_whoever_had_the_name_before(tmp_path: Path) -> None:
    path = tmp_path / "containers"
    (path / "sandbox").mkdir(parents=True)
    (path / "stdout").write_text("somebody's secret")
    context = EffectContext(simulated_host(), "x")

    DirectoryKind().do({"path": str(path), "mode": 0o750}, context)
    kept = sorted(entry.name for entry in path.iterdir())
    DirectoryKind().do({"path": str(path), "mode": 0o750, "fresh": True}, context)

    assert kept == ["sandbox", "stdout"]
    assert list(path.iterdir()) == []
