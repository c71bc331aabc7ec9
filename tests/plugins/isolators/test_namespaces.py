"""Which namespaces a container owns, enters or leaves alone, in every combination that differs."""

from __future__ import annotations

import pytest

from mesocosm.kernel.contracts import Grant
from mesocosm.kernel.core.errors import UnsupportedError
from mesocosm.kernel.core.plan import STAGES
from mesocosm.kernel.testing import HOSTS
from mesocosm.plugins.isolators import namespaces

HOST_SHARES = dict.fromkeys(("user", "mount", "pid", "uts", "ipc", "net", "cgroup", "time"), "host")


def test_a_pod_owns_everything_but_the_clock(p):
    plan = p.ask(namespaces, p.pod())
    assert p.args(plan, "clone") == {"namespaces": ["mount", "pid"]}
    assert p.args(plan, "unshare") == {"namespaces": ["cgroup"]}
    assert p.args(plan, "own") == {"namespaces": ["net", "ipc", "uts"]}
    assert p.args(plan, "new_user") == {"base": Grant("uid_base"), "count": Grant("uid_count")}
    assert not p.steps(plan, "join")


def test_a_task_is_born_in_the_pods_process_ids_and_shares_network_ipc_and_users(p):
    plan = p.ask(namespaces, p.task())
    assert p.args(plan, "clone") == {"namespaces": ["mount", "pid"]}
    assert p.args(plan, "join") == {"namespaces": ["pid", "ipc", "net"], "of": "web"}
    assert p.args(plan, "join_user") == {"of": "web", "count": Grant("uid_count")}
    assert p.args(plan, "own") == {"namespaces": ["uts"]}
    assert not p.steps(plan, "new_user")
    assert not p.steps(plan, "loopback"), "the network is the pod's: its loopback is up"


def test_users_come_after_all_that_they_must_have_no_power_over(p):
    order = [STAGES.index(step.stage) for step in p.whole(p.single()).setup]
    assert order == sorted(order)
    assert STAGES.index("pivot") < STAGES.index("user") < STAGES.index("own")


def test_a_pod_on_the_hosts_network_makes_none_and_its_tasks_join_none(p):
    pod = p.pod(network="host")
    assert p.args(p.ask(namespaces, pod), "own") == {"namespaces": ["ipc", "uts"]}
    task = p.ask(namespaces, p.task(), parent=p.whole(pod))
    assert "net" not in p.args(task, "join")["namespaces"]


@pytest.mark.parametrize("network", ["pod", "none"])
def test_a_pod_with_its_own_network_has_its_loopback_up(p, network):
    assert p.steps(p.ask(namespaces, p.pod(network=network)), "loopback")


def test_a_parent_that_itself_shares_the_hosts_is_not_joined(p):
    bare = p.whole(p.single(id="web", namespaces=HOST_SHARES, has_children=True))
    assert bare.unshared == frozenset()
    plan = p.ask(namespaces, p.task(namespaces={"pid": "parent", "net": "parent", "ipc": "parent"}), parent=bare)
    assert not p.steps(plan, "join"), "entering the host's from the host would be an error"
    assert not p.steps(plan, "join_user")


def test_a_root_container_that_shares_with_its_parent_shares_with_the_host(p):
    plan = p.ask(namespaces, p.single(namespaces={**HOST_SHARES, "net": "parent", "user": "parent"}))
    assert [step.kind for step in plan.setup] == ["clone", "join", "session"]
    assert p.args(plan, "join") == {"namespaces": ["mount"], "of": "host"}


def test_three_levels_down_the_users_are_still_the_pods(p):
    app = p.task(tasks=[{"name": "b", "command": ["true"]}])
    plan = p.whole(app, p.whole(p.pod()))
    helper = p.ask(namespaces, p.task(parent=app), parent=plan)
    assert p.args(helper, "join_user")["of"] == "web.a"
    assert p.args(helper, "join")["namespaces"] == ["pid", "ipc", "net"]


def test_users_of_its_own_below_users_of_its_own_are_refused_with_the_field(p):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(namespaces, p.task(namespaces={"user": "own"}))
    assert caught.value.fields["path"] == "$.tasks[0].namespaces.user"
    assert "hint" in caught.value.fields


def test_the_mounts_of_a_pod_that_only_waits_cannot_be_shared(p):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(namespaces, p.task(namespaces={"mount": "parent"}))
    assert caught.value.fields["path"] == "$.tasks[0].namespaces.mount"


def test_the_mounts_of_a_program_can_be_shared(p):
    app = p.whole(p.task(tasks=[{"name": "b", "command": ["true"]}]), p.whole(p.pod()))
    plan = p.ask(namespaces, p.task(namespaces={"mount": "parent"}), parent=app)
    assert "mount" in p.args(plan, "join")["namespaces"]
    assert p.args(plan, "clone") == {"namespaces": ["pid"]}


def test_a_kind_that_the_kernel_lacks_is_refused_with_the_field(p):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(namespaces, p.task(namespaces={"time": "own"}), host=HOSTS["root, old kernel"], parent=p.whole(p.pod()))
    assert caught.value.fields["path"] in ("$.tasks[0].namespaces.cgroup", "$.tasks[0].namespaces.time")


def test_doctor_names_what_is_missing():
    failed = [check for check in namespaces.checks(host=HOSTS["root, old kernel"]) if not check.ok]
    assert [check.check for check in failed] == ["namespaces"]
    assert "time" in failed[0].hint
