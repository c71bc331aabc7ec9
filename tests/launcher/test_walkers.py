"""Both walkers are held to the same behaviour, by programs of harmless calls in a child that is cloned by the program itself.

The children are copies of this very process, as in the launcher: the first row is the clone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesocosm.kernel.launcher import table as t
from mesocosm.kernel.launcher import walk
from mesocosm.kernel.launcher.link import link
from mesocosm.kernel.linux import constants as c

TRACE, NULL, READ_END = t.Passed(0), t.Passed(1), t.Passed(2)  # a pipe to us, /dev/null, a pipe at its end of file
BAD = 250  # no descriptor has this number
EBADF = 9


class Outcome(NamedTuple):
    """What a program did: what it wrote, what it said on its status descriptor, and how it ended."""

    trace: bytes
    record: tuple[int, int] | None
    code: int


class Runner:
    """Runs programs with one walker."""

    def __init__(self, walker: walk.Walker) -> None:
        self.walker = walker

    def __call__(self, body: t.Fragment, *, flags: int = 0, preset: Mapping[int, int] | None = None) -> Outcome:
        trace, trace_end = os.pipe()
        broken, broken_end = os.pipe()
        os.close(broken_end)
        status, status_end = os.pipe()
        null = os.open("/dev/null", os.O_RDWR)
        head = t.Fragment()
        head.row("clone3", t.Data(clone_arguments(flags)), 88, flags=t.RETURN_IF_ANY)
        tail = t.Fragment()
        tail.row("exit_group", 7)
        tail.row("write", t.Special("status"), 0, 0)  # mentioned, so that it is kept
        table = t.assemble([(head, 0), (body, 0), (tail, 0)], 1)
        linked = link(table, [trace_end, null, broken], [status_end] + [-1] * 6)
        for slot, word in (preset or {}).items():
            struct.pack_into("=q", linked.buffer, 8 * slot, word)
        pid = self.walker(linked, status_end)
        for fd in (trace_end, status_end, broken, null):
            os.close(fd)
        try:
            if pid < 0:
                return Outcome(b"", None, pid)
            written, said = read_all(trace), read_all(status)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        finally:
            os.close(trace)
            os.close(status)
        record = None
        if said:
            row, errno, _ = t.RECORD.unpack(said)
            record = (linked.original_row(row) - 1, errno)  # counted in the body
        return Outcome(written, record, code)


def clone_arguments(flags: int) -> bytes:
    """struct clone_args; with CLONE_PARENT no signal may be named."""
    return struct.pack("=11Q", flags | c.CLONE_CLEAR_SIGHAND, 0, 0, 0, 0 if flags & c.CLONE_PARENT else signal.SIGCHLD, *[0] * 6)


def read_all(fd: int) -> bytes:
    """Until nobody has the other end any more."""
    data = b""
    while piece := os.read(fd, 65536):
        data += piece
    return data


def say(fragment: t.Fragment, letter: str, **more: Any) -> None:
    """A row that leaves a letter in the trace."""
    fragment.row("write", TRACE, t.Data(letter.encode()), 1, **more)


def get_walker(name: str) -> walk.Walker:
    """The walker, or a skip that says what is missing."""
    if name == "stub" and c.ARCH != "x86_64":
        pytest.skip(f"this machine cannot: there is no machine-code walker for {c.ARCH}")
    return walk.choose_walker(name)[1]


@pytest.fixture(params=["python", "stub"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Both walkers, one after the other. No child that an earlier test forgot may be taken for one of theirs."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return Runner(get_walker(request.param))


@pytest.fixture
def f() -> t.Fragment:
    """An empty program."""
    return t.Fragment()


def test_rows_run_in_order_and_the_clone_returns_in_the_parent(run: Runner, f: t.Fragment) -> None:
    say(f, "a")
    say(f, "b")
    assert run(f) == Outcome(b"ab", None, 7)


def test_a_failing_row_ends_the_child_with_126_and_a_record(run: Runner, f: t.Fragment) -> None:
    say(f, "a")
    f.row("close", BAD)
    say(f, "b")
    assert run(f) == Outcome(b"a", (1, EBADF), 126)


@pytest.mark.parametrize(
    ("expect", "outcome"), [(1, Outcome(b"ab", None, 7)), (2, Outcome(b"a", (0, -1), 126)), (0, Outcome(b"a", (0, -1), 126))]
)
def test_equal_means_equal(run: Runner, f: t.Fragment, expect: int, outcome: Outcome) -> None:
    f.row("write", TRACE, t.Data(b"a"), 1, expect=expect)
    say(f, "b")
    assert run(f) == outcome


def test_an_expected_failure_may_be_expected(run: Runner, f: t.Fragment) -> None:
    f.row("close", BAD, expect=-EBADF)
    say(f, "a")
    assert run(f) == Outcome(b"a", None, 7)


def test_a_barrier_at_its_end_of_file_is_a_failure_and_not_a_success(run: Runner, f: t.Fragment) -> None:
    f.row("read", READ_END, t.Data(bytes(8)), 1, expect=1)
    say(f, "a")
    assert run(f) == Outcome(b"", (0, 0), 126)


def test_any_means_any(run: Runner, f: t.Fragment) -> None:
    f.row("close", BAD, flags=t.OK_ANY)
    say(f, "a")
    assert run(f) == Outcome(b"a", None, 7)


@pytest.mark.parametrize(("fd", "trace"), [(TRACE, b"xc"), (BAD, b"abc")])
def test_jump_if_ok_jumps_after_success_and_forgives_failure(run: Runner, f: t.Fragment, fd: Any, trace: bytes) -> None:
    f.row("write", fd, t.Data(b"x"), 1, flags=t.JUMP_IF_OK, skip=2)
    say(f, "a")
    say(f, "b")
    say(f, "c")
    assert run(f) == Outcome(trace, None, 7)


@pytest.mark.parametrize(("fd", "trace"), [(TRACE, b"xabc"), (BAD, b"c")])
def test_jump_if_fail_jumps_after_failure_and_goes_on_after_success(run: Runner, f: t.Fragment, fd: Any, trace: bytes) -> None:
    f.row("write", fd, t.Data(b"x"), 1, flags=t.JUMP_IF_FAIL, skip=2)
    say(f, "a")
    say(f, "b")
    say(f, "c")
    assert run(f) == Outcome(trace, None, 7)


@pytest.mark.parametrize(("fd", "trace"), [(NULL, b"c"), (TRACE, b"xabc")])
def test_jump_if_zero_jumps_after_zero_only(run: Runner, f: t.Fragment, fd: Any, trace: bytes) -> None:
    if fd is NULL:
        f.row("read", NULL, t.Data(bytes(8)), 1, flags=t.JUMP_IF_ZERO, skip=2)
    else:
        say(f, "x", flags=t.JUMP_IF_ZERO, skip=2)
    say(f, "a")
    say(f, "b")
    say(f, "c")
    assert run(f) == Outcome(trace, None, 7)


def test_jump_if_zero_does_not_forgive_failure(run: Runner, f: t.Fragment) -> None:
    f.row("close", BAD, flags=t.JUMP_IF_ZERO, skip=1)
    assert run(f) == Outcome(b"", (0, EBADF), 126)


def test_results_go_to_slots_and_come_back_as_arguments(run: Runner, f: t.Fragment) -> None:
    f.row("dup3", TRACE, 200, 0, out=t.Slot(3))
    f.row("write", TRACE, t.Data(b"abcd"), 3, out=t.Slot(15))
    f.row("write", t.Slot(3), t.Data(b"wxyz"), t.Slot(15))
    assert run(f) == Outcome(b"abcwxy", None, 7)


GETPID, PROCESS_VM_WRITEV = (172, 271) if c.ARCH == "aarch64" else (39, 311)  # a call that looks at all its six arguments


@pytest.mark.parametrize("index", range(1, 6))
def test_each_of_the_six_arguments_may_be_indirect(run: Runner, f: t.Fragment, index: int) -> None:
    source, target = ctypes.create_string_buffer(b"hello", 5), ctypes.create_string_buffer(5)
    here, there = (ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(buffer), 5)) for buffer in (source, target))
    given: list[Any] = [t.Slot(9), ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0]  # the first one always is
    f.row("close", 0, out=t.Slot(9))
    f.words[-t.ROW_WORDS] = GETPID
    words = [t.Slot(5) if number == index else value for number, value in enumerate(given)]
    f.row("write", *words, expect=5)
    f.words[-t.ROW_WORDS] = PROCESS_VM_WRITEV
    f.row("write", TRACE, ctypes.addressof(target), 5)
    assert run(f, preset={5: given[index]}) == Outcome(b"hello", None, 7)


def test_a_failure_is_stored_too(run: Runner, f: t.Fragment) -> None:
    f.row("close", BAD, out=t.Slot(2), flags=t.OK_ANY)
    f.row("close", t.Slot(2), expect=-EBADF)
    assert run(f) == Outcome(b"", None, 7)


def test_a_clone_that_fails_is_told_to_the_caller(run: Runner, f: t.Fragment) -> None:
    assert run(f, flags=c.CLONE_PARENT | 1).code == -22


def test_an_intermediate_leaves_and_its_child_goes_on(run: Runner, f: t.Fragment) -> None:
    f.row("clone3", t.Data(clone_arguments(c.CLONE_PARENT)), 88, flags=t.LEAVE_IF_PARENT)
    say(f, "l")
    outcome = run(f)
    assert outcome == Outcome(b"l", None, 0)
    pid, status = os.waitpid(-1, 0)  # the leaf is ours, not the intermediate's
    assert os.waitstatus_to_exitcode(status) == 7
    assert pid > 0


def test_an_intermediate_whose_clone_fails_reports_it(run: Runner, f: t.Fragment) -> None:
    f.row("clone3", t.Data(clone_arguments(c.CLONE_PARENT | 1)), 88, flags=t.LEAVE_IF_PARENT)
    assert run(f) == Outcome(b"", (0, 22), 126)


def test_the_child_holds_nothing_but_what_it_was_given(run: Runner, f: t.Fragment) -> None:
    with open("/dev/null") as mine:
        f.row("dup3", mine.fileno(), 210, 0, expect=-EBADF)
        f.row("dup3", NULL, 210, 0)
        assert run(f) == Outcome(b"", None, 7)


def test_strings_come_back_whole(run: Runner, f: t.Fragment, tmp_path: Path) -> None:
    f.row("chdir", t.Text(os.fsencode(tmp_path)))
    f.row("mkdirat", c.AT_FDCWD, t.Text(b"made"), 0o700)
    f.row("execve", t.Text(b"/bin/sh"), t.Vector((b"sh", b"-c", b"cd made && echo $X >it")), t.Vector((b"X=42",)))
    assert run(f).code == 0
    assert (tmp_path / "made" / "it").read_text() == "42\n"


# --- programs that nobody thought of ----------------------------------------------------------------------------

CALLS = ("say", "fail", "zero", "twice")
MODES = ("plain", "equal 1", "equal 0", "equal error", "any", "jump if ok", "jump if fail", "jump if zero")
random_rows = st.lists(
    st.tuples(st.sampled_from(CALLS), st.sampled_from(MODES), st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=12
)


def build(rows: list[tuple[str, str, int, int, bool]]) -> t.Fragment:
    """A program of harmless calls; jumps stay inside."""
    f = t.Fragment()
    f.row("write", TRACE, t.Data(b"."), 1, out=t.Slot(1))  # slots 1 and 2 hold 1 from the start
    f.row("write", TRACE, t.Data(b"."), 1, out=t.Slot(2))
    for number, (call, mode, skip, out, indirect) in enumerate(rows):
        skip = min(skip, len(rows) - number - 1)
        more: dict[str, Any] = {"out": t.Slot(4 + out) if out else None}
        match mode:
            case "equal 1" | "equal 0":
                more["expect"] = int(mode[-1])
            case "equal error":
                more["expect"] = -EBADF
            case "any":
                more["flags"] = t.OK_ANY
            case "jump if ok":
                more |= {"flags": t.JUMP_IF_OK, "skip": skip}
            case "jump if fail":
                more |= {"flags": t.JUMP_IF_FAIL, "skip": skip}
            case "jump if zero":
                more |= {"flags": t.JUMP_IF_ZERO, "skip": skip}
        match call:
            case "say":
                f.row("write", TRACE, t.Data(bytes([97 + number])), t.Slot(1) if indirect else 1, **more)
            case "fail":
                f.row("close", BAD, **more)
            case "zero":
                f.row("read", NULL, t.Data(bytes(8)), t.Slot(2) if indirect else 1, **more)
            case "twice":
                f.row("dup3", TRACE, 200 + number, 0, **more)
    return f


@settings(max_examples=60)
@given(random_rows)
def test_both_walkers_do_the_same_with_any_program(rows: list[tuple[str, str, int, int, bool]]) -> None:
    stub, python = Runner(get_walker("stub")), Runner(get_walker("python"))
    assert stub(build(rows)) == python(build(rows))


# --- the machine code itself ------------------------------------------------------------------------------------

SOURCE = Path(walk.__file__).with_name("stub.S")
BYTES = Path(walk.__file__).with_name("stub.x86_64.bin")


@pytest.fixture
def tools() -> tuple[str, str]:
    """An assembler and objcopy."""
    found = [shutil.which(name) for name in ("gcc", "objcopy")]
    missing = [name for name, path in zip(("gcc", "objcopy"), found, strict=True) if path is None]
    if missing or c.ARCH != "x86_64":
        pytest.skip(f"this machine cannot assemble the stub: {' and '.join(missing) or 'it is ' + c.ARCH}")
    return str(found[0]), str(found[1])


def test_the_bytes_of_the_stub_are_its_listing_assembled(tools: tuple[str, str], tmp_path: Path) -> None:
    gcc, objcopy = tools
    subprocess.run([gcc, "-c", "-o", "stub.o", SOURCE], cwd=tmp_path, check=True, timeout=60)
    subprocess.run([objcopy, "-O", "binary", "--only-section=.text", "stub.o", "stub.bin"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "stub.bin").read_bytes() == BYTES.read_bytes()


def test_the_stub_is_mapped_readable_and_executable_and_never_writable() -> None:
    get_walker("stub")
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(BYTES.name)]
    assert lines
    assert {line.split()[1] for line in lines} == {"r-xp"}


def test_a_walker_that_does_not_exist_is_not_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "ARCH", "riscv64")
    assert walk.choose_walker(None)[0] == "python"
    assert walk.choose_walker("python")[0] == "python"
    with pytest.raises(OSError, match="no machine-code walker"):
        walk.choose_walker("stub")
