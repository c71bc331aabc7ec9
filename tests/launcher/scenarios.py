"""What a real launcher must do, one coroutine for each: their names are the names of the tests.

`test_launcher.py` runs them, as root and as an ordinary user, in a process that executes this file: it reads lines
"NAME PLACE WALKER" and answers each with a line of JSON, null or what went wrong.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import trio
import trio.testing

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from bench import Bench, cradle_of, descendants, fail_each_row, field, gone, link_of, parent_of, run
from shortages import DESCRIPTORS, OWN_CALLS, fail_by_turns, failing_call, short_of_descriptors

from mesocosm.kernel.contracts import Descriptor
from mesocosm.kernel.core.containers import CAPABILITIES
from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.core.plan import Step
from mesocosm.kernel.launcher.client import open_launcher
from mesocosm.kernel.launcher.compile import compile_steps
from mesocosm.kernel.launcher.confinement import confine
from mesocosm.kernel.launcher.connecting import connect
from mesocosm.kernel.launcher.contract import Ended, ExecFailed, LauncherGone, Orphan, StageRequest, Started
from mesocosm.kernel.launcher.diagnosis import explain_late
from mesocosm.kernel.launcher.reaped import Reaped
from mesocosm.kernel.launcher.starting import start
from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import mounts, namespaces, pidfds

SCENARIOS: dict[str, Callable[[Bench], Awaitable[None]]] = {}


def scenario(function: Callable[[Bench], Awaitable[None]]) -> Callable[[Bench], Awaitable[None]]:
    """Registers one."""
    SCENARIOS[function.__name__] = function
    return function


class Refusal:
    """The error that a request was answered with."""

    error: LaunchError


@contextmanager
def refused() -> Iterator[Refusal]:
    """What is done inside must end with a LaunchError."""
    refusal = Refusal()
    try:
        yield refusal
    except LaunchError as error:
        refusal.error = error
    else:
        raise AssertionError("it was not refused")


def is_read_only(path: Path) -> bool:
    """Whether writing there says EROFS."""
    try:
        path.write_text("x")
    except OSError as error:
        return error.errno == errno.EROFS
    return False


# --- one container ----------------------------------------------------------------------------------------------


@scenario
async def a_program_runs_and_its_exit_status_is_told(b: Bench) -> None:
    read, write = os.pipe()
    await b.start("a", ["sh", "-c", "echo $GREETING; echo $$; hostname; exit 7"], stdout=write, env={"GREETING": "hi there"})
    os.close(write)
    assert isinstance(await b.hear(Started), Started)
    ended = (await b.ended("a"))["a"]
    assert os.waitstatus_to_exitcode(ended.status) == 7
    assert abs(ended.time - time.time()) < 60
    assert ended.max_rss_kib > 0
    assert os.read(read, 1000) == b"hi there\n1\nbox\n"
    os.close(read)


@scenario
async def a_new_process_holds_three_descriptors_no_signals_and_the_capabilities_asked_for(b: Bench) -> None:
    staged = await b.start("a", ["sleep", "1000"], cwd="/tmp", keep=["CHOWN", "SETUID"])
    await b.hear(Started)
    pid = staged.pid
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
    assert {link_of(pid, f"fd/{fd}") for fd in range(3)} == {"/dev/null"}
    for mask in ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"):
        assert int(field(pid, mask), 16) == 0, (mask, field(pid, mask))
    wanted = sum(1 << CAPABILITIES.index(name) for name in ("CHOWN", "SETUID"))
    found = {name: int(field(pid, name), 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    assert found == {"CapInh": 0, "CapPrm": wanted, "CapEff": wanted, "CapBnd": wanted, "CapAmb": 0}
    assert field(pid, "NoNewPrivs") == "1"
    assert link_of(pid, "cwd") == "/tmp"
    assert field(pid, "NSpid").split()[-1] == "1"
    assert parent_of(pid) == b.pid
    for kind in ("mnt", "pid", "net", "ipc", "uts", "user"):
        assert link_of(pid, f"ns/{kind}") != link_of(os.getpid(), f"ns/{kind}"), kind
    points = [line.split()[4] for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    assert {"/", "/tmp", "/proc", "/usr"} <= set(points)
    assert set(points) <= {"/", "/tmp", "/proc", "/dev/null", "/usr", "/bin", "/lib", "/lib64", "/sbin"}  # and none of the host


@scenario
async def the_child_at_its_barrier_cannot_be_looked_into_and_holds_only_its_own(b: Bench) -> None:
    others = [await b.stage(f"o{number}", ["true"]) for number in range(3)]
    staged = await b.stage("a", None, "shared")
    await b.stage("b", None, "shared")
    links = [link_of(staged.pid, f"fd/{fd}") for fd in os.listdir(f"/proc/{staged.pid}/fd")]
    assert len([link for link in links if link.startswith("pipe:")]) == 1  # the reading end of its own barrier
    assert len([link for link in links if link.startswith("socket:")]) == 1  # what it says to the launcher
    assert not [link for link in links if "epoll" in link or "signalfd" in link or "pidfd" in link or "ns/" in link]
    for name in ("o0", "o1", "o2", "shared"):
        await b.launcher.abort(name)
    assert all(not os.path.exists(f"/proc/{other.pid}/exe") for other in others)


@scenario
async def arguments_and_variables_may_be_a_mebibyte(b: Bench) -> None:
    env = {f"V{number}": f"{number}" * 100_000 for number in range(10)}
    script = 'for n in 0 1 2 3 4 5 6 7 8 9; do eval "v=\\$V$n"; [ ${#v} = 100000 ] || exit 1; done; [ ${#1} = 100000 ]'
    await b.start("a", ["sh", "-c", script, "sh", "x" * 100_000], env=env)
    assert (await b.ended("a"))["a"].status == 0


@scenario
async def a_directory_that_is_no_longer_there_is_an_error_with_its_step(b: Bench) -> None:
    before = await b.steady()
    with refused() as refusal:
        await b.stage("a", ["true"], cwd="/nowhere")
    assert refusal.error.fields["step"]["kind"] == "working_directory"
    assert refusal.error.fields["syscall"] == "openat2"
    assert refusal.error.fields["errno"] == "ENOENT"
    assert refusal.error.fields["target"] == "/nowhere"
    await b.settled(before)
    assert await b.launcher.inventory() == []


@scenario
async def an_overlay_of_several_layers_can_be_the_root(b: Bench) -> None:
    layers = []
    for name in ("one", "two"):
        (b.place / name).mkdir()
        (b.place / name / f"file-{name}").touch()
        layers.append(mounts.open_tree(str(b.place / name)))
    clone, _, *rest = b.steps(None)
    rest = [step for step in rest if step.stage not in ("mount",)]
    steps = (clone, Step("overlay", {"lower": [Descriptor(layer) for layer in layers], "layer": None}), *rest)
    staged = await b.launcher.stage(StageRequest("a", "a", steps))
    assert sorted(os.listdir(f"/proc/{staged.pid}/root")) == ["file-one", "file-two"]
    await b.launcher.abort("a")
    for fd in (*layers, staged.pidfd):
        os.close(fd)


# --- the barrier ------------------------------------------------------------------------------------------------


@scenario
async def nothing_runs_before_the_release(b: Bench) -> None:
    first = await b.stage("a", ["touch", "/data/a"], "together", home=True)
    await b.stage("b", ["touch", "/data/b"], "together", home=True)
    lines = {line.container_id: line for line in await b.launcher.inventory()}
    assert {name: line.phase for name, line in lines.items()} == {"a": "staged", "b": "staged"}
    assert lines["a"].note == b"note of a"
    assert lines["a"].pid == first.pid
    assert Path(f"/proc/{first.pid}/comm").read_text().strip() in ("meso-launcher", "meso-cradle")  # a copy: no execve yet
    assert os.listdir(b.home) == []
    for line in lines.values():
        os.close(line.pidfd or -1)
    await b.launcher.release("together")
    assert all(end.status == 0 for end in (await b.ended("a", "b")).values())
    assert sorted(os.listdir(b.home)) == ["a", "b"]


@scenario
async def an_abort_leaves_nothing(b: Bench) -> None:
    before = await b.steady()
    pause = await b.start("p", None)
    await b.hear(Started)
    during = await b.steady()
    assert during["descriptors"] - before["descriptors"] == {"anon_inode:[pidfd]": 1}
    for number in range(4):
        await b.stage(f"x{number}", ["touch", "/data/x"], "x", home=True)
    for number in range(4):
        await b.stage(f"p.x{number}", ["touch", "/data/x"], "x", home=True, of="p")
    await b.launcher.abort("x")
    assert {line.container_id for line in await b.launcher.inventory()} == {"p"}
    await b.settled(during)
    b.kill(pause)
    await b.ended("p")
    await b.settled(before)
    assert os.listdir(b.home) == []


@scenario
async def a_group_of_twenty_of_which_one_cannot_start_does_not_start_at_all(b: Bench) -> None:
    before = await b.steady()
    errors: list[LaunchError] = []

    async def member(number: int) -> None:
        argv = ["no-such-program"] if number == 13 else ["touch", f"/data/{number}"]
        try:
            await b.stage(f"m{number}", argv, "group", home=True)
        except LaunchError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(member, number)
    assert [error.fields["target"] for error in errors] == ["no-such-program"]
    assert errors[0].exit_code == 127
    await b.launcher.abort("group")
    assert await b.launcher.inventory() == []
    assert os.listdir(b.home) == []
    await b.settled(before)


@scenario
async def an_exec_that_fails_after_the_barrier_is_told_and_ends_with_126(b: Bench) -> None:
    program = b.home / "prog"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    await b.stage("a", ["/data/prog"], home=True)
    program.unlink()
    await b.launcher.release("a")
    told = await b.hear(ExecFailed)
    assert told.error["code"] == "exec_failed"
    assert told.error["errno"] == "ENOENT"
    assert told.error["target"] == "/data/prog"
    assert told.error["plugin"] == "program"
    assert os.waitstatus_to_exitcode((await b.ended("a"))["a"].status) == 126
    assert not [notice for notice in b.missed if isinstance(notice, Started)]


@scenario
async def whichever_system_call_fails_it_is_named_and_nothing_ran_and_nothing_is_left(b: Bench) -> None:
    await fail_each_row(b, lambda: b.steps(["/usr/bin/touch", "/data/ran"], home=True))


@scenario
async def whichever_system_call_of_a_nested_container_fails_its_parent_goes_on(b: Bench) -> None:
    parent = await b.start("p", None)
    await b.hear(Started, "p")
    await fail_each_row(b, lambda: b.steps(["/usr/bin/touch", "/data/ran"], home=True, of="p"), "p")
    assert Path(f"/proc/{parent.pid}/stat").exists()
    b.kill(parent)
    await b.ended("p")


@scenario
async def a_fault_beyond_the_last_step_is_refused_with_how_many_there_are(b: Bench) -> None:
    steps = b.steps(None)
    with refused() as refusal:
        await b.launcher.stage(StageRequest("x", "x", steps, fault=("step", len(steps) + 1)))
    assert refusal.error.fields["have"] == str(len(steps))


@scenario
async def one_that_is_killed_at_the_barrier_has_ended_and_the_others_may_still_be_released(b: Bench) -> None:
    victim = await b.stage("v", ["touch", "/data/v"], "g", home=True)
    await b.stage("w", ["touch", "/data/w"], "g", home=True)
    b.kill(victim)
    assert (await b.ended("v"))["v"].status == 9
    await b.launcher.release("g")
    await b.ended("w")
    assert os.listdir(b.home) == ["w"]


@scenario
async def a_cancelled_stage_leaves_nothing_and_does_not_run(b: Bench) -> None:
    pause = await b.start("p", None)
    await b.hear(Started)
    before = await b.steady()
    finished = 0
    for number in range(24):
        await b.stage(f"keep{number}", ["true"], f"g{number}")
        with trio.move_on_after(0.0004 * (number % 12)) as scope:
            await b.stage("x", ["touch", "/data/x"], f"g{number}", home=True, of="p" if number % 2 else None)
        if not scope.cancelled_caught:
            finished += 1
            await b.launcher.abort(f"g{number}")
            continue
        lines = await b.launcher.inventory()
        assert sorted(line.container_id for line in lines) == [f"keep{number}", "p"]
        for line in lines:
            os.close(line.pidfd or -1)
        await b.launcher.release(f"g{number}")
        await b.ended(f"keep{number}")
        assert os.listdir(b.home) == []
    assert finished < 24
    await b.settled(before)
    b.kill(pause)


@scenario
async def who_discards_one_at_its_barrier_is_answered_and_not_told_of_its_end_besides(b: Bench) -> None:
    """It would be told too soon, and would take the end for the reason why the launch has failed."""
    before = await b.steady()
    await b.stage("a", ["touch", "/data/ran"], "x", home=True)
    await b.stage("b", ["true"], "y")
    await b.launcher._discard("a")
    assert [line.container_id for line in await b.launcher.inventory()] == ["b"]
    await b.launcher.release("y")
    assert "b" in await b.ended("b")
    assert [notice for notice in b.missed if isinstance(notice, Ended)] == []
    await b.settled(before)
    assert os.listdir(b.home) == []


@scenario
async def a_release_waits_for_nobody_and_lets_nobody_slip_through(b: Bench) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.stage, "a", ["true"], "g")
        await trio.testing.wait_all_tasks_blocked()
        errors = []
        try:
            await b.launcher.release("g")
        except LaunchError as error:  # unless it stands there already
            errors.append(error.fields["errno"])
    if errors:
        assert errors == ["EBUSY"]
        await b.launcher.release("g")
    assert (await b.ended("a"))["a"].status == 0
    with refused() as refusal:
        await b.launcher.release("g")
    assert refusal.error.fields["errno"] == "ENOENT"


@scenario
async def an_id_is_given_once(b: Bench) -> None:
    await b.stage("a", None)
    with refused() as refusal:
        await b.stage("a", None, "other")
    assert "already" in refusal.error.message
    await b.launcher.abort("a")
    await b.stage("a", None)
    await b.launcher.abort("a")


@scenario
async def two_hundred_are_born_at_once(b: Bench) -> None:
    before = await b.steady()
    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(b.stage, f"c{number}", ["true"], "many")
    lines = await b.launcher.inventory()  # in several pieces
    assert len(lines) == 200
    assert all(line.phase == "staged" and line.pidfd is not None for line in lines)
    assert len({line.pid for line in lines}) == 200
    for line in lines:
        os.close(line.pidfd or -1)
    await b.launcher.release("many")
    ends = await b.ended(*(f"c{number}" for number in range(200)))
    assert {end.status for end in ends.values()} == {0}
    assert await b.launcher.inventory() == []
    await b.settled(before)


# --- nested -----------------------------------------------------------------------------------------------------


@scenario
async def a_nested_container_stands_in_its_parents_namespaces(b: Bench) -> None:
    outer = await b.start("p", None)
    inner = await b.start("p.a", ["sleep", "1000"], of="p")
    await b.hear(Started, "p")
    await b.hear(Started, "p.a")
    assert parent_of(inner.pid) == b.pid
    assert field(inner.pid, "NSpid").split()[-1] == "1"
    assert len(field(inner.pid, "NSpid").split()) == len(field(outer.pid, "NSpid").split()) + 1
    for kind, same in {"net": True, "ipc": True, "user": True, "pid": False, "mnt": False, "uts": False}.items():
        assert (link_of(inner.pid, f"ns/{kind}") == link_of(outer.pid, f"ns/{kind}")) is same, kind
    assert sorted(os.listdir(f"/proc/{inner.pid}/fd")) == ["0", "1", "2"]
    assert int(field(inner.pid, "CapInh"), 16) == 0
    assert int(field(outer.pid, "SigIgn"), 16) == 1 << (signal.SIGCHLD - 1)
    b.kill(inner)
    assert (await b.ended("p.a"))["p.a"].status == 9
    b.kill(outer)
    await b.ended("p")


@scenario
async def killing_a_pause_ends_all_that_is_nested_in_it(b: Bench) -> None:
    before = await b.steady()
    names = ["p", "p.a", "p.a.b", "p.a.b.c", "p.d"]
    staged = {}
    for name in names:
        staged[name] = await b.start(name, None, of=name.rpartition(".")[0] or None)
        await b.hear(Started, name)
    b.kill(staged["p"])
    ends = [await b.hear(Ended) for _ in names]
    assert {end.container_id for end in ends} == set(names)
    assert {end.status for end in ends} == {9}
    assert ends[-1].container_id == "p"  # its namespace is not empty before
    await b.launcher.acknowledge(names)
    await b.settled(before)


@scenario
async def pause_keeps_no_zombies(b: Bench) -> None:
    outer = await b.start("p", None)
    await b.hear(Started)
    # Nested without pids of its own: what it leaves behind becomes the pause's.
    await b.start("p.a", ["sh", "-c", "(sleep 0.05 &) ; (true &) ; exit 0"], of="p", clone=["mount"])
    await b.ended("p.a")
    with trio.fail_after(5):
        while children := descendants(outer.pid):
            states = {field(child, "State")[0] for child in children if os.path.exists(f"/proc/{child}/stat")}
            assert "Z" not in states
            await trio.sleep(0.01)
    b.kill(outer)


@scenario
async def a_parent_that_dies_while_a_nested_one_is_built_is_an_error_and_no_hang(b: Bench) -> None:
    before = await b.steady()
    errors = 0
    for number in range(30):
        outer = await b.start("p", None)
        await b.hear(Started, "p")

        async def nested(number: int = number) -> None:
            nonlocal errors
            for member in range(3):
                try:
                    await b.stage(f"p.{member}", ["touch", "/data/x"], f"n{number}", home=True, of="p")
                except LaunchError:
                    errors += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(nested)
            await trio.sleep(0.0004 * (number % 15))
            b.kill(outer)
        await b.launcher.abort(f"n{number}")
        await b.ended("p")
        await b.launcher.acknowledge([f"p.{member}" for member in range(3)])
        assert await b.launcher.inventory() == [], number
    assert errors
    assert os.listdir(b.home) == []
    await b.settled(before)


@scenario
async def a_container_can_not_be_nested_in_one_that_is_not_there(b: Bench) -> None:
    with refused() as refusal:
        await b.stage("q.a", None, of="q")
    assert "the parent q is not running" in refusal.error.message


# --- launchers that are killed, agents that come and go ---------------------------------------------------------


@scenario
async def the_cradle_has_next_to_no_memory_and_what_it_clones_has_the_launcher_for_a_parent(b: Bench) -> None:
    staged = await b.stage("a", ["true"])
    assert parent_of(staged.pid) == b.pid
    await b.launcher.abort("a")
    cradle = await cradle_of(b)
    if cradle is not None:
        assert int(field(cradle, "VmRSS").split()[0]) < 128
        assert "[heap]" not in Path(f"/proc/{cradle}/maps").read_text()


@scenario
async def a_cradle_that_is_killed_is_replaced_and_nothing_else_notices(b: Bench) -> None:
    await b.start("before", ["sleep", "1000"])
    cradle = await cradle_of(b)
    if cradle is not None:
        ended = os.pidfd_open(cradle)
        os.kill(cradle, signal.SIGKILL)
        await gone(ended)  # whoever asks it at that moment is told to try again
        os.close(ended)
    await b.start("after", ["sh", "-c", "exit 5"])
    assert os.waitstatus_to_exitcode((await b.ended("after"))["after"].status) == 5
    assert cradle is None or await cradle_of(b) not in (None, cradle)
    assert [line.phase for line in await b.launcher.inventory() if line.container_id == "before"] == ["running"]


@scenario
async def a_launcher_killed_before_the_release_takes_everything_with_it(b: Bench) -> None:
    pid = b.pid
    keeper = os.pidfd_open(parent_of(pid))
    staged = [await b.stage(f"a{number}", ["touch", "/data/a"], "g", home=True) for number in range(5)]
    os.kill(pid, signal.SIGKILL)
    await b.hear(LauncherGone)
    for each in staged:
        await gone(each.pidfd)
    await gone(keeper)  # which leaves when there is nothing to reap any more
    os.close(keeper)
    assert os.listdir(b.home) == []
    with refused() as refusal:
        await b.launcher.release("g")
    assert "the launcher is gone" in refusal.error.message


@scenario
async def a_launcher_killed_after_the_release_leaves_programs_alone_and_a_new_one_can_start_beside_them(b: Bench) -> None:
    pid = b.pid
    keeper_pid = parent_of(pid)
    keeper = os.pidfd_open(keeper_pid)
    read, write = os.pipe()
    staged = await b.start("a", ["sh", "-c", "read line; touch /data/done; exit 3"], home=True, stdin=read)
    os.close(read)
    await b.hear(Started)
    os.kill(pid, signal.SIGKILL)
    await b.hear(LauncherGone)
    assert parent_of(staged.pid) in (keeper_pid, pid)
    async with open_launcher(b.run_dir, walker=b.walker) as second:
        assert b.find() != pid
        assert await second.inventory() == []
        await second.stop()
    assert os.listdir(b.home) == []
    os.write(write, b"go\n")
    os.close(write)
    await gone(staged.pidfd)
    assert os.listdir(b.home) == ["done"]
    await gone(keeper)
    os.close(keeper)


@scenario
async def a_launcher_that_was_started_from_another_user_namespace_is_used_by_root_alone(b: Bench) -> None:
    place = os.path.join(b.home, "elsewhere")
    os.mkdir(place)
    script = f"""if True:
        import trio
        from mesocosm.kernel.launcher.starting import start
        from mesocosm.kernel.linux import constants as c, namespaces
        namespaces.unshare(c.CLONE_NEWUSER | c.CLONE_NEWNS)
        for name, text in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
            with open(f"/proc/self/{{name}}", "w") as file:
                file.write(text)
        trio.run(start, {place!r}, {b.walker!r})
    """
    await trio.run_process([sys.executable, "-B", "-c", script])
    [theirs] = launchers(place)
    async with open_launcher(place, walker=b.walker) as ours:
        await ours.hello()
        assert (ours.pid != theirs) == b.confined
        with trio.fail_after(30):
            while launchers(place) != {ours.pid}:
                await trio.sleep(0.01)
        await ours.stop()


def launchers(run_dir: str) -> set[int]:
    """Every process that is one of this directory, whoever finds it."""
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text() == "meso-launcher\n" and run_dir in Path(f"/proc/{pid}/cmdline").read_text():
                found.add(int(pid))
    return found


@scenario
async def launchers_that_are_started_beside_one_another_are_one(b: Bench) -> None:
    async def several() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(start, b.run_dir, b.walker)

    pid = b.pid
    await several()
    assert launchers(b.run_dir) == {b.find()} == {pid}
    await b.launcher.hello()
    os.kill(pid, signal.SIGKILL)
    await b.hear(LauncherGone)
    await several()
    assert launchers(b.run_dir) == {b.find()}
    async with open_launcher(b.run_dir, walker=b.walker) as second:
        assert await second.inventory() == []
        await second.stop()


@scenario
async def a_new_launcher_adopts_what_a_killed_one_has_left_and_tells_how_it_ended(b: Bench) -> None:
    read, write = os.pipe()
    ends = {"told": ["sh", "-c", "read line; exit 3"], "killed": ["sleep", "1000"], "before": ["sleep", "1000"]}
    staged = {name: await b.start(name, argv, stdin=read) for name, argv in ends.items()}
    os.close(read)
    for name in ends:
        await b.hear(Started, name)
    orphans = [
        Orphan(name, each.pid, each.pidfd, pidfds.identity(each.pidfd, each.pid), name, b"kept") for name, each in staged.items()
    ]
    os.kill(b.pid, signal.SIGKILL)
    await b.hear(LauncherGone)
    b.kill(staged["before"])
    await gone(staged["before"].pidfd)
    await b.launcher.renew()
    await b.launcher.adopt(orphans)
    await b.launcher.adopt(orphans[:2])  # told twice: known once
    assert (await b.ended("before"))["before"].status == 9
    lines = {line.container_id: line for line in await b.launcher.inventory() if line.ended is None}
    assert {name: (line.pid, line.phase, line.note) for name, line in lines.items()} == {
        name: (staged[name].pid, "running", b"kept") for name in ("told", "killed")
    }
    for line in lines.values():
        os.close(line.pidfd or -1)
    os.write(write, b"go\n")
    os.close(write)
    b.kill(staged["killed"])
    ended = await b.ended("told", "killed")
    assert (ended["told"].status, ended["killed"].status) == (3 << 8, 9)
    await b.launcher.view("host", b.entries())
    await b.start("after", ["true"])
    await b.ended("after")
    assert await b.launcher.inventory() == []


@scenario
async def what_a_launcher_has_seen_and_told_nobody_who_said_so_is_written_down(b: Bench) -> None:
    staged = {name: await b.start(name, ["sleep", "1000"]) for name in ("known", "told", "later")}
    births = {name: pidfds.identity(each.pidfd, each.pid) for name, each in staged.items()}
    for name in ("known", "told"):
        b.kill(staged[name])
        await b.hear(Ended, name)
    await b.launcher.acknowledge(["known"])
    b.launcher.close()
    await b.hear(LauncherGone)
    b.kill(staged["later"])
    directory = os.open(b.run_dir, os.O_RDONLY)
    written = Reaped(directory)
    with trio.fail_after(30):
        while not all(written.find(staged[name].pid, births[name]) for name in ("told", "later")):
            await trio.sleep(0.01)
    os.kill(b.find(), signal.SIGKILL)
    found = {name: Reaped(directory).find(each.pid, births[name]) for name, each in staged.items()}
    os.close(directory)
    assert {name: record and record.status for name, record in found.items()} == {"known": None, "told": 9, "later": 9}
    await b.launcher.renew()


@scenario
async def a_launcher_that_is_stopped_is_asked_anew_each_time_and_serves_when_it_goes_on(b: Bench) -> None:
    pid = b.pid
    b.launcher.close()
    await b.hear(LauncherGone)
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            with trio.move_on_after(0.1) as scope:
                await b.launcher.renew()
            assert scope.cancelled_caught, "nobody has answered"
    finally:
        os.kill(pid, signal.SIGCONT)
    await b.launcher.renew()
    assert b.find() == pid
    await b.start("a", ["true"])
    await b.ended("a")


@scenario
async def an_upgrade_that_cannot_be_executed_leaves_the_launcher_as_it_was(b: Bench) -> None:
    pid = b.pid
    living = await b.start("a", None)
    await b.hear(Started)
    before = await b.steady()
    nothing = os.open("/dev/null", os.O_RDONLY)
    kind, answer, _ = await b.launcher._ask("upgrade", {"argv": ["nothing"]}, [nothing])
    os.close(nothing)
    assert (kind, answer["errno"]) == ("failed", errno.EACCES)
    await b.start("b", ["sh", "-c", "exit 5"])
    assert os.waitstatus_to_exitcode((await b.ended("b"))["b"].status or 0) == 5
    await b.start("a.a", ["true"], of="a")
    await b.ended("a.a")
    now = await b.steady()
    before["processes"] = now["processes"]  # there is another cradle
    await b.settled(before)
    assert b.find() == pid
    b.kill(living)
    await b.ended("a")


@scenario
async def an_upgrade_is_refused_while_somebody_stands_at_a_barrier_and_done_afterwards(b: Bench) -> None:
    pid = b.pid
    await b.stage("a", ["sh", "-c", "exit 4"])
    assert not await b.launcher.upgrade()
    await b.launcher.release("a")
    assert os.waitstatus_to_exitcode((await b.ended("a"))["a"].status or 0) == 4
    assert await b.launcher.upgrade()
    assert b.find() == pid
    await b.launcher.view("host", b.entries())
    await b.start("b", ["sh", "-c", "exit 5"])
    assert os.waitstatus_to_exitcode((await b.ended("b"))["b"].status or 0) == 5


@scenario
async def an_upgrade_forgets_nothing_that_was_to_be_told_a_little_later(b: Bench) -> None:
    living = await b.start("a", ["sleep", "1000"])
    with trio.fail_after(30):
        while not await b.launcher.upgrade():  # as soon as ever it may be
            pass
        await b.hear(Started, "a")
    b.kill(living)
    await b.ended("a")


@scenario
async def the_next_agent_sees_everything_and_hears_of_ends_it_missed_until_it_acknowledges(b: Bench) -> None:
    living = await b.start("living", None)
    await b.stage("waiting", None)
    await b.start("over", ["sh", "-c", "exit 5"])
    await b.hear(Ended, "over")
    for _ in range(2):
        async with open_launcher(b.run_dir) as second:
            lines = {line.container_id: line for line in await second.inventory()}
            assert {name: line.phase for name, line in lines.items()} == {"living": "running", "waiting": "staged", "over": "ended"}
            assert lines["over"].ended is not None
            assert os.waitstatus_to_exitcode(lines["over"].ended.status) == 5
            assert lines["living"].pid == living.pid
            for line in lines.values():
                if line.pidfd is not None:
                    signal.pidfd_send_signal(line.pidfd, 0)
                    os.close(line.pidfd)
    await b.hear(LauncherGone)  # the first agent has been replaced
    async with open_launcher(b.run_dir) as third:
        await third.acknowledge(["over"])
        await third.release("waiting")
        lines = {line.container_id: line for line in await third.inventory()}
        assert set(lines) == {"living", "waiting"}
        b.kill(living)
        while not isinstance(notice := await third.notices.receive(), Ended):
            pass
        assert (notice.container_id, notice.status) == ("living", 9)
        for line in lines.values():
            os.close(line.pidfd or -1)


@scenario
async def what_could_not_be_executed_is_kept_for_the_next_agent_until_the_end_is_acknowledged(b: Bench) -> None:
    program = b.home / "prog"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    await b.stage("a", ["/data/prog"], home=True)
    await b.stage("late", ["/data/prog"], home=True)
    program.unlink()
    await b.launcher.release("a")
    error = (await b.hear(ExecFailed, "a")).error
    await b.hear(Ended, "a")
    async with open_launcher(b.run_dir) as second:
        lines = {line.container_id: line for line in await second.inventory()}
        failed = lines["a"].failed
        assert failed is not None
        assert lines["late"].failed is None
        told = explain_late(failed, b.steps(["/data/prog"], home=True), "a").as_object()
        words = ("code", "errno", "syscall", "target", "step", "plugin")
        assert {word: told[word] for word in words} == {word: error[word] for word in words}
        await second.release("late")  # of a table that this one has never seen
        while not isinstance(notice := await second.notices.receive(), ExecFailed) or notice.container_id != "late":
            pass
        assert {word: (notice.failed or {})[word] for word in failed} == failed
        await second.acknowledge(["a"])
        assert "a" not in {line.container_id for line in await second.inventory()}
        os.close(lines["late"].pidfd or -1)


@scenario
async def looking_for_a_launcher_does_not_disturb_its_agent(b: Bench) -> None:
    for _ in range(5):
        assert b.find() == b.pid  # connects, asks who listens, and leaves
    connection = connect(b.run_dir)
    await b.start("a", ["true"])
    await b.ended("a")
    assert connection is not None
    connection.close()
    await b.launcher.hello()


@scenario
async def answers_to_an_agent_that_has_gone_are_not_given_to_the_next_one(b: Bench) -> None:
    first = connect(b.run_dir)
    assert first is not None
    first.send(msgpack.packb([1, "hello", {}]))
    assert msgpack.unpackb(first.recv(10_000))[:2] == [1, "ok"]
    for number in range(8):
        compiled = compile_steps(b.steps(None), confined=b.confined)
        body = {"id": f"a{number}", "barrier": "g", "parent": None, "note": b"", "fds": len(compiled.fds)}
        body |= {"user_map": compiled.user_map, "owner": compiled.owner, "enter_pid": compiled.enter_pid}
        body |= compiled.table._asdict()
        first.send(msgpack.packb([2 + number, "stage", body]))
    first.close()
    second = connect(b.run_dir)
    assert second is not None
    second.settimeout(5)
    answers = []
    for number in range(1, 31):
        second.send(msgpack.packb([number, "hello", {}]))
        answers.append(msgpack.unpackb(second.recv(100_000))[:2])
        await trio.sleep(0.001)
    assert answers == [[number, "ok"] for number in range(1, 31)]
    second.close()
    async with open_launcher(b.run_dir) as third:
        with trio.fail_after(5):
            while {line.phase for line in await third.inventory()} != {"staged"}:
                await trio.sleep(0.01)
        await third.abort("g")
        assert await third.inventory() == []


@scenario
async def an_agent_that_does_not_listen_does_not_stop_the_launcher(b: Bench) -> None:
    await b.start("a", None)
    await b.hear(Started)
    before = await b.steady()
    deaf = connect(b.run_dir)
    assert deaf is not None
    deaf.setblocking(False)  # noqa: FBT003 - the library's own signature
    number = 0
    for _ in range(3000):
        number += 1
        while True:
            try:
                deaf.send(msgpack.packb([number, "inventory", {}]))
                break
            except BlockingIOError:
                await trio.lowlevel.wait_writable(deaf)
    assert b.find()  # it still accepts
    heard, pidfds = 0, 0
    while heard < number:
        try:
            data, fds, _, _ = socket.recv_fds(deaf, 10_000, 4)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(deaf)
            continue
        heard += 1
        pidfds += len(fds)
        for fd in fds:
            os.close(fd)
        assert msgpack.unpackb(data)[:2] == [heard, "ok"]
    assert pidfds == number
    for _ in range(3000):  # and one that leaves with a pile of unread answers
        try:
            deaf.send(msgpack.packb([number, "inventory", {}]))
        except BlockingIOError:
            await trio.lowlevel.wait_writable(deaf)
    deaf.close()
    async with open_launcher(b.run_dir) as second:
        await second.hello()
        await b.settled(before)


@scenario
async def messages_that_nobody_understands_are_answered_and_survived(b: Bench) -> None:
    odd = connect(b.run_dir)
    assert odd is not None
    odd.settimeout(5)
    odd.send(msgpack.packb([1, "hello", {}]))
    assert msgpack.unpackb(odd.recv(10_000))[:2] == [1, "ok"]
    fd = os.open("/dev/null", os.O_RDONLY)
    before = b.census()
    for message in (b"\xc1", msgpack.packb(7), msgpack.packb([]), msgpack.packb([1, "dance", {}]), msgpack.packb([2, "stage", {}])):
        socket.send_fds(odd, [message], [fd])
    assert msgpack.unpackb(odd.recv(10_000))[:2] == [1, "failed"]
    assert msgpack.unpackb(odd.recv(10_000))[:2] == [2, "failed"]
    os.close(fd)
    odd.close()
    async with open_launcher(b.run_dir) as launcher:
        await launcher.hello()
        await b.settled(before)


@scenario
async def stopping_is_refused_while_containers_live(b: Bench) -> None:
    staged = await b.start("a", None)
    await b.hear(Started)
    with refused() as refusal:
        await b.launcher.stop()
    assert refusal.error.fields["errno"] == "EBUSY"
    assert "a" in refusal.error.message
    b.kill(staged)
    await b.ended("a")
    await b.launcher.stop()
    await b.hear(LauncherGone)
    assert connect(b.run_dir) is None


@scenario
async def a_launcher_that_nobody_needs_ends_by_itself_but_not_at_once(b: Bench) -> None:
    await trio.sleep(5.5)  # an agent that has nothing to say is still an agent
    pid = b.pid
    launcher = os.pidfd_open(pid)
    b.launcher.close()
    left = time.monotonic()
    async with open_launcher(b.run_dir) as second:
        assert b.find() == pid  # the next agent finds it
        await second.hello()
    await gone(launcher)
    assert 4 < time.monotonic() - left < 15
    os.close(launcher)


@scenario
async def a_hundred_births_leave_no_descriptor_and_no_memory_behind(b: Bench) -> None:
    pause = await b.start("p", None)
    await b.hear(Started, "p")

    async def births(rounds: int) -> int:
        for number in range(rounds):
            await b.start("x", ["true"], of="p" if number % 2 else None, home=True)
            await b.ended("x")
            with refused():
                await b.stage("y", ["nope"], of="p" if number % 2 else None)
        return int(field(b.pid, "Pss", "smaps_rollup").split()[0])

    await births(20)
    before, kib = await b.steady(), await births(1)
    grown = await births(50) - kib
    await b.settled(before)
    assert kib <= 12 * 1024, kib
    assert grown <= 256, grown
    b.kill(pause)


@scenario
async def whichever_descriptor_it_is_short_of_a_launch_is_refused_and_it_lives_on(b: Bench) -> None:
    await fail_by_turns(b, DESCRIPTORS, lambda _, __, free: short_of_descriptors(b.pid, free))


@scenario
async def whichever_call_of_its_own_fails_a_launch_is_refused_and_it_lives_on(b: Bench) -> None:
    if shutil.which("strace") is None or b.confined:  # an ordinary user's launcher lets nobody trace it
        return
    await fail_by_turns(b, OWN_CALLS, partial(failing_call, b.pid))


@scenario
async def a_run_directory_may_have_a_long_path(b: Bench) -> None:
    deep = b.place / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with open_launcher(str(deep), walker=b.walker) as launcher:
        await launcher.view("host", b.entries())
        staged = await launcher.stage(StageRequest("a", "a", b.steps(["true"])))
        await launcher.release("a")
        while not isinstance(await launcher.notices.receive(), Ended):
            pass
        os.close(staged.pidfd)
        await launcher.stop()


# --- views ------------------------------------------------------------------------------------------------------

CONNECT = """
import socket, sys
for path in sys.argv[1:]:
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(path); print(path, "connected")
    except OSError as e:
        print(path, e.errno)
"""


@scenario
async def a_socket_below_a_view_is_only_a_name_and_mounts_below_it_are_not_there(b: Bench) -> None:
    shown = b.place / "shown"
    (shown / "sub").mkdir(parents=True)
    (shown / "file").write_text("from the host")
    mounts.move_mount(tree := mounts.fsmount("tmpfs", {"size": "1m", "mode": "0777"}), str(shown / "sub"))
    os.close(tree)
    (shown / "sub" / "secret").write_text("not for you")
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(shown)
    listener.bind("socket")
    listener.listen()
    os.chmod("socket", 0o777)
    os.chdir("/")
    view = [*b.entries(), {"target": "/mnt/over", "kind": "overlay", "source": str(shown)}]
    view.append({"target": "/mnt/bound", "kind": "bind", "source": str(shown)})
    await b.launcher.view("shown", view)
    await b.launcher.view("shown", view)  # once is enough, twice is no error
    out = os.pipe()
    argv = ["/usr/bin/python3", "-ISc", CONNECT, "/mnt/over/socket", "/mnt/bound/socket"]
    clone, _, *rest = b.steps(argv, stdout=out[1])
    staged = await b.launcher.stage(StageRequest("a", "a", (clone, Step("view", {"name": "shown"}), *rest)))
    os.close(out[1])
    root = Path(f"/proc/{staged.pid}/root")
    assert (root / "mnt/over/file").read_text() == "from the host"
    assert os.listdir(root / "mnt/over/sub") == []
    assert os.listdir(root / "mnt/bound/sub") == []
    for path in ("mnt/over/new", "mnt/over/sub/new", "mnt/over/file", "mnt/bound/file", "mnt/new", "usr/new", "etc/new"):
        assert is_read_only(root / path), path
    await b.launcher.release("a")
    await b.hear(Ended)
    assert os.read(out[0], 1000).decode().split("\n") == ["/mnt/over/socket 111", "/mnt/bound/socket connected", ""]
    os.close(out[0])
    os.close(staged.pidfd)
    listener.close()


@scenario
async def a_view_that_cannot_be_made_is_an_error_and_leaves_nothing(b: Bench) -> None:
    before = await b.steady()
    bad = [*b.entries(), {"target": "/x", "kind": "directory"}, {"target": "/x", "kind": "link", "link": "y"}]
    for _ in range(2):
        with refused() as refusal:
            await b.launcher.view("bad", bad)
        assert refusal.error.fields["target"] == "bad"
        assert refusal.error.fields["errno"] == "EEXIST"
    await b.settled(before)
    await b.launcher.view("bad", b.entries())


def main() -> None:
    """Answers requests from the standard input until its end."""
    is_root = sys.argv[1] == "root"
    mode_ready = False
    for line in sys.stdin:
        name, place, walker = line.split()
        if not mode_ready:
            # Mounts that scenarios make are seen by nobody else.
            if is_root:
                namespaces.unshare(c.CLONE_NEWNS)
                mounts.make_slave("/")
            else:
                os.makedirs(f"{place}/run", exist_ok=True)
                confine(f"{place}/run")
            mode_ready = True
        result: Any = run(SCENARIOS[name], place, None if walker == "-" else walker)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
