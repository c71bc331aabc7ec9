"""The tree: walks, refusals, and that no history lets a container outlive its parent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.core import names, states
from mesocosm.kernel.core.errors import ConflictError, DyingError, MesoError, NotFoundError
from mesocosm.kernel.core.states import State
from mesocosm.kernel.core.tree import Tree


def planted(*ids: str) -> Tree:
    tree = Tree()
    for container_id in ids:
        tree.adopt(container_id, State.RUNNING)
    return tree


def test_walks_start_at_the_parent_and_stop_at_the_children() -> None:
    tree = planted("a", "a.b", "a.c", "a.b.d")
    assert list(tree.down("a")) == ["a", "a.b", "a.b.d", "a.c"]
    assert list(tree.up("a")) == ["a.c", "a.b.d", "a.b", "a"]


def test_a_dying_parent_pulls_its_children_along() -> None:
    tree = planted("a", "a.b", "a.b.d")
    assert tree.tell("a", "exited") == [("a", "exited"), ("a.b", "kill"), ("a.b.d", "kill")]


def test_nobody_is_dead_before_its_children() -> None:
    tree = planted("a", "a.b")
    tree.tell("a", "kill")
    with pytest.raises(ConflictError, match="before its children"):
        tree.tell("a", "undone")
    tree.tell("a.b", "undone")
    tree.tell("a", "undone")
    assert tree.state("a") is State.DEAD


def test_a_dying_parent_adopts_nobody() -> None:
    tree = planted("a")
    tree.tell("a", "stop")
    with pytest.raises(DyingError):
        tree.adopt("a.b")
    assert "a.b" not in tree


def test_refusals_name_the_container() -> None:
    tree = planted("a", "a.b")
    with pytest.raises(ConflictError):
        tree.adopt("a")
    with pytest.raises(NotFoundError):
        tree.adopt("x.y")
    with pytest.raises(ConflictError):
        tree.detach("a")


IDS = ["a", "a.b", "a.c", "a.b.d", "a.b.d.e"]
EVENTS = ["prepare", "staged", "released", "stop", "kill", "exited", "failed", "undone"]


@given(st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(["adopt", "detach", *EVENTS])), max_size=60))
def test_no_history_lets_a_container_outlive_its_parent(history: list[tuple[str, str]]) -> None:
    tree = Tree()
    for container_id, event in history:
        before = {found: tree.state(found) for found in tree}
        try:
            if event == "adopt":
                tree.adopt(container_id)
            elif event == "detach":
                tree.detach(container_id)
            else:
                tree.tell(container_id, event)
        except MesoError:
            assert {found: tree.state(found) for found in tree} == before, "a refusal changes nothing"
        for found in tree:
            parent = names.parent_of(found)
            if parent is not None:
                assert parent in tree
                assert tree.state(parent) is not State.DEAD or tree.state(found) is State.DEAD
                if tree.state(parent) is State.DESTROYING:
                    assert tree.state(found) in (State.DESTROYING, State.DEAD)


def test_every_living_state_accepts_a_kill() -> None:
    for state, events in states.CONTAINER.items():
        assert ("kill" in events) == (state is not State.DEAD)
