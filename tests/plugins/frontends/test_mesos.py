"""Mesos's TaskGroupInfo, unmodified, becomes a pod; what cannot be honoured is refused or listed."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.core.containers import task_container
from mesocosm.kernel.core.errors import MesoError
from mesocosm.kernel.core.names import check_name
from mesocosm.kernel.core.spec import parse_pod
from mesocosm.plugins.executors import default
from mesocosm.plugins.frontends.mesos import escape, translate

# As a framework writes it for the default executor: a web server with a log shipper beside it.
GROUP = json.loads("""
{
  "tasks": [
    {
      "name": "nginx",
      "task_id": {"value": "shop_web.instance-4f1c.nginx"},
      "agent_id": {"value": "0c7f-S3"},
      "resources": [
        {"name": "cpus", "type": "SCALAR", "scalar": {"value": 0.5}},
        {"name": "mem", "type": "SCALAR", "scalar": {"value": 128}},
        {"name": "disk", "type": "SCALAR", "scalar": {"value": 64}},
        {"name": "ports", "type": "RANGES", "ranges": {"range": [{"begin": 31000, "end": 31001}]}}
      ],
      "limits": {"cpus": {"value": 2}, "mem": {"value": 256}},
      "command": {
        "shell": false, "value": "/usr/sbin/nginx", "arguments": ["nginx", "-g", "daemon off;"],
        "environment": {"variables": [{"name": "PORT", "type": "VALUE", "value": "31000"}, {"name": "STAGE", "value": "live"}]},
        "user": "www-data"
      },
      "container": {
        "type": "MESOS",
        "volumes": [
          {"container_path": "/var/www", "mode": "RO", "source": {"type": "HOST_PATH", "host_path": {"path": "/srv/www"}}},
          {"container_path": "logs", "mode": "RW", "source": {
            "type": "SANDBOX_PATH", "sandbox_path": {"type": "PARENT", "path": "logs"}}},
          {"container_path": "/cache", "mode": "RW", "source": {
            "type": "SANDBOX_PATH", "sandbox_path": {"type": "SELF", "path": "c"}}}
        ],
        "rlimit_info": {"rlimits": [{"type": "RLMT_NOFILE", "soft": 1024, "hard": 4096}]}
      },
      "kill_policy": {"grace_period": {"nanoseconds": 5500000000}},
      "health_check": {"type": "COMMAND", "command": {"value": "true"}},
      "labels": {"labels": [{"key": "tier", "value": "front"}, {"key": "canary"}]}
    },
    {
      "name": "shipper",
      "task_id": {"value": "shipper"},
      "resources": [
        {"name": "cpus", "type": "SCALAR", "scalar": {"value": 0.1}, "role": "*"},
        {"name": "mem", "type": "SCALAR", "scalar": {"value": 32.5}}
      ],
      "limits": {"cpus": {"value": "Infinity"}},
      "command": {"value": "tail -F /logs/access.log | ship"},
      "container": {
        "type": "MESOS",
        "volumes": [
          {"container_path": "/logs", "mode": "RO", "source": {
            "type": "SANDBOX_PATH", "sandbox_path": {"type": "PARENT", "path": "logs"}}}
        ]
      }
    }
  ]
}
""")


def read(document=GROUP):
    found = translate(document, "shop")
    assert found is not None
    return found


def but(change):
    document = copy.deepcopy(GROUP)
    change(document["tasks"][0])
    return document


def test_it_becomes_a_pod_that_our_own_rules_accept():
    pod = parse_pod(read().pod)
    assert pod.name == "shop"
    web, shipper = pod.tasks
    assert web.command == ["/usr/sbin/nginx", "-g", "daemon off;"]
    assert shipper.command == "tail -F /logs/access.log | ship"
    assert web.env == {"PORT": "31000", "STAGE": "live"}
    assert web.user == "www-data"
    assert web.kill.grace == "5500ms"
    assert web.limits == {"nofile": [1024, 4096]}
    assert len(default.executor().arrange(pod)) == 3


def test_limits_win_over_resources_and_infinity_is_no_limit():
    pod = parse_pod(read().pod)
    root = default.executor().arrange(pod)[0]
    web, shipper = (task_container(task, root, "$") for task in pod.tasks)
    assert (web.cpus, web.memory) == (2000, 256 * 2**20)
    assert (shipper.cpus, shipper.memory) == (None, int(32.5 * 2**20))


def test_ids_outside_our_grammar_are_rewritten_and_kept():
    web, shipper = read().pod["tasks"]
    check_name(web["name"], "$")
    assert web["name"].startswith("shop_web-instance-4f1c-nginx-")
    assert web["labels"]["mesos.id"] == "shop_web.instance-4f1c.nginx"
    assert web["labels"]["tier"] == "front"
    assert shipper["name"] == "shipper"
    assert shipper["labels"] == {}


def test_the_sandbox_of_the_parent_is_a_volume_that_the_pod_shares():
    web, shipper = read().pod["tasks"]
    assert web["volumes"][0] == {"source": "host:/srv/www", "target": "/var/www", "read_only": True}
    assert web["volumes"][1] == {"source": "shared:logs", "target": "/sandbox/logs"}
    assert shipper["volumes"] == [{"source": "shared:logs", "target": "/logs", "read_only": True}]


def test_a_path_of_its_own_sandbox_is_one_directory_at_two_places():
    *_, inside, outside = read().pod["tasks"][0]["volumes"]
    assert inside["source"] == outside["source"]
    assert (inside["target"], outside["target"]) == ("/sandbox/c", "/cache")


def test_what_is_left_out_is_listed_with_its_path():
    assert set(read().ignored) == {
        "$.tasks[0].agent_id", "$.tasks[0].health_check", "$.tasks[0].resources[2]", "$.tasks[0].resources[3]",
        "$.tasks[1].resources[0].role",
    }  # fmt: skip


def test_an_operation_around_the_group_is_understood():
    found = translate({"type": "LAUNCH_GROUP", "executor": {"type": "DEFAULT"}, "task_group": GROUP}, "shop")
    assert found is not None
    assert found.pod == read().pod
    assert {"$.type", "$.executor", "$.task_group.tasks[0].agent_id"} <= set(found.ignored)


@pytest.mark.parametrize(
    "document", [{}, {"name": "x", "tasks": [{"name": "a", "command": ["true"]}]}, {"tasks": "x"}, {"tasks": []}]
)
def test_other_peoples_documents_are_left_to_others(document):
    assert translate(document, "x") is None


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda task: task.update(colour="red"), "$.tasks[0].colour"),
        (lambda task: task.update(executor={}), "$.tasks[0].executor"),
        (lambda task: task.update(max_completion_time={}), "$.tasks[0].max_completion_time"),
        (lambda task: task.update(task_id={}), "$.tasks[0].task_id.value"),
        (lambda task: task.update(task_id=7), "$.tasks[0].task_id"),
        (lambda task: task.pop("command"), "$.tasks[0].command"),
        (lambda task: task["command"].update(uris=[{"value": "http://x"}]), "$.tasks[0].command.uris"),
        (
            lambda task: task["command"]["environment"]["variables"][0].update(type="SECRET"),
            "$.tasks[0].command.environment.variables[0].type",
        ),
        (
            lambda task: task["resources"].append({"name": "gpus", "type": "SCALAR", "scalar": {"value": 1}}),
            "$.tasks[0].resources[4]",
        ),
        (lambda task: task["resources"][0]["scalar"].update(value=-1), "$.tasks[0].resources[0].scalar.value"),
        (lambda task: task["resources"][0]["scalar"].update(value="NaN"), "$.tasks[0].resources[0].scalar.value"),
        (lambda task: task["limits"]["mem"].update(value=True), "$.tasks[0].limits.mem.value"),
        (lambda task: task["container"].update(type="DOCKER"), "$.tasks[0].container.type"),
        (lambda task: task["container"].update(mesos={"image": {}}), "$.tasks[0].container.mesos"),
        (lambda task: task["container"]["volumes"][0].update(mode="XX"), "$.tasks[0].container.volumes[0].mode"),
        (
            lambda task: task["container"]["volumes"][0]["source"].update(type="SECRET"),
            "$.tasks[0].container.volumes[0].source.type",
        ),
        (
            lambda task: task["container"]["volumes"][1]["source"]["sandbox_path"].update(path="../../etc"),
            "$.tasks[0].container.volumes[1].source.sandbox_path.path",
        ),
        (lambda task: task["kill_policy"].update(grace_period={}), "$.tasks[0].kill_policy.grace_period.nanoseconds"),
        (lambda task: task["labels"].update(labels={}), "$.tasks[0].labels.labels"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_documents_own_path(change, path):
    with pytest.raises(MesoError) as caught:
        translate(but(change), "shop")
    assert caught.value.fields["path"] == path
    assert caught.value.exit_code == 2


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_id_becomes_a_name_and_different_ids_different_names(one, other):
    check_name(escape(one), "$")
    assert (escape(one) == escape(other)) == (one == other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(
                ["tasks", "task_id", "value", "command", "resources", "name", "type", "scalar", "container", "volumes", "labels"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_anything_at_all_is_translated_or_refused(value):
    document = {
        "tasks": [{"task_id": {"value": "a"}, "command": {"value": "true"}, **(value if isinstance(value, dict) else {"x": value})}]
    }
    try:
        translate(document, "g")
    except MesoError as error:
        path = error.fields["path"]
        assert path.startswith("$.tasks[0]")
