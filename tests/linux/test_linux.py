"""System calls by name, mounts by descriptor, paths that cannot be led astray, and facts found without touching anything."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.linux import constants as c
from mesocosm.kernel.linux import libc, namespaces, paths, probe
from mesocosm.kernel.linux.libc import SyscallError, address_of, syscall


def in_a_process(program: str) -> str:
    """What a program prints in a process of its own: for what cannot be taken back."""
    lines = "import os\nfrom mesocosm.kernel.linux import constants as c, mounts, namespaces\n" + program
    done = subprocess.run([sys.executable, "-W", "error", "-c", lines], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_failing_call_says_its_name_its_errno_and_what_it_was_done_to() -> None:
    with pytest.raises(SyscallError) as raised:
        syscall("chdir", b"/no/such/place", target="/no/such/place")
    error = raised.value
    assert (error.errno, error.syscall, error.filename) == (errno.ENOENT, "chdir", "/no/such/place")
    assert isinstance(error, OSError)
    assert "No such file" in str(error)


def test_arguments_are_numbers_strings_buffers_or_nothing() -> None:
    read, write = os.pipe()
    assert syscall("write", write, b"hello", 5) == 5
    buffer = ctypes.create_string_buffer(8)
    assert syscall("read", read, buffer, 8) == 5
    assert buffer.value == b"hello"
    os.close(read)
    os.close(write)
    with pytest.raises(OSError):
        syscall("chdir", None)


@given(st.binary(min_size=1, max_size=100))
def test_the_address_of_a_bytearray_is_where_its_bytes_are(data: bytes) -> None:
    buffer = bytearray(data)
    assert ctypes.string_at(address_of(buffer), len(data)) == data


def test_the_numbers_of_system_calls_are_those_of_this_machine() -> None:
    fd = os.open("/", os.O_PATH)
    assert syscall("dup3", fd, 240, os.O_CLOEXEC) == 240
    assert syscall("close", 240) == 0
    with pytest.raises(OSError):
        os.fstat(240)
    syscall("fchdir", fd)
    syscall("close_range", 241, 250, 0)
    os.close(fd)


def test_both_architectures_know_the_same_calls() -> None:
    names = {"x86_64": set(c._X86_64) | set(c._COMMON), "aarch64": set(c._AARCH64) | set(c._COMMON)}
    assert names["x86_64"] - names["aarch64"] <= {"poll", "arch_prctl"}  # which aarch64 does not have
    assert not names["aarch64"] - names["x86_64"]
    for table in (c._X86_64, c._AARCH64):
        assert len(set(table.values())) == len(table)


def test_the_gil_stays_held_in_raw_and_not_in_slow() -> None:
    assert type(libc._held) is ctypes.PyDLL
    assert type(libc._freed) is ctypes.CDLL


# --- paths ------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> int:
    """A directory full of links that lead elsewhere."""
    (tmp_path / "root" / "etc").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "passwd").write_text("inside")
    (tmp_path / "secret").write_text("outside")
    links = {"up": "../secret", "absolute": "/etc/passwd", "far": "../../../../../../etc/passwd", "loop": "loop"}
    for name, target in links.items():
        (tmp_path / "root" / name).symlink_to(target)
    (tmp_path / "root" / "magic").symlink_to(f"/proc/{os.getpid()}/root/etc/passwd")
    return os.open(tmp_path / "root", os.O_PATH | os.O_DIRECTORY)


@pytest.mark.parametrize("path", ["/etc/passwd", "etc/passwd", "absolute", "far", "/../../etc/passwd", "etc/../absolute"])
def test_links_and_dots_stay_inside_the_root(root: int, path: str) -> None:
    fd = paths.open_inside(root, path, os.O_RDONLY)
    assert os.read(fd, 100) == b"inside"
    assert not os.get_inheritable(fd)
    os.close(fd)
    os.close(root)


def test_a_rename_elsewhere_that_makes_the_kernel_unsure_of_dots_is_no_reason_to_fail(
    root: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsure = [True, True, True]

    def openat2(dirfd: int, path: str, how: bytes) -> int:
        if unsure:
            unsure.pop()
            raise SyscallError(errno.EAGAIN, "openat2", path)
        return call(dirfd, path, how)

    call = paths.libc.openat2
    monkeypatch.setattr(paths.libc, "openat2", openat2)
    os.close(paths.open_inside(root, "etc/../absolute", os.O_RDONLY))
    os.close(root)
    assert not unsure


def test_a_kernel_that_stays_unsure_is_an_error_in_the_end(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def openat2(_dirfd: int, path: str, _how: bytes) -> int:
        raise SyscallError(errno.EAGAIN, "openat2", path)

    monkeypatch.setattr(paths.libc, "openat2", openat2)
    with pytest.raises(SyscallError) as raised:
        paths.open_inside(root, "etc/../absolute", os.O_RDONLY)
    os.close(root)
    assert raised.value.errno == errno.EAGAIN


@pytest.mark.parametrize(
    ("path", "number"),
    [("up", errno.ENOENT), ("loop", errno.ELOOP), ("magic", errno.ENOENT), ("etc/passwd/x", errno.ENOTDIR)],
)
def test_what_would_lead_outside_is_an_error_that_names_the_path(root: int, path: str, number: int) -> None:
    with pytest.raises(SyscallError) as raised:
        paths.open_inside(root, path, os.O_RDONLY)
    os.close(root)
    assert (raised.value.errno, raised.value.filename, raised.value.syscall) == (number, path, "openat2")


def test_magic_links_are_not_followed_anywhere() -> None:
    slash = os.open("/", os.O_PATH)
    with pytest.raises(OSError):
        paths.open_inside(slash, f"/proc/{os.getpid()}/root", os.O_PATH | os.O_DIRECTORY)
    os.close(slash)


def test_our_own_paths_may_have_no_link_in_them(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    os.close(paths.open_own(str(tmp_path.resolve() / "real"), os.O_PATH | os.O_DIRECTORY))
    os.close(paths.open_own(str(tmp_path.resolve() / "real" / "new"), os.O_CREAT | os.O_WRONLY, 0o600))
    for path in (tmp_path / "link", tmp_path / "link" / "new"):
        with pytest.raises(OSError) as raised:
            paths.open_own(str(path), os.O_PATH)
        assert raised.value.errno == errno.ELOOP


# --- mounts and namespaces --------------------------------------------------------------------------------------


@pytest.mark.needs_root
def test_a_detached_mount_gets_its_attributes_before_anybody_sees_it(tmp_path: Path) -> None:
    (tmp_path / "at").mkdir()
    said = in_a_process(f"""
os.chdir({str(tmp_path)!r})
namespaces.unshare(c.CLONE_NEWNS)
mounts.make_private("/")
fd = mounts.fsmount("tmpfs", {{"size": "1m", "mode": "0700"}}, c.MOUNT_ATTR_NODEV)
mounts.mount_setattr(fd, set_=c.MOUNT_ATTR_RDONLY)
mounts.move_mount(fd, "at")
try:
    open("at/file", "w")
except OSError as error:
    print(error.errno)
copy = mounts.open_tree("at")
mounts.umount("at")
print(os.path.ismount("at"), os.statvfs(copy).f_flag & os.ST_RDONLY)
for bad in ({{"size": "nonsense"}}, {{"no-such-option": "1"}}):
    try:
        mounts.fsmount("tmpfs", bad)
    except OSError as error:
        print(error.syscall, error.errno, error.filename)
print(len(os.listdir("/proc/self/fd")))
""")
    assert said.splitlines()[:2] == ["30", "False 1"]
    assert said.splitlines()[2:] == ["fsconfig 22 tmpfs: size=nonsense", "fsconfig 22 tmpfs: no-such-option=1", "6"]  # no leak
    assert not os.path.ismount(tmp_path / "at")


@pytest.mark.needs_root
def test_a_clone_of_a_shared_mount_is_nobodys_peer(tmp_path: Path) -> None:
    said = in_a_process(f"""
os.chdir({str(tmp_path)!r})
namespaces.unshare(c.CLONE_NEWNS)
mounts.make_private("/")
for path in ("shared", "copy"):
    os.mkdir(path)
mounts.move_mount(mounts.fsmount("tmpfs", {{"size": "1m"}}), "shared")
mounts.syscall("mount", None, b"shared", None, 0x100000, None)  # MS_SHARED
os.mkdir("shared/below")
mounts.move_mount(mounts.open_tree("shared", recursive=True), "copy")
mounts.move_mount(mounts.fsmount("tmpfs", {{"size": "1m"}}), "shared/below")
print(os.path.ismount("shared/below"), os.path.ismount("copy/below"))
""")
    assert said == "True False\n"


@pytest.mark.needs_root
def test_the_root_can_be_exchanged_and_the_old_one_let_go() -> None:
    said = in_a_process("""
namespaces.unshare(c.CLONE_NEWNS)
mounts.make_private("/")
new = mounts.fsmount("tmpfs", {"size": "1m"})
mounts.move_mount(new, "/mnt")
os.chdir("/mnt")
os.mkdir("only")
mounts.pivot_root(".", ".")
mounts.umount(".", c.MNT_DETACH)
os.chdir("/")
print(os.listdir("/"))
""")
    assert said == "['only']\n"


def test_the_provider_of_namespaces_is_named_and_works() -> None:
    assert namespaces.provider in ("python-unshare", "os", "syscall")
    before = os.readlink("/proc/self/ns/uts")
    said = in_a_process("""
try:
    namespaces.unshare(c.CLONE_NEWUSER)
    old = os.open("/proc/self/ns/uts", os.O_RDONLY)
    namespaces.unshare(c.CLONE_NEWUTS)
    print("new", os.readlink("/proc/self/ns/uts"))
except OSError as error:
    print("refused", error.strerror)
try:
    namespaces.setns(0, c.CLONE_NEWUTS)
except OSError as error:
    print(error.errno in (9, 22))
""").split("\n")
    assert said[1] == "True"
    if said[0].startswith("refused"):
        pytest.skip(f"this machine cannot make user namespaces: {said[0]}")
    assert said[0] != f"new {before}"


# --- the probe --------------------------------------------------------------------------------------------------


def test_the_facts_are_those_of_this_machine(tmp_path: Path) -> None:
    facts = probe.probe(str(tmp_path / "run"), str(tmp_path / "state"))
    assert facts.arch == os.uname().machine
    assert facts.kernel[:2] == tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    assert facts.uid == os.getuid()
    assert facts.rootless == (os.getuid() != 0)
    assert facts.features <= set(probe.FEATURES)
    assert {"clone3", "openat2", "pidfd"} <= facts.features
    assert facts.accounts["root"].uid == 0
    assert facts.memory > 0
    assert facts.listing["/"]["proc"] == "dir"
    assert all(text in ("dir", "file") or text.startswith("-> ") for names in facts.listing.values() for text in names.values())


def test_looking_changes_nothing(tmp_path: Path) -> None:
    def state() -> tuple[object, ...]:
        links = [os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns"))]
        limits = Path("/proc/self/limits").read_text()
        return links, limits, len(os.listdir("/proc/self/fd")), Path("/proc/self/mountinfo").read_text(), os.listdir(tmp_path)

    before = state()
    facts = probe.probe(str(tmp_path / "run"), str(tmp_path / "state"))
    assert probe.probe(str(tmp_path / "run"), str(tmp_path / "state")) == facts
    assert state() == before


def test_run_ids_are_stable_and_differ() -> None:
    assert probe.run_id("/run/a") == probe.run_id("/run/b/../a")
    assert len({probe.run_id(f"/run/{number}") for number in range(1000)}) == 1000
    assert all(digit in "0123456789abcdef" for digit in probe.run_id("/run/a"))
    assert len(probe.run_id("/run/a")) == 6


def test_the_probe_can_be_told_that_its_user_has_entered_a_namespace_already(tmp_path: Path) -> None:
    facts = probe.probe(str(tmp_path), str(tmp_path), uid=1234, rootless=True)
    assert (facts.uid, facts.rootless, facts.uid_ranges, facts.uid_count) == (1234, True, 0, 1)


def test_mount_points_with_blanks_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = r"36 35 98:0 / /mnt/a\040b\011c\134d rw,noatime master:1 - ext3 /dev/root rw,errors=continue"
    (tmp_path / "mountinfo").write_text(line + "\n")
    real = open
    ours = tmp_path / "mountinfo"
    monkeypatch.setattr("builtins.open", lambda path, *more: real(ours if "mountinfo" in str(path) else path, *more))
    assert probe.mounts() == [("/mnt/a b\tc\\d", "ext3", "rw,errors=continue")]
