"""What a pod file may not say, and how that is told."""

from __future__ import annotations

from typing import Any

import pytest

from mesocosm.kernel.core.errors import SpecError
from mesocosm.kernel.core.spec import parse_pod

TASK = {"name": "a", "command": "true"}
POD = {"name": "web", "tasks": [TASK]}


@pytest.mark.parametrize(
    ("more", "path", "words"),
    [
        ({"network": "foo"}, "$.network", ("pod", "host", "none")),
        ({"namespaces": {"pid": "mine"}}, "$.namespaces[...]", ("own", "parent", "host")),
        ({"tasks": [{**TASK, "namespaces": {"pid": "mine"}}]}, "$.tasks[0].namespaces[...]", ("own", "parent", "host")),
    ],
)
def test_a_word_that_is_none_of_those_which_are_meant_is_told_with_these(more: dict[str, Any], path: str, words: Any) -> None:
    with pytest.raises(SpecError) as caught:
        parse_pod({**POD, **more})
    assert caught.value.fields["path"] == path
    assert caught.value.fields["need"] == " or ".join(map(repr, words))
    assert "'foo'" in caught.value.message or "'mine'" in caught.value.message


def test_a_name_that_is_nearly_right_is_told_what_it_may_have_meant() -> None:
    with pytest.raises(SpecError) as caught:
        parse_pod({**POD, "netwrok": "pod"})
    assert caught.value.fields["path"] == "$.netwrok"
    assert "'network'" in caught.value.fields["hint"]
