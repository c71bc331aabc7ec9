"""A Mesos TaskGroupInfo, as a framework writes it, runs unmodified."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

GROUP: dict[str, Any] = {
    "tasks": [
        {
            "name": "writer",
            "task_id": {"value": "shop.writer"},
            "agent_id": {"value": "0c7f-S3"},
            "resources": [{"name": "disk", "type": "SCALAR", "scalar": {"value": 64}}],
            "command": {
                "shell": False,
                "value": "/bin/sh",
                "arguments": ["sh", "-c", "echo $GREETING > logs/line; mv logs/line logs/done"],
                "environment": {"variables": [{"name": "GREETING", "type": "VALUE", "value": "hello"}]},
            },
            "container": {
                "type": "MESOS",
                "volumes": [
                    {
                        "container_path": "logs",
                        "mode": "RW",
                        "source": {"type": "SANDBOX_PATH", "sandbox_path": {"type": "PARENT", "path": "logs"}},
                    }
                ],
            },
        },
        {
            "name": "reader",
            "task_id": {"value": "reader"},
            "command": {"value": "until test -e /logs/done; do sleep 0.05; done; cat /logs/done; touch /logs/x || exit 3"},
            "container": {
                "type": "MESOS",
                "volumes": [
                    {
                        "container_path": "/logs",
                        "mode": "RO",
                        "source": {"type": "SANDBOX_PATH", "sandbox_path": {"type": "PARENT", "path": "logs"}},
                    }
                ],
            },
            "kill_policy": {"grace_period": {"nanoseconds": 500000000}},
            "labels": {"labels": [{"key": "tier", "value": "back"}]},
        },
    ]
}


def test_it_runs_to_its_end_with_its_volumes_and_environment(canary: Any) -> None:
    before = canary.census()

    answer = canary.world.meso("run", "--json", "--name", "shop", "-", given=json.dumps(GROUP))

    assert answer.code == 3, (answer.out, answer.err)  # the reader's, who may not write
    output = {line["stream"]: line["data"] for line in answer.lines if line["type"] == "output"}
    assert output["stdout"] == "hello\n"
    assert "Read-only" in output["stderr"]
    end = answer.lines[-1]
    assert end["id"] == "shop"
    ends = {name: wait["exit"] for name, wait in end["containers"].items() if name != "shop"}
    (escaped,) = ends.keys() - {"shop.reader"}
    assert escaped.startswith("shop.shop-writer")  # a dot is the separator of our ids
    assert ends == {escaped: 0, "shop.reader": 3}
    assert canary.world.meso("rm", "shop").code == 0
    assert left_over(before) == []


def test_a_field_that_cannot_be_honoured_is_refused_by_its_path(canary: Any) -> None:
    group = json.loads(json.dumps(GROUP))
    group["tasks"][1]["container"]["docker"] = {"image": "nginx"}
    before = canary.census()

    answer = canary.world.meso("run", "--json", "-", given=json.dumps(group))

    assert answer.code == 2
    assert answer.error["path"].startswith("$.tasks[1].container")
    assert left_over(before) == []
