"""Which control groups, where, with which limits: on v1, v2, both, and none."""

from __future__ import annotations

import msgspec
import pytest

from mesocosm.kernel.contracts import Fact, Undo
from mesocosm.kernel.core.errors import UnsupportedError
from mesocosm.kernel.core.host import CgroupFacts
from mesocosm.kernel.testing import HOSTS
from mesocosm.plugins.isolators import cgroups

V1, V2, HYBRID, NONE = (HOSTS[f"root, {name}"] for name in ("cgroup v1", "cgroup v2", "hybrid", "no cgroups"))
LIMITS = {"cpus": "500m", "memory": "64MiB", "pids": 32}


def test_v1_has_one_group_for_each_controller_and_the_process_writes_itself_in(p):
    plan = p.ask(cgroups, p.task(resources=LIMITS), host=V1)
    assert [(effect.args["controller"], effect.args["limits"]) for effect in plan.effects] == [
        ("memory", {"memory": 64 * 2**20}),
        ("cpu", {"cpu": 500}),
        ("pids", {"pids": 32}),
    ]
    assert plan.effects[0].args["path"] == "/sys/fs/cgroup/memory/mesocosm-a1b2c3/web/a"
    path = "/sys/fs/cgroup/memory/mesocosm-a1b2c3/web/a"
    assert plan.effects[0].undo == (Undo("kill_cgroup", path), Undo("rmdir_cgroup", path))
    assert [step.args["fd"] for step in p.steps(plan, "attach_cgroup")] == [Fact(0, "tasks"), Fact(1, "tasks"), Fact(2, "tasks")]
    assert not p.steps(plan, "into_cgroup")


def test_controllers_that_are_mounted_together_share_a_group(p):
    facts = CgroupFacts(
        mode="v1", v1={"cpu": "/c/cpu,pids", "pids": "/c/cpu,pids", "memory": "/c/m"}, limits=("cpu", "memory", "pids")
    )
    plan = p.ask(cgroups, p.task(resources=LIMITS), host=msgspec.structs.replace(V1, cgroups=facts))
    assert [effect.args["controller"] for effect in plan.effects] == ["memory", "cpu,pids"]
    assert plan.effects[1].args["limits"] == {"cpu": 500, "pids": 32}


def test_hybrid_limits_in_v1_and_kills_in_v2(p):
    plan = p.ask(cgroups, p.task(resources=LIMITS), host=HYBRID)
    first, *_, last = plan.effects
    assert [undo.verb for undo in first.undo] == ["rmdir_cgroup"]
    path = "/sys/fs/cgroup/unified/mesocosm-a1b2c3/web/a"
    assert (last.kind, last.args) == ("cgroup2", {"path": path, "limits": {}, "controllers": [], "attach": True})
    assert last.undo == (Undo("kill_cgroup", path), Undo("rmdir_cgroup", path))
    assert p.args(plan, "into_cgroup")["fd"] == Fact(3, "fd")


def test_v2_keeps_a_parents_own_processes_in_a_leaf(p):
    pod = p.ask(cgroups, p.pod(resources=LIMITS), host=V2)
    assert [effect.args["path"] for effect in pod.effects] == [
        "/sys/fs/cgroup/mesocosm-a1b2c3/web",
        "/sys/fs/cgroup/mesocosm-a1b2c3/web/_self",
    ]
    assert pod.effects[0].args["controllers"] == ["memory", "cpu", "pids"]
    assert pod.effects[0].args["limits"] == {"memory": 64 * 2**20, "cpu": 500, "pids": 32}
    assert p.args(pod, "into_cgroup")["fd"] == Fact(1, "fd")
    task = p.ask(cgroups, p.task(), host=V2)
    assert [effect.args["path"] for effect in task.effects] == ["/sys/fs/cgroup/mesocosm-a1b2c3/web/a"]


def test_v2_kills_a_program_whole_when_its_memory_is_out_but_not_a_pod(p):
    assert p.ask(cgroups, p.task(), host=V2).effects[0].args["limits"] == {"oom_group": 1}
    assert "oom_group" not in p.ask(cgroups, p.pod(), host=V2).effects[0].args["limits"]


def test_v2_shows_a_container_its_own_group_read_only(p):
    assert p.args(p.ask(cgroups, p.task(), host=V2), "cgroup2") == {"target": "/sys/fs/cgroup"}
    shared = p.task(namespaces={"cgroup": "host"})
    assert not p.steps(p.ask(cgroups, shared, host=V2), "cgroup2"), "the mount would show the host's"


def test_v2_cannot_limit_what_is_nested_in_a_container_not_made_for_it(p):
    childless = p.whole(p.task(), p.whole(p.pod(), None, V2), V2)
    with pytest.raises(UnsupportedError) as caught:
        p.ask(cgroups, p.task(resources={"pids": 5}), host=V2, parent=childless)
    assert caught.value.fields["path"] == "$.tasks[0].resources.pids"
    assert p.ask(cgroups, p.task(), host=V2, parent=childless).effects[0].args["limits"] == {}


@pytest.mark.parametrize("host", [V1, V2, HYBRID])
def test_what_all_containers_are_below_is_made_once(host):
    effects = cgroups.host_effects(host=host)
    assert all(effect.args["path"].endswith("/mesocosm-a1b2c3") for effect in effects)
    assert all(not effect.args["attach"] for effect in effects)
    assert all([undo.verb for undo in effect.undo] == ["rmdir_cgroup"] for effect in effects)


def test_the_watch_reads_the_count_of_the_containers_own_kills(p):
    assert p.ask(cgroups, p.task(), host=V2).watches[0].args["file"] == "/sys/fs/cgroup/mesocosm-a1b2c3/web/a/memory.events"
    assert p.ask(cgroups, p.pod(), host=V2).watches[0].args["file"].endswith("/web/_self/memory.events")
    assert p.ask(cgroups, p.task(), host=V1).watches[0].args["file"].endswith("/web/a/memory.oom_control")


@pytest.mark.parametrize("field", ["cpus", "memory", "pids"])
def test_a_limit_that_cannot_be_set_is_refused_never_ignored(p, field):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(cgroups, p.task(resources={field: LIMITS[field]}), host=NONE)
    fields = caught.value.fields
    assert fields["path"] == f"$.tasks[0].resources.{field}"
    assert fields["have"] == "no cgroup file system is mounted"
    assert fields["need"]
    assert "doctor" in fields["hint"]


def test_an_ordinary_user_is_told_how_to_get_limits(p):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(cgroups, p.task(resources={"cpus": 1}), host=HOSTS["user, delegated"])
    assert "Delegate=yes" in caught.value.fields["hint"]
    failed = {check.check for check in cgroups.checks(host=HOSTS["user, delegated"]) if not check.ok}
    assert failed == {"limit cpus"}


def test_without_groups_and_limits_there_is_nothing_to_do(p):
    assert p.ask(cgroups, p.task(), host=NONE).effects == ()


@pytest.mark.parametrize("share", ["host", "parent"])
def test_without_groups_no_container_is_among_the_hosts_processes_since_its_own_could_not_be_found(p, share):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(cgroups, p.pod(namespaces={"pid": share}), host=NONE)
    assert caught.value.fields["path"] == "$.namespaces.pid"
    assert (caught.value.fields["have"], caught.value.fields["need"]) == (share, "own, or control groups")


def test_without_groups_a_member_may_be_among_its_pods_processes_which_end_with_the_pod(p):
    pod = p.whole(p.pod(), None, NONE)
    assert p.ask(cgroups, p.task(namespaces={"pid": "parent"}), host=NONE, parent=pod).effects == ()
    with pytest.raises(UnsupportedError):
        p.ask(cgroups, p.task(namespaces={"pid": "host"}), host=NONE, parent=pod)
