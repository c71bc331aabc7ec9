"""The launch under attack: control groups and kernel settings. Nobody gets out of their limits, or at the machine's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

LIMIT = 64 * 2**20
CAPABLE = ["SYS_ADMIN", "SETUID", "SETGID", "SETFCAP", "SYS_CHROOT", "DAC_OVERRIDE"]
# Every way to a control file that a container could find; which of its writes got through.
RAISE = """
groups = {line.split(":")[1]: line.split(":", 2)[2].strip() for line in get("/proc/self/cgroup").decode().splitlines()}
VALUES = {
    "memory.limit_in_bytes": "-1", "memory.max": "max", "pids.max": "max", "tasks": "0", "cgroup.procs": "0",
    "cgroup.subtree_control": "-memory", "notify_on_release": "1", "release_agent": "/bin/sh",
}
def files(top, path):
    for above in (path, os.path.dirname(path), "/", "/.."):
        for name, value in VALUES.items():
            yield f"{top}{above}/{name}", value
def write_all(top):
    for path in {"/", *groups.values()}:
        for file, value in files(top, path):
            # Into its own group it may always go, and there is nothing to win.
            if os.path.exists(file) and not (path in ("/", "") and file.endswith(("tasks", "cgroup.procs"))):
                attempt(f"write {file}", lambda: put(file, value))
"""
BY_SIGHT = (
    RAISE
    + """
top = "/sys/fs/cgroup"
tops = [top] + [f"{top}/{name}" for name in (os.listdir(top) if os.path.isdir(top) else [])]
for top in tops:
    write_all(top)
attempt("leave", lambda: call("unshare", 0x02000000))
os.makedirs("/tmp/cgroup", exist_ok=True)
for kind, options in ((b"cgroup", b"memory"), (b"cgroup", b"pids"), (b"cgroup2", b"")):
    attempt(f"mount {kind.decode()} {options.decode()}", lambda: call("mount", b"none", b"/tmp/cgroup", kind, 0, options))
"""
)
# In users, mounts and a view of control groups of its own, where mounting may work: CVE-2022-0492.
BY_MOUNT = (
    RAISE
    + """
call("unshare", 0x10000000 | 0x00020000 | 0x02000000)
os.makedirs("/tmp/cgroup", exist_ok=True)
for options in (b"memory", b"pids"):
    try:
        call("mount", b"none", b"/tmp/cgroup", b"cgroup", 0, options)
    except OSError as error:
        tried[f"mount {options}"] = [errno.errorcode[error.errno], ""]
        continue
    write_all("/tmp/cgroup")
    call("umount2", b"/tmp/cgroup", 2)
"""
)
OWN = """
place = next(line.split(":", 2)[2].strip() for line in get("/proc/self/cgroup").decode().splitlines() if ":memory:" in line)
file = "/sys/fs/cgroup/memory" + place + "/memory.limit_in_bytes"
for file in (file.replace("limit", "memsw.limit"), file):
    if os.path.exists(file):
        attempt(file.rpartition("/")[2], lambda: put(file, str(2 * int(get(file)))))
"""
SETTINGS = """
NAMES = (
    "kernel/core_pattern", "kernel/hostname", "kernel/modprobe", "kernel/randomize_va_space", "kernel/msgmax", "fs/file-max",
    "net/ipv4/ip_forward", "net/core/somaxconn", "vm/overcommit_memory", "user/max_user_namespaces",
)
for name in NAMES:
    path = "/proc/sys/" + name
    if os.path.exists(path):
        attempt(name, lambda: put(path, get(path).decode()))
if os.path.exists("/proc/sysrq-trigger"):
    attempt("sysrq", lambda: put("/proc/sysrq-trigger", "h"))
attempt("_sysctl", lambda: call("syscall", 156, 0))
"""


def test_no_control_file_can_be_written_from_inside(attacks: Any) -> None:
    limits = {"resources": {"memory": LIMIT}} if attacks.world.uid == 0 else {}
    parent = attacks.start("sleep 60")

    outcomes = [attacks.python(BY_SIGHT, **limits), attacks.python(BY_SIGHT, parent=parent)]

    attacks.kill(parent)
    for outcome in outcomes:
        assert [what for what, said in outcome.tried.items() if said == "done"] == [], outcome
        assert {"leave", "mount cgroup memory", "mount cgroup2 "} <= outcome.tried.keys()


@pytest.mark.needs_root
def test_no_control_file_can_be_written_through_a_mount_of_ones_own(attacks: Any) -> None:
    """A weakened container that may mount: what it mounts is the host's, whose files are not its own."""
    outcome = attacks.python(BY_MOUNT, capabilities=CAPABLE, resources={"memory": LIMIT})

    assert [what for what, said in outcome.tried.items() if said == "done"] == [], outcome


@pytest.mark.needs_root
def test_a_container_that_was_given_the_hosts_users_and_mounts_raises_its_limit(attacks: Any) -> None:
    """The positive control: the file is the right one, and the write is."""
    if not Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists():
        pytest.skip("this machine cannot: it has no v1 memory controller")

    outcome = attacks.python(OWN, namespaces={"user": "host", "mount": "host", "cgroup": "host"}, resources={"memory": LIMIT})

    assert outcome.tried["memory.limit_in_bytes"] == "done"


def test_no_setting_of_the_machine_can_be_written(attacks: Any) -> None:
    parent = attacks.start("sleep 60")

    outcomes = [
        attacks.python(SETTINGS),
        attacks.python(SETTINGS, parent=parent),
        attacks.python(SETTINGS, namespaces={"ipc": "host"}),
    ]

    attacks.kill(parent)
    for outcome in outcomes:
        assert set(outcome.tried.values()) <= {"EROFS", "EACCES", "EPERM", "ENOSYS"}, outcome
        assert {"kernel/core_pattern", "net/ipv4/ip_forward"} <= outcome.tried.keys()


@pytest.mark.needs_root
def test_settings_can_be_written_by_a_container_that_was_given_the_hosts_users_and_mounts(attacks: Any) -> None:
    """The positive control: the writes are real ones (of what stands there already)."""
    outcome = attacks.python(SETTINGS, namespaces={"mount": "host", "user": "host"})

    assert outcome.tried["kernel/core_pattern"] == outcome.tried["fs/file-max"] == "done"


@pytest.mark.parametrize("field", ["sysctls", "sysctl"])
def test_a_pod_cannot_ask_for_a_setting(attacks: Any, field: str) -> None:
    """There is no such field, so there is nothing to smuggle one setting in with another by."""
    outcome = attacks.run("true", **{field: {"net.ipv4.ip_forward": "1\nkernel.core_pattern=|/x"}})

    assert (outcome.error["code"], outcome.error["path"]) == ("bad_input", f"$.{field}")
