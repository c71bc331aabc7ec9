"""Bad input is refused before anything is made: exit 2, the path of the field, nothing changed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system


def pod(**task: Any) -> dict[str, Any]:
    return {"name": "bad", "tasks": [{"name": "t", "command": "true"} | task]}


# (document, path of the field that is wrong)
BAD: list[tuple[Any, str]] = [
    (pod(colour="red"), "$.tasks[0].colour"),
    ({"name": "bad", "tasks": [{"name": "t", "command": "true"}], "colour": 1}, "$.colour"),
    (pod(resources={"memory": "64Mib"}), "$.tasks[0].resources.memory"),
    (pod(resources={"memory": "-1"}), "$.tasks[0].resources.memory"),
    (pod(resources={"cpus": -1}), "$.tasks[0].resources.cpus"),
    (pod(resources={"cpus": float("nan")}), "$.tasks[0].resources.cpus"),
    (pod(resources={"pids": 0}), "$.tasks[0].resources.pids"),
    (pod(name="a/b"), "$.tasks[0].name"),
    (pod(name="..") , "$.tasks[0].name"),
    (pod(command=[]), "$.tasks[0].command"),
    (pod(command=["x\0y"]), "$.tasks[0].command"),
    (pod(kill={"signal": "NOPE"}), "$.tasks[0].kill.signal"),
    (pod(kill={"grace": "3 parsecs"}), "$.tasks[0].kill.grace"),
    (pod(volumes=[{"source": "nfs:x", "target": "/d"}]), "$.tasks[0].volumes[0].source"),
    (pod(volumes=[{"source": "shared:x", "target": "../d"}]), "$.tasks[0].volumes[0].target"),
    (pod(limits={"nofiles": 1}), "$.tasks[0].limits.nofiles"),
    (pod(capabilities=["SYS_GOD"]), "$.tasks[0].capabilities[0]"),
    (pod(namespaces={"net": "theirs"}), "$.tasks[0].namespaces"),
    ({"name": "bad", "tasks": [{"name": "t", "command": "true"}] * 2}, "$.tasks[1].name"),
    ({"name": "a/b", "tasks": [{"name": "t", "command": "true"}]}, "$.name"),
    ({"name": "bad", "tasks": []}, "$.tasks"),
    ({"name": "bad", "tasks": [{"name": f"t{number}", "command": "true"} for number in range(10_000)]}, "$.tasks"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "path"), BAD, ids=[f"{number}-{path}" for number, (_, path) in enumerate(BAD)])
def test_bad_input_names_the_field_and_changes_nothing(canary: Any, document: Any, path: str) -> None:
    before = canary.census()

    answer = canary.world.run(document)

    assert answer.code == 2, (answer.out[:2000], answer.err[:2000])
    assert answer.error["code"] in ("bad_input", "too_large"), answer.error
    assert answer.error.get("path", "").startswith(path), answer.error
    assert set(canary.world.ps()) == canary.ids
    assert left_over(before) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "name = ", "\x00", "null"])
def test_a_file_that_is_no_document_is_refused(canary: Any, text: str) -> None:
    answer = canary.world.meso("run", "--json", "-", given=text)

    assert answer.code == 2, (answer.out, answer.err)
    assert answer.error["message"]


def test_what_is_too_large_for_a_frame_is_refused_in_words(canary: Any) -> None:
    document = pod(env={f"V{number}": "x" * 1000 for number in range(400)})

    answer = canary.world.meso("run", "--json", "-", given=json.dumps(document))

    assert answer.code == 2
    assert answer.error["code"] == "too_large"
    assert answer.error["need"]
    canary.assert_untouched()
