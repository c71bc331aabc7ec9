"""Who holds a path, a control group or a process, on real ones of this machine."""

from __future__ import annotations

import _ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mesocosm.kernel.linux import holding, served

MAPS = "import ctypes, sys; held = ctypes.CDLL(sys.argv[1]); print('ready', flush=True); input()"
THREADS = """
import ctypes, threading
threading.Thread(target=lambda: (print("ready", flush=True), threading.Event().wait())).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@contextmanager
def running(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that has said "ready"."""
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def shell(*words: str, **options: Any) -> Any:
    return running("sh", "-c", "echo ready; read _", *words, **options)


def found(kind: str, target: object) -> dict[int, dict[str, Any]]:
    return {each["pid"]: each for each in holding.search(kind, str(target)) if "pid" in each}


def test_a_working_directory_holds_a_path(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    with shell(cwd=tmp_path / "below") as child:
        assert found("path", tmp_path)[child.pid]["how"] == [f"cwd {tmp_path}/below"]
        assert child.pid not in found("path", f"{tmp_path}/bel"), "another name with the same beginning"
    assert found("path", tmp_path) == {}


def test_an_open_file_holds_a_path_even_after_it_has_been_removed(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("x")
    with file.open() as opened, shell(pass_fds=[opened.fileno()]) as child:
        assert found("path", tmp_path)[child.pid]["how"] == [f"fd {opened.fileno()} {file}"]
        file.unlink()
        assert found("path", tmp_path)[child.pid]["how"] == [f"fd {opened.fileno()} {file} (deleted)"]


def test_a_mapped_file_holds_a_path_without_a_descriptor(tmp_path: Path) -> None:
    file = tmp_path / "mapped.so"
    file.write_bytes(Path(_ctypes.__file__).read_bytes())
    with running(sys.executable, "-c", MAPS, str(file)) as child:
        assert found("path", tmp_path)[child.pid]["how"] == [f"mmap {file}"]


def test_a_program_holds_the_path_that_it_was_started_from(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(Path("/bin/sh").read_bytes())
    program.chmod(0o755)
    with running(str(program), "-c", "echo ready; read _") as child:
        assert found("path", tmp_path)[child.pid]["how"] == [f"exe {program}"]


def test_another_mount_namespace_holds_what_is_bound_in_it(tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "elsewhere").mkdir()
    script = 'mount --bind "$0/held" "$0/elsewhere" && echo ready && read _'
    flags = ["-m"] if os.geteuid() == 0 else ["-Urm"]
    if subprocess.run(["unshare", *flags, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine cannot make a mount namespace for this user")
    with running("unshare", *flags, "sh", "-c", script, str(tmp_path)) as child:
        how = found("path", tmp_path / "held")[child.pid]["how"]
        assert how == [f"its mount namespace has it at {tmp_path}/elsewhere"]


def test_a_zombie_is_named_with_the_parent_that_does_not_reap_it() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    stands = holding.standing(child.pid)
    child.wait()
    assert (stands["state"], stands["parent"]["pid"]) == ("Z", os.getpid())
    assert holding.standing(child.pid)["state"] == "gone"


def test_a_process_whose_first_thread_has_ended_says_how_many_go_on() -> None:
    with running(sys.executable, "-c", THREADS) as child:
        while (stands := holding.standing(child.pid))["state"] != "Z":
            continue
        assert stands["threads"] == 1


def test_a_stopped_process_says_so() -> None:
    with shell() as child:
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        assert holding.standing(child.pid)["state"] == "T"


def test_a_cgroup_is_held_by_those_below_it_and_by_groups_that_are_empty(tmp_path: Path) -> None:
    with shell() as child:
        (tmp_path / "inner").mkdir()
        (tmp_path / "cgroup.procs").write_text("")
        (tmp_path / "inner/cgroup.procs").write_text(f"{child.pid}\n")
        finds = list(holding.search("cgroup", str(tmp_path)))
    assert [find["how"] for find in finds] == [["groups below it"], ["in inner below it"]]
    assert finds[0]["groups"] == ["inner"]
    assert finds[1]["pid"] == child.pid


def test_a_threaded_cgroup_is_emptied_by_its_threads() -> None:
    from mesocosm.kernel.runtime import undo

    top = holding.cgroup_mount("")
    if os.geteuid() or not top:
        pytest.skip("this machine cannot make a threaded group: that needs root and cgroup v2")
    group = Path(top) / f"threads-{os.getpid()}"
    inner = group / "inner"
    group.mkdir()
    try:
        inner.mkdir()
        try:
            (inner / "cgroup.type").write_text("threaded")
        except OSError as error:
            pytest.skip(f"this machine cannot make a threaded group: {error}")
        with shell() as child:
            (group / "cgroup.procs").write_text(str(child.pid))
            (inner / "cgroup.threads").write_text(str(child.pid))
            assert [each["pid"] for each in holding.search("cgroup", str(inner)) if "pid" in each] == [child.pid]
            assert undo.kill_cgroup(str(inner)) is undo.Attempt.BUSY
            assert child.wait(30) == -9
    finally:
        while undo.rmdir_cgroup(str(group)) is not undo.Attempt.GONE:
            continue


def test_the_program_prints_what_it_finds_and_stops_at_its_time(tmp_path: Path) -> None:
    with shell(cwd=tmp_path) as child:
        command = [sys.executable, "-I", "-S", "-B", holding.__file__, "30", "path", str(tmp_path)]
        lines = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
        assert child.pid in [line.get("pid") for line in lines]
        assert "looked" in lines[-1]
        command[5] = "0"
        lines = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
        assert "looked" not in lines[-1]
        assert len(lines) == 1


def test_a_served_file_system_is_seen_at_below_and_above_a_path_and_through_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = holding.Mount("1", "0:99", "/", f"{tmp_path}/a/b", "fuse.sshfs", "far")
    monkeypatch.setattr(served, "mounts_of", lambda _pid: [mount])
    table = served.Served()
    try:
        assert [table.touches(f"{tmp_path}/{path}") for path in ("a", "a/b", "a/b/c", "a/bc", "c")] == [
            True,
            True,
            True,
            False,
            False,
        ]
        (tmp_path / "a").mkdir()
        (tmp_path / "link").symlink_to("a/b/deep")
        (tmp_path / "other").symlink_to("a")
        (tmp_path / "round").symlink_to("round")
        paths = ("link", "link/x", "other/b", "other/c", "a", "a/../a/b", "round")
        assert [table.leads_to(f"{tmp_path}/{path}") for path in paths] == [True, True, True, False, False, True, False]
    finally:
        table.close()
