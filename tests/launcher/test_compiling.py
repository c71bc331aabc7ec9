"""From steps to rows: every kind has its compiler, the order is the plan's, and nothing kept belongs to a container."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from mesocosm.kernel.contracts import Descriptor
from mesocosm.kernel.core.errors import InternalError
from mesocosm.kernel.core.plan import STAGES, STEPS, Step
from mesocosm.kernel.launcher import table as t
from mesocosm.kernel.launcher.compile import Compiled, compile_steps
from mesocosm.kernel.launcher.diagnosis import HINTS, explain_row
from mesocosm.kernel.launcher.link import link
from mesocosm.kernel.launcher.steps import COMPILERS, candidates
from mesocosm.kernel.linux.constants import RESOLVE_NO_SYMLINKS, SYS

D = Descriptor
ARGS: dict[str, dict[str, Any]] = {
    "clone": {"namespaces": ["mount", "pid"]},
    "join": {"namespaces": ["net", "pid"], "of": "p"},
    "into_cgroup": {"fd": D(31)},
    "attach_cgroup": {"fd": D(32)},
    "oom_score": {"value": 500},
    "unshare": {"namespaces": ["cgroup"]},
    "view": {"name": "host"},
    "overlay": {"lower": [D(33), D(34)], "layer": D(35)},
    "tree": {"fd": D(37), "read_only": True},
    "tmpfs": {"target": "/tmp", "size": "1m", "mode": 0o1777, "flags": ["nosuid"], "directories": {"a": 0o755}, "create": "dir"},
    "scratch": {
        "size": "1m",
        "nr_inodes": 64,
        "uid": 7,
        "flags": ["nosuid"],
        "places": {
            "/run": {"mode": 0o755, "flags": [], "directories": {"lock": 0o1777}},
            "/dev/shm": {"mode": 0o1777, "flags": ["noexec"]},
        },
        "create": "dir",
    },
    "proc": {"target": "/proc"},
    "devpts": {"target": "/dev/pts"},
    "mqueue": {"target": "/dev/mqueue"},
    "cgroup2": {"target": "/sys/fs/cgroup"},
    "bind": {"fd": D(38), "target": "/data", "read_only": True, "create": "dir"},
    "view_part": {"view": "host", "source": "/dev", "target": "/dev", "create": "dir"},
    "rebind": {"source": "/a", "target": "/b", "read_only": True},
    "mask": {"paths": ["/proc/kcore"]},
    "read_only": {"paths": ["/proc/sys"]},
    "pivot": {"read_only": True},
    "new_user": {"base": 1000, "count": 10},
    "join_user": {"of": "p"},
    "own": {"namespaces": ["net", "uts"]},
    "hostname": {"name": "box"},
    "loopback": {},
    "session": {},
    "keyring": {},
    "stdio": {"fd": D(39), "number": 1},
    "rlimit": {"resource": "nofile", "soft": 10, "hard": 20},
    "bounding": {"keep": ["CHOWN"]},
    "identity": {"user": "7:8", "uid": 7, "gid": 8, "groups": [9]},
    "capabilities": {"keep": ["CHOWN"]},
    "no_new_privileges": {},
    "working_directory": {"path": "/srv"},
    "seccomp": {"filter": bytes(16)},
    "check": {"argv": ["prog"], "path": "/bin:/usr/bin"},
    "barrier": {},
    "exec": {"argv": ["prog", "-x"], "env": {"PATH": "/bin:/usr/bin", "A": "1"}},
    "pause": {},
}
FIRST = {"clone", "join", "into_cgroup"}


def plan(*kinds: str) -> tuple[Step, ...]:
    """These kinds (and a clone) with their arguments, in stage order."""
    wanted = sorted({"clone", *kinds}, key=lambda kind: (STAGES.index(STEPS[kind][0]), list(STEPS).index(kind)))
    return tuple(Step(kind, ARGS[kind], f"plug-{kind}") for kind in wanted)


def linked_bytes(compiled: Compiled) -> bytes:
    """What the child would get, with addresses taken out."""
    return compiled.table.rows + compiled.table.blob


def test_every_step_of_the_vocabulary_has_a_compiler_or_is_part_of_the_clone() -> None:
    assert set(COMPILERS) | FIRST == set(STEPS)
    assert not set(COMPILERS) & FIRST
    assert set(ARGS) == set(STEPS)


@pytest.mark.parametrize("kind", STEPS)
def test_the_compiler_of_a_step_uses_the_system_call_that_the_vocabulary_promises(kind: str) -> None:
    steps = plan(kind)
    compiled = compile_steps(steps)
    blamed = "clone" if kind == "into_cgroup" else kind  # an argument of the clone's row
    index = next(number for number, step in enumerate(steps) if step.kind == blamed)
    names = {explained(compiled, steps, row)["syscall"] for row, step in enumerate(compiled.row_steps) if step == index}
    promised = {"working_directory": "fchdir", "view": "openat"}.get(kind, STEPS[kind][1])
    assert promised in names


def test_rows_stand_in_the_order_of_the_stages() -> None:
    steps = plan(*(set(STEPS) - {"pause", "tree", "overlay"}))
    compiled = compile_steps(steps)
    order = compiled.row_steps[compiled.table.entry :]
    first_join = [step for step in order if steps[step].kind in FIRST]
    assert order == first_join + sorted(order[len(first_join) :])
    assert {steps[step].kind for step in compiled.row_steps} >= set(COMPILERS) - {"pause", "tree", "overlay"}
    assert len(compiled.row_steps) * t.ROW_BYTES == len(compiled.table.rows)


def test_an_unknown_step_is_named() -> None:
    with pytest.raises(InternalError, match="nobody compiles the step 'dance'"):
        compile_steps((Step("clone", ARGS["clone"]), Step("dance", {})))


def test_descriptors_are_passed_in_the_order_of_the_steps_and_each_row_gets_its_own() -> None:
    steps = plan("into_cgroup", "attach_cgroup", "overlay", "bind", "stdio")  # no barrier: it would add the missing stdio
    compiled = compile_steps(steps)
    assert compiled.fds == [31, 32, 33, 34, 35, 38, 39]
    linked = link(compiled.table, [fd + 1000 for fd in compiled.fds], [1, 2, 3, 4, 5, 6, 7])
    rows = [struct.unpack_from("=10q", linked.buffer, t.HEAD_BYTES + row * t.ROW_BYTES) for row in range(linked.rows)]
    dups = [row[1:3] for row in rows if row[0] == SYS["dup3"]]
    assert dups == [(1039, 1)]
    assert [row[1] for row in rows if row[0] == SYS["move_mount"]][:3] == [1035, 1033, 1034]
    assert next(row[1] for row in rows if row[0] == SYS["write"]) == 1032
    closing = [range(row[1], row[2] + 1) for row in rows if row[0] == SYS["close_range"] and row[9] & t.OK_ANY]
    assert not any(fd + 1000 in closed for fd in compiled.fds for closed in closing)


def test_what_is_kept_for_the_next_container_holds_nothing_of_the_last_one() -> None:
    kinds = sorted(set(STEPS) - {"pause", "tree", "overlay"})
    plain = compile_steps(plan(*kinds))
    secret = {
        "hostname": {"name": "SECRET-host"},
        "exec": {"argv": ["SECRET-prog"], "env": {"TOKEN": "SECRET-token"}},
        "check": {"argv": ["SECRET-prog"], "path": "/SECRET"},
        "tmpfs": {"target": "/SECRET-tmp", "size": "7m", "flags": []},
        "attach_cgroup": {"fd": D(77)},
        "bind": {"fd": D(78), "target": "/SECRET"},
    }
    other = tuple(Step(step.kind, secret.get(step.kind, step.args)) for step in plan(*kinds))
    assert b"SECRET-token" in linked_bytes(compile_steps(other))
    assert 77 in compile_steps(other).fds
    again = compile_steps(plan(*kinds))
    assert again == plain
    assert b"SECRET" not in linked_bytes(again)


def test_no_row_takes_a_descriptor_by_a_number_that_could_be_anothers() -> None:
    compiled = compile_steps(plan(*(set(STEPS) - {"pause", "tree", "overlay", "stdio", "barrier"})))
    rows = [struct.unpack_from("=10q", compiled.table.rows, at) for at in range(0, len(compiled.table.rows), t.ROW_BYTES)]
    assert rows
    assert SYS["dup3"] not in [row[0] for row in rows]


@pytest.mark.parametrize("kind", ["tmpfs", "scratch", "bind", "view_part"])
def test_no_directory_is_made_through_a_link(kind: str) -> None:
    compiled = compile_steps(plan(kind))
    rows = [struct.unpack_from("=10q", compiled.table.rows, at) for at in range(0, len(compiled.table.rows), t.ROW_BYTES)]
    calls = [row[0] for row in rows]
    blob, starts = compiled.table.blob, dict[int, int]()
    for part in compiled.table.parts:
        starts |= {part.word + at: part.start + to for at, to in t.pairs(part.pointers)}
    made = [number for number, call in enumerate(calls) if call == SYS["mkdirat"] and calls[number - 1] == SYS["openat2"]]
    assert made
    for number in made:
        how = starts[(number - 1) * t.ROW_WORDS + 3]
        assert struct.unpack_from("=QQQ", blob, how)[2] & RESOLVE_NO_SYMLINKS


def test_any_order_of_compiling_gives_the_same_tables() -> None:
    plans = [plan("view", "tmpfs", kind) for kind in STEPS]
    wanted = [compile_steps(steps) for steps in plans]
    order = list(range(len(plans)))
    random.Random(7).shuffle(order)
    assert all(compile_steps(plans[index]) == wanted[index] for index in order)


@pytest.mark.parametrize("name", ["$passed", "$fact", "$grant"])
def test_a_variable_with_the_name_of_a_reference_is_a_variable(name: str) -> None:
    steps = (*plan("barrier"), Step("exec", {"argv": ["/bin/true"], "env": {name: "0"}}))
    assert f"{name}=0\0".encode() in compile_steps(steps).table.blob


def test_containers_that_differ_in_their_ids_have_the_same_rows() -> None:
    steps = plan("scratch", "new_user", "seccomp")

    def based(base: int) -> Compiled:
        mine = {"scratch": {**ARGS["scratch"], "uid": base}, "new_user": {"base": base, "count": 10}}
        return compile_steps(tuple(Step(step.kind, mine.get(step.kind, step.args), step.plugin) for step in steps))

    one, other = based(70_000), based(140_000)
    assert one.table == other.table
    assert (one.owner, other.owner) == (70_000, 140_000)
    assert (one.user_map, other.user_map) == ((70_000, 10), (140_000, 10))
    assert t.SPECIALS.index("owner") in one.table.special_to
    assert t.SPECIALS.index("owner") not in based(0).table.special_to, "root owns what it makes"


def test_the_maps_are_the_launchers_business_and_so_is_entering_the_parents_pids() -> None:
    assert compile_steps(plan("new_user")).user_map == (1000, 10)
    assert compile_steps(plan()).user_map is None
    assert compile_steps(plan("join")).enter_pid
    assert not compile_steps(plan("join"), confined=True).enter_pid
    assert compile_steps(plan("join"), confined=True).table.entry > compile_steps(plan("join")).table.entry > 1
    assert compile_steps(plan()).table.entry == 1


@pytest.mark.parametrize(
    ("argv", "path", "found"),
    [
        (["sh"], "/bin:/usr/bin", ["/bin/sh", "/usr/bin/sh"]),
        (["/x/y"], "/bin", ["/x/y"]),
        (["./y"], "/bin", ["./y"]),
        (["y"], "", ["./y"]),
        (["y"], "/a::/b", ["/a/y", "./y", "/b/y"]),
    ],
)
def test_programs_are_looked_for_where_execvp_looks(argv: list[str], path: str, found: list[str]) -> None:
    assert candidates(argv, path) == found


def explained(compiled: Compiled, steps: tuple[Step, ...], row: int, errno: int = 2, **more: Any) -> dict[str, Any]:
    """The error object for a row that failed."""
    return explain_row({"row": row, "errno": errno, **more}, steps, compiled, "box").as_object()


@pytest.mark.parametrize("confined", [False, True])
def test_whichever_row_fails_the_error_names_plugin_step_system_call_and_errno(confined: bool) -> None:  # noqa: FBT001
    for kind in STEPS:
        steps = plan(kind, "join" if kind == "join_user" else "barrier")
        compiled = compile_steps(steps, confined=confined)
        for row, index in enumerate(compiled.row_steps):
            error = explained(compiled, steps, row)
            step = steps[index]
            assert error["code"] == "launch_failed"
            assert error["id"] == "box"
            assert error["errno"] == "ENOENT"
            assert error["plugin"] == f"plug-{step.kind}"
            assert error["step"] == {"index": index, "stage": step.stage, "kind": step.kind}
            assert error["syscall"] in SYS
            assert "no such file" in error["message"]


@pytest.mark.parametrize(
    ("kind", "syscall", "target"),
    [
        ("tmpfs", "fsconfig", "size=1m"),
        ("tmpfs", "fsopen", "/tmp"),
        ("scratch", "mkdirat", "0/lock"),
        ("scratch", "openat2", "/dev/shm"),
        ("bind", "openat2", "/data"),
        ("bind", "mkdirat", "data"),
        ("mask", "openat2", "/proc/kcore"),
        ("hostname", "sethostname", "box"),
        ("check", "execveat", "prog"),
        ("working_directory", "openat2", "/srv"),
        ("rlimit", "prlimit64", "nofile"),
        ("oom_score", "openat", "/proc/self/oom_score_adj"),
        ("devpts", "fsconfig", "newinstance"),
    ],
)
def test_the_error_says_what_the_system_call_was_done_to(kind: str, syscall: str, target: str) -> None:
    steps = plan(kind)
    compiled = compile_steps(steps)
    errors = [explained(compiled, steps, row) for row, index in enumerate(compiled.row_steps) if steps[index].kind == kind]
    assert target in [error.get("target") for error in errors if error["syscall"] == syscall]


def test_after_the_barrier_it_is_an_exec_error_with_the_exit_code_of_a_shell() -> None:
    steps = plan("check", "barrier", "exec")
    compiled = compile_steps(steps)
    error = explain_row({"row": len(compiled.row_steps) - 1, "errno": 2}, steps, compiled, "box", after_barrier=True)
    assert (error.code, error.exit_code, error.fields["target"]) == ("exec_failed", 127, "prog")
    assert explain_row({"row": len(compiled.row_steps) - 1, "errno": 13}, steps, compiled, "box").exit_code == 126


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"row": None, "errno": 0, "message": "it was killed", "status": 9}, "it was killed (wait status 9)"),
        ({"row": None, "errno": 0}, "it ended before it was ready"),
        ({"row": 99999, "errno": 5}, "it ended before it was ready"),
        ({"row": None, "errno": 1, "message": "writing the uid_map failed", "kind": "new_user"}, "writing the uid_map failed"),
    ],
)
def test_a_failure_without_a_row_is_told_in_the_launchers_words(answer: dict[str, Any], words: str) -> None:
    steps = plan("new_user")
    error = explain_row(answer, steps, compile_steps(steps), "box").as_object()
    assert words in error["message"]
    assert ("step" in error) == ("kind" in answer)


def test_a_barrier_that_broke_is_not_blamed_on_an_errno() -> None:
    steps = plan("barrier")
    compiled = compile_steps(steps)
    for number in (0, -1):
        error = explained(compiled, steps, len(compiled.row_steps) - 1, errno=number)
        assert "the other end is gone" in error["message"]
        assert "errno" not in error


def test_every_hint_is_for_a_step_that_exists() -> None:
    assert {kind for kind, _ in HINTS} <= set(STEPS)


@pytest.mark.parametrize("args", [{}, {"target": 5}], ids=str)
def test_a_step_that_lacks_what_it_needs_is_named_with_its_plug_in(args: dict[str, Any]) -> None:
    steps = [Step("session"), Step("tmpfs", args, "wild"), Step("barrier"), Step("pause")]

    with pytest.raises(InternalError) as caught:
        compile_steps(steps)

    assert caught.value.fields["plugin"] == "wild"
    assert caught.value.fields["step"] == {"index": 1, "stage": "mount", "kind": "tmpfs"}
