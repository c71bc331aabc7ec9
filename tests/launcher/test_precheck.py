"""What execve would refuse after the barrier is refused before it, and what it would run is let through.

Every program here says so if it is executed; the tests hold what `precheck` says against what execve really does.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.core.plan import Step
from mesocosm.kernel.launcher import precheck as module
from mesocosm.kernel.launcher.precheck import precheck
from mesocosm.kernel.linux.constants import ARCH
from mesocosm.kernel.runtime.outside import Outside

SH = os.path.realpath("/bin/sh")
FOREIGN = 243  # EM_RISCV


def elf(
    *, machine: int = 62, loader: bytes | None = None, table: int = 64, size: int = 56, at: int = 120, length: int | None = None
) -> bytes:
    """The beginning of an ELF file, with a PT_INTERP if there is a loader; lies about where things are on request."""
    name = b"" if loader is None else loader
    fields = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, table, 0, 0, 64, size, 1, 64, 0, 0)
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9) + fields
    length = len(name) if length is None else length
    return header + struct.pack("<IIQQQQQQ", 1 if loader is None else 3, 4, at, 0, 0, length, length, 1) + name


LOADER = b"/no/such/ld.so\0"
BROKEN = "its ELF headers are broken"


def script(line: str) -> Callable[[Path], bytes]:
    """A program with a first line; {here} is its directory."""
    return lambda here: f"#!{line.format(here=here)}\necho ran >>{here}/ran\n".encode()


def make(here: Path, content: bytes | Callable[[Path], bytes], name: str = "prog", mode: int = 0o755) -> Path:
    """A file to execute."""
    path = here / name
    path.write_bytes(content if isinstance(content, bytes) else content(here))
    path.chmod(mode)
    return path


async def check(*argv: str, cwd: str = "/", path: str = "/usr/bin:/bin") -> None:
    """As for a container whose root is ours."""
    steps = (
        Step("bind", {"target": "/"}, "rootfs"), Step("working_directory", {"path": cwd}, "program"),
        Step("check", {"argv": list(argv), "path": path}, "program"),
    )  # fmt: skip
    await precheck(os.getpid(), steps, "box", elsewhere=Outside().ask)


@pytest.fixture(autouse=True)
def no_foreign_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever binfmt_misc knows on this machine."""
    monkeypatch.setattr(module, "_runs_foreign_formats", lambda: False)


BAD: dict[str, tuple[bytes | Callable[[Path], bytes], str, str]] = {
    "missing interpreter": (script("/no/such/interpreter"), "ENOENT", "its interpreter /no/such/interpreter is missing"),
    "missing loader": (elf(loader=LOADER), "ENOENT", "its loader /no/such/ld.so is missing"),
    "empty": (b"", "ENOEXEC", "it is empty"),
    "garbage": (b"just text\n", "ENOEXEC", "neither a script with a #! line nor an ELF program"),
    "truncated ELF": (b"\x7fELF\x02\x01\x01", "ENOEXEC", "neither a script"),
    "foreign machine": (elf(machine=FOREIGN), "ENOEXEC", "another machine (ELF e_machine 243)"),
    "no interpreter named": (b"#!\necho", "ENOEXEC", "names no interpreter"),
    "only blanks": (b"#!  \t \n", "ENOEXEC", "names no interpreter"),
    "an interpreter with a NUL for a name": (b"#!\0\n", "ENOEXEC", "names no interpreter"),
    "an interpreter that is no text": (b"#!/no/such/\xff\n", "ENOENT", "its interpreter /no/such/\\udcff is missing"),
    "a loader that is no text": (elf(loader=b"/no/such/\xff\0"), "ENOENT", "its loader /no/such/\\udcff is missing"),
    "headers before the file": (elf(loader=LOADER, table=2**64 - 1), "ENOEXEC", BROKEN),
    "headers at the last byte a file can have": (elf(loader=LOADER, table=2**63 - 1), "ENOEXEC", BROKEN),
    "headers after the file": (elf(loader=LOADER)[:100], "ENOEXEC", BROKEN),
    "headers of no size": (elf(loader=LOADER, size=0), "ENOEXEC", BROKEN),
    "a loader before the file": (elf(loader=LOADER, at=2**64 - 1), "ENOEXEC", BROKEN),
    "a loader that never ends": (elf(loader=LOADER, length=2**64 - 1), "ENOEXEC", BROKEN),
    "a loader without its end": (elf(loader=LOADER[:-1]), "ENOEXEC", BROKEN),
    "a loader without a name": (elf(loader=b"\0\0"), "ENOEXEC", BROKEN),
    "itself": (script("{here}/prog"), "ELOOP", "too many deep"),
    "interpreter is a directory": (script("{here}"), "EACCES", "is not executable"),
}
GOOD: dict[str, bytes | Callable[[Path], bytes]] = {
    "script": script(SH),
    "script with an argument": script(f"{SH} -e"),
    "script with blanks": script(f" \t{SH} \t"),
    "script by env": script("/usr/bin/env sh"),
    "script with a NUL": script(f"{SH}\0 and more"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_program_that_cannot_run_is_refused_and_told_why(case: str, tmp_path: Path) -> None:
    content, number, words = BAD[case]
    program = make(tmp_path, content)
    with pytest.raises(LaunchError) as raised:
        await check(str(program))
    error = raised.value.as_object()
    assert words in error["message"]
    assert str(program) in error["message"]
    assert error["errno"] == number
    assert error["syscall"] == "execve"
    assert error["plugin"] == "program"
    assert error["step"] == {"index": 2, "stage": "check", "kind": "check"}
    assert raised.value.exit_code == (127 if number == "ENOENT" else 126)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_would_have_been_refused_by_execve(case: str, tmp_path: Path) -> None:
    program = make(tmp_path, BAD[case][0])
    with pytest.raises(OSError) as raised:
        subprocess.run([program], check=False, timeout=10)
    if ARCH == "x86_64":
        assert raised.value.errno
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", GOOD)
async def test_what_execve_runs_is_let_through_and_not_run(case: str, tmp_path: Path) -> None:
    program = make(tmp_path, GOOD[case])
    await check(str(program))
    assert not (tmp_path / "ran").exists()
    assert subprocess.run([program], check=False, timeout=10).returncode == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", ["missing loader", "garbage", "script by env"])
async def test_another_process_comes_to_the_same(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked where a file system may not answer."""
    monkeypatch.setattr(module, "_may_wait", lambda *asked: True)
    content, number, words = BAD.get(case) or (GOOD[case], "", "")
    program = make(tmp_path, content)
    if not number:
        await check(str(program))
        return
    with pytest.raises(LaunchError) as raised:
        await check(str(program))
    assert words in raised.value.message
    assert (raised.value.fields["errno"], raised.value.fields["id"]) == (number, "box")
    with pytest.raises(LaunchError) as raised:  # its own trouble comes across, too
        await precheck(2**22 + 1, CHECKED, "box", elsewhere=_lies)
    assert (raised.value.fields["errno"], raised.value.fields["syscall"]) == ("EMFILE", "openat2")


CHECKED = (Step("overlay", {"lower": []}), Step("check", {"argv": ["/bin/true"], "path": "/bin"}, "program"))


async def test_a_reader_that_dies_is_not_a_file_system_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_may_wait", lambda *asked: True)

    async def dies(command: Sequence[str], seconds: float) -> tuple[str, int]:
        return "", 0

    with pytest.raises(LaunchError, match="ended without a word") as raised:
        await precheck(os.getpid(), CHECKED, "box", elsewhere=dies)
    assert "errno" not in raised.value.fields


async def _lies(command: Sequence[str], seconds: float) -> tuple[str, int]:
    return f'["errno", {errno.EMFILE}, "Too many open files", "/x"]', 0


async def test_one_that_is_not_answered_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_may_wait", lambda *asked: True)

    async def silent(command: Sequence[str], seconds: float) -> tuple[str, int]:
        assert 0 < seconds < 60
        return "", 4711

    with pytest.raises(LaunchError, match="could not be read within") as raised:
        await precheck(os.getpid(), CHECKED, "box", elsewhere=silent)
    fields = raised.value.fields
    assert (fields["errno"], fields["target"], fields["id"]) == ("ETIMEDOUT", "/bin/true", "box")
    assert "4711" in fields["have"]


async def test_the_machines_own_programs_are_let_through() -> None:
    assert await check("sh", "-c", "true") is None  # type: ignore[func-returns-value]  # else it raises
    assert await check(SH) is None  # type: ignore[func-returns-value]


async def test_one_that_is_ending_is_let_through_for_others_to_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["/bin/false"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    steps = (Step("check", {"argv": ["/no/such/program"], "path": "/bin"}, "program"),)

    await precheck(child.pid, steps, elsewhere=Outside().ask)
    assert child.wait() == 1
    await precheck(child.pid, steps, elsewhere=Outside().ask)

    monkeypatch.setattr("mesocosm.kernel.launcher.precheck._is_ending", lambda pid: False)
    with pytest.raises(LaunchError):  # it was not the program that pleased
        await precheck(child.pid, steps, elsewhere=Outside().ask)


async def test_an_interpreter_that_is_not_executable_is_named(tmp_path: Path) -> None:
    make(tmp_path, script(SH), "interpreter", 0o644)
    program = make(tmp_path, script("{here}/interpreter"))
    with pytest.raises(LaunchError) as raised:
        await check(str(program))
    assert raised.value.fields["target"] == f"{tmp_path}/interpreter"
    assert raised.value.fields["errno"] == "EACCES"
    assert "chmod +x" in raised.value.fields["hint"]


@pytest.mark.parametrize("depth", range(1, 9))
async def test_scripts_may_be_as_deep_as_execve_follows_them(depth: int, tmp_path: Path) -> None:
    interpreter = SH
    for level in range(depth):
        program = make(tmp_path, f"#!{interpreter}\n".encode(), f"level{level}")
        interpreter = str(program)
    try:
        runs = subprocess.run([interpreter], check=False, timeout=10).returncode == 0
    except OSError:
        runs = False
    if runs:
        await check(interpreter)
    else:
        with pytest.raises(LaunchError, match="too many deep"):
            await check(interpreter)


async def test_a_relative_program_is_looked_for_in_the_containers_cwd(tmp_path: Path) -> None:
    make(tmp_path, b"")
    with pytest.raises(LaunchError, match="it is empty"):
        await check("./prog", cwd=str(tmp_path))
    make(tmp_path, script(SH))
    await check("./prog", cwd=str(tmp_path))


async def test_a_relative_interpreter_is_looked_for_in_the_containers_cwd(tmp_path: Path) -> None:
    program = make(tmp_path, b"#!bin/interpreter\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/interpreter").symlink_to(SH)

    await check(str(program), cwd=str(tmp_path))

    with pytest.raises(LaunchError, match="its interpreter bin/interpreter is missing"):
        await check(str(program))


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket"])
async def test_what_is_no_file_is_refused_though_its_mode_says_that_it_may_be_executed(kind: str, tmp_path: Path) -> None:
    """AT_EXECVE_CHECK finds it, older kernels are asked by faccessat2, which does not."""
    path = tmp_path / "prog"
    match kind:
        case "pipe":
            os.mkfifo(path, 0o777)
        case "directory":
            path.mkdir()
        case _:
            os.mknod(path, 0o140777)

    with pytest.raises(LaunchError, match="it is no file"):
        await check(str(path))


async def test_path_is_searched_as_execvp_does_it(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "prog").mkdir()  # a directory is no program
    make(tmp_path / "b", b"", mode=0o644)  # nor is what may not be executed
    make(tmp_path / "d", b"")
    path = ":".join(f"{tmp_path}/{name}" for name in ("nowhere", "a", "b", "c", "d"))
    with pytest.raises(LaunchError) as raised:
        await check("prog", path=path)
    assert raised.value.fields["target"] == f"{tmp_path}/d/prog"
    make(tmp_path / "c", script(SH))
    await check("prog", path=path)


async def test_formats_that_the_kernel_was_told_of_are_its_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_runs_foreign_formats", lambda: True)
    await check(str(make(tmp_path, elf(machine=FOREIGN))))
    await check(str(make(tmp_path, b"\xca\xfe\xba\xbe java")))
    with pytest.raises(LaunchError, match="it is empty"):
        await check(str(make(tmp_path, b"")))


VIEW, OURS = Step("view", {"name": "host"}), Step("bind", {"target": "/sandbox", "foreign": False})


async def test_a_container_that_only_waits_has_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(module, "_check", lambda *found: looked.append(found))
    await precheck(os.getpid(), (VIEW, Step("pause", {})), elsewhere=Outside().ask)
    assert looked == []
    await precheck(os.getpid(), (VIEW, Step("check", {"argv": ["/bin/true"], "path": "/bin"}, "program")), elsewhere=Outside().ask)
    assert len(looked) == 1


@pytest.mark.parametrize(
    ("steps", "answers"),
    [
        ((VIEW, OURS, Step("tmpfs", {"target": "/t"})), True),
        ((VIEW, OURS, Step("bind", {"target": "/data", "foreign": True})), False),
        ((VIEW, Step("bind", {"target": "/data"})), False),  # of somebody who did not say
        ((OURS, Step("overlay", {"lower": []})), False),
    ],
)
def test_what_is_of_our_making_is_read_without_a_look_at_what_is_mounted(steps: tuple[Step, ...], answers: bool) -> None:  # noqa: FBT001
    assert module._answers(steps) is answers


def test_the_missing_loader_is_not_our_own_idea(tmp_path: Path) -> None:
    """The same message for a real program whose loader is not there: AT_EXECVE_CHECK would have let it through."""
    real = Path(shutil.which("true") or "/bin/true").read_bytes()
    head = real[:4096]
    if b"/lib64/ld-linux-x86-64.so.2" not in head:
        pytest.skip("this machine cannot: its /bin/true is static or not for x86-64")
    program = make(tmp_path, real.replace(b"/lib64/ld-linux-x86-64.so.2", b"/lib64/ld-gone!-x86-64.so.2", 1))
    with pytest.raises(module._RefusedError, match="ld-gone"):
        module._check(os.getpid(), [str(program)])
    with pytest.raises(FileNotFoundError):
        subprocess.run([program], check=False, timeout=10)
