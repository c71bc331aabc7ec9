"""Sandbox, volumes, hardening, limits and program: what each adds to a plan."""

from __future__ import annotations

import msgspec
import pytest

from mesocosm.kernel.contracts import Fact, Grant, Undo
from mesocosm.kernel.core.containers import CAPABILITIES, DEFAULT_CAPABILITIES, UNLIMITED
from mesocosm.kernel.core.errors import SpecError, UnsupportedError
from mesocosm.kernel.core.resources import show_size
from mesocosm.kernel.testing import HOSTS
from mesocosm.plugins.isolators import hardening, program, rlimits, sandbox, volumes

DIRECTORY = "/run/mesocosm/containers"

# --- sandbox


def test_one_undo_removes_the_whole_directory_when_its_record_goes(p):
    plan = p.ask(sandbox, p.task())
    assert [effect.args.get("path") for effect in plan.effects[:4]] == [
        f"{DIRECTORY}/web.a", f"{DIRECTORY}/web.a/sandbox", f"{DIRECTORY}/web.a/stdout", f"{DIRECTORY}/web.a/stderr",
    ]  # fmt: skip
    assert [effect.undo for effect in plan.effects] == [(Undo("remove_tree", f"{DIRECTORY}/web.a"),), (), (), (), ()]
    assert [effect.keep for effect in plan.effects] == [True, True, True, True, False]


def test_output_goes_to_files_and_input_is_empty(p):
    found = {step.args["number"]: step.args["fd"] for step in p.steps(p.ask(sandbox, p.task()), "stdio")}
    assert found == {0: None, 1: Fact(2, "fd"), 2: Fact(3, "fd")}


def test_the_sandbox_belongs_to_root_inside(p):
    assert p.ask(sandbox, p.task()).effects[1].args["uid"] == Grant("uid_base")
    assert p.ask(sandbox, p.single(namespaces={"user": "host"})).effects[1].args["uid"] == 0


def test_the_sandbox_of_another_user_is_open_to_those_inside(p):
    assert p.ask(sandbox, p.task(user="www")).effects[1].args["mode"] == 0o1777


def test_a_pod_has_a_directory_for_volumes_and_no_logs(p):
    plan = p.ask(sandbox, p.pod())
    assert [effect.kind for effect in plan.effects] == ["directory"]
    assert [step.args["fd"] for step in plan.setup] == [None, None, None]


def test_a_container_in_the_hosts_mounts_finds_its_sandbox_where_it_is(p):
    plan = p.ask(sandbox, p.single(namespaces={"mount": "host"}))
    assert plan.env["MESOCOSM_SANDBOX"] == f"{DIRECTORY}/one/sandbox"
    assert not p.steps(plan, "bind")
    assert p.ask(sandbox, p.task()).env == {"MESOCOSM_ID": "web.a", "MESOCOSM_SANDBOX": "/sandbox"}


# --- volumes


def volume(source, target, **more):
    return {"source": source, "target": target, **more}


def test_a_shared_volume_is_the_pods_and_no_member_takes_it_along(p):
    plan = p.ask(volumes, p.task(volumes=[volume("shared:data", "/data", read_only=True)]))
    assert [effect.args.get("path") for effect in plan.effects[:2]] == [f"{DIRECTORY}/web/volumes", f"{DIRECTORY}/web/volumes/data"]
    assert all(effect.undo == () for effect in plan.effects)
    assert plan.effects[2].args == {"source": f"{DIRECTORY}/web/volumes/data", "recursive": False}
    args = {"fd": Fact(2, "fd"), "target": "/data", "read_only": True, "create": Fact(2, "type"), "foreign": False}
    assert p.args(plan, "bind") == args


def test_a_host_path_comes_with_what_is_mounted_below_it(p):
    plan = p.ask(volumes, p.task(volumes=[volume("host:/srv/x", "/data")]))
    assert plan.effects[0].args == {"source": "/srv/x", "recursive": True}


def test_memory_volumes_have_their_size_and_few_files(p):
    args = p.args(p.ask(volumes, p.task(volumes=[volume("tmpfs:1MiB", "/data", read_only=True)])), "tmpfs")
    assert (args["size"], args["nr_inodes"], args["flags"]) == (2**20, 256, ["nosuid", "nodev", "ro"])


def test_outer_volumes_are_mounted_before_inner_ones(p):
    plan = p.ask(volumes, p.task(volumes=[volume("shared:a", "/data/in/side"), volume("tmpfs:1MiB", "/data")]))
    assert [step.args["target"] for step in plan.setup] == ["/data", "/data/in/side"]


def test_two_volumes_at_one_place_are_refused(p):
    with pytest.raises(SpecError) as caught:
        p.ask(volumes, p.task(volumes=[volume("shared:a", "/data"), volume("shared:b", "//data/")]))
    assert caught.value.fields["path"] == "$.tasks[0].volumes[1].target"


def test_volumes_of_providers_are_refused_until_there_are_some(p):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(volumes, p.task(volumes=[volume("volume:db", "/data")]))
    assert caught.value.fields["path"] == "$.tasks[0].volumes[0].source"


def test_volumes_need_mounts_of_their_own(p):
    container = msgspec.structs.replace(p.task(volumes=[volume("shared:a", "/data")]), namespaces={"mount": "host"})
    with pytest.raises(SpecError):
        p.ask(volumes, container)


# --- hardening


def test_power_is_given_up_in_an_order_that_works(p):
    kinds = [step.kind for step in p.whole(p.task(), p.whole(p.pod())).setup if step.stage == "identity"]
    assert kinds == ["bounding", "identity", "working_directory", "capabilities", "no_new_privileges"]


def test_the_default_is_no_more_than_docker_grants(p):
    plan = p.ask(hardening, p.task())
    assert p.args(plan, "bounding")["keep"] == list(DEFAULT_CAPABILITIES)
    assert not {"SYS_ADMIN", "SYS_PTRACE", "NET_ADMIN", "MKNOD", "SYS_MODULE", "DAC_READ_SEARCH"} & set(DEFAULT_CAPABILITIES)


def test_a_pods_own_container_may_do_nothing_at_all(p):
    plan = p.ask(hardening, p.pod())
    assert p.args(plan, "bounding") == p.args(plan, "capabilities") == {"keep": []}


def test_another_user_has_no_capabilities(p):
    plan = p.ask(hardening, p.task(user="www"))
    assert p.args(plan, "capabilities") == p.args(plan, "bounding") == {"keep": []}
    identity = p.args(plan, "identity")
    assert (identity["uid"], identity["gid"]) == (33, 33)


@pytest.mark.parametrize(
    ("user", "uid", "gid"), [("0", 0, 0), ("root", 0, 0), ("33", 33, 33), ("7:8", 7, 8), ("www:5", 33, 5), ("9", 9, 9)]
)
def test_users_are_numbers_or_names_of_the_hosts_passwd(p, user, uid, gid):
    identity = p.args(p.ask(hardening, p.task(user=user)), "identity")
    assert (identity["uid"], identity["gid"]) == (uid, gid)


def test_an_ordinary_users_one_id_is_called_as_asked_and_its_children_know_by_which_number_it_comes(p):
    host = HOSTS["user, nothing"]
    pod = p.whole(p.pod(), host=host)
    server = p.task(user="7:8")
    above = p.whole(server, pod, host=host)

    plans = [above, p.whole(p.task(parent=server), above, host=host)]

    named = [[p.args(plan, "identity")[key] for key in ("uid", "gid", "only")] for plan in plans]
    assert named == [[7, 8, [0, 0]], [0, 0, [7, 8]]]
    kinds = [step.kind for step in above.setup if step.stage == "identity"]
    assert kinds[:2] == ["identity", "bounding"], "the new namespace comes with a full bounding set"


@pytest.mark.parametrize(
    ("fields", "host", "path"),
    [
        ({"user": "who"}, "root, hybrid", "user"),
        ({"user": "1:wheel"}, "root, hybrid", "user"),
        ({"user": "70000"}, "root, hybrid", "user"),
        ({"user": "9" * 5000}, "root, hybrid", "user"),
        ({"user": "0:" + "9" * 5000}, "root, hybrid", "user"),
        ({"user": "www", "rootfs": "/srv/root"}, "root, hybrid", "user"),
        ({"user": "33", "capabilities": ["NET_RAW"]}, "root, hybrid", "capabilities"),
        ({"namespaces": {"user": "host"}, "capabilities": ["SYS_RESOURCE"]}, "root, hybrid", "capabilities"),
    ],
)
def test_who_cannot_be_is_refused_with_the_field(p, fields, host, path):
    with pytest.raises((SpecError, UnsupportedError)) as caught:
        p.ask(hardening, p.task(**fields), host=HOSTS[host])
    assert caught.value.fields["path"] == f"$.tasks[0].{path}"


def test_in_users_of_its_own_a_container_may_have_what_the_agent_has_not(p):
    assert p.args(p.ask(hardening, p.task(capabilities=["CAP_SYS_RESOURCE"])), "bounding") == {"keep": ["SYS_RESOURCE"]}


def test_none_asked_for_means_none(p):
    assert p.args(p.ask(hardening, p.task(capabilities=[])), "bounding") == {"keep": []}


def test_the_dangerous_corners_of_proc_are_covered(p):
    plan = p.ask(hardening, p.task())
    assert {"/proc/kcore", "/proc/keys", "/proc/timer_list"} <= set(p.args(plan, "mask")["paths"])
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(p.args(plan, "read_only")["paths"])
    assert not p.steps(p.ask(hardening, p.single(namespaces={"mount": "host"})), "mask"), "they would be the host's"


def test_work_begins_in_the_sandbox_unless_said_otherwise(p):
    assert p.args(p.ask(hardening, p.task()), "working_directory") == {"path": "/sandbox"}
    assert p.args(p.ask(hardening, p.task(cwd="/tmp")), "working_directory") == {"path": "/tmp"}


def test_doctor_says_which_default_capabilities_the_agent_lacks():
    host = msgspec.structs.replace(HOSTS["root, hybrid"], capabilities=frozenset(CAPABILITIES) - {"NET_RAW"})
    (check,) = hardening.checks(host=host)
    assert not check.ok
    assert "NET_RAW" in check.hint


# --- rlimits


def test_core_files_are_off_and_open_files_as_in_a_login_unless_asked_for(p):
    assert [step.args for step in p.ask(rlimits, p.task()).setup] == [
        {"resource": "core", "soft": 0, "hard": UNLIMITED},
        {"resource": "nofile", "soft": 1024, "hard": 524288},
    ]
    asked = p.ask(rlimits, p.task(limits={"core": "unlimited", "nofile": [64, 128]}))
    assert [(step.args["resource"], step.args["soft"]) for step in asked.setup] == [("core", UNLIMITED), ("nofile", 64)]


def test_a_limit_above_the_agents_own_is_refused_with_both_numbers(p):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(rlimits, p.task(limits={"nofile": 600_000}))
    fields = caught.value.fields
    assert (fields["path"], fields["have"], fields["need"]) == ("$.tasks[0].limits.nofile", "524288", "600000")


# --- program


def test_the_last_steps_are_check_barrier_exec(p):
    kinds = [step.kind for step in p.whole(p.task(), p.whole(p.pod())).setup]
    assert kinds[-3:] == ["check", "barrier", "exec"]
    assert [step.kind for step in p.whole(p.pod()).setup][-2:] == ["barrier", "pause"]


def test_a_tasks_own_variables_win_over_all_others(p):
    plan = p.whole(p.task(env={"MESOCOSM_ID": "mine", "PATH": "/x"}), p.whole(p.pod()))
    env = p.args(plan, "exec")["env"]
    assert env["MESOCOSM_ID"] == "mine"
    assert env["HOSTNAME"] == "a"
    assert env["HOME"] == "/root"
    assert p.args(plan, "check")["path"] == "/x"


def test_the_check_is_told_the_program_and_not_what_it_is_given(p):
    """Checks are compiled once for each program and kept: an argument may be long, or a secret."""
    plan = p.whole(p.task(command=["prog", "--token=SECRET"]), p.whole(p.pod()))
    assert p.args(plan, "check")["argv"] == ["prog"]
    assert p.args(plan, "exec")["argv"] == ["prog", "--token=SECRET"]


MEBIBYTE = 2**20


@pytest.mark.parametrize(
    ("stack", "most"), [(64 * 1024, 64 * 1024), (256 * 1024, 124 * 1024), (2 * MEBIBYTE, 508 * 1024), (-1, 6 * MEBIBYTE - 4096)]
)
def test_more_arguments_than_execve_takes_are_refused_with_both_numbers(p, stack, most):
    limits = {"stack": "unlimited" if stack < 0 else stack}
    host = msgspec.structs.replace(p.host, rlimits={**p.host.rlimits, "stack": (-1, -1)})
    one = 2**16 - 9  # with its NUL and its pointer 64 KiB
    fits = ["x" * one] * (most // 2**16)
    fits[-1] = fits[-1][: -len("true") - 9] if most % 2**16 == 0 else fits[-1]
    p.ask(program, p.task(command=["true", *fits], limits=limits), host=host)

    with pytest.raises(SpecError) as caught:
        p.ask(program, p.task(command=["true", *fits, "x" * one], limits=limits), host=host)

    assert caught.value.fields["path"] == "$.tasks[0].command"
    assert caught.value.fields["need"].startswith(f"≤ {show_size(most)}")


@pytest.mark.parametrize("field", ["api", "init"])
def test_what_is_not_built_yet_is_refused_never_ignored(p, field):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(program, p.task(**{field: True}))
    assert caught.value.fields["path"] == f"$.tasks[0].{field}"


@pytest.mark.parametrize(
    ("stack", "strings", "fits"),
    [
        (None, 6000, True),
        (2**18, 120, True),
        (2**18, 135, False),
        (2**20, 250, True),
        (2**20, 270, False),
        (UNLIMITED, 6000, True),
        (UNLIMITED, 6300, False),
    ],
)
def test_a_command_longer_than_the_stack_limit_lets_it_be_is_refused(p, stack, strings, fits):
    limits = {} if stack is None else {"stack": "unlimited" if stack == UNLIMITED else stack}
    task = p.task(command=["true", *["x" * 1000] * strings], limits=limits)
    if fits:
        assert p.steps(p.ask(program, task), "exec")
        return
    with pytest.raises(SpecError) as caught:
        p.ask(program, task)
    assert caught.value.fields["path"] == "$.tasks[0].command"
