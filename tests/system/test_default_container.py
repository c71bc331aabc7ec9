"""The default container cannot take the host. Every attack first succeeds against a weakened pod: it is a real one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

CONNECT = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print('connected')"
PYTHON = "/usr/bin/python3"
needs_python = pytest.mark.skipif(not os.path.exists(PYTHON), reason="no /usr/bin/python3 to attack with")


def outcome(world: Any, command: list[str], **fields: Any) -> tuple[int, str]:
    """Exit code and output of one task of its own pod."""
    answer = world.run({"name": "attack", "executor": "command", "tasks": [{"name": "attack", "command": command} | fields]})
    text = "".join(line["data"] for line in answer.lines if line["type"] == "output")
    world.meso("rm", "attack")
    return answer.code, text


@pytest.fixture
def listener(world: Any) -> Iterator[Path]:
    """A Unix socket of the host, open to everybody, that accepts."""
    path = world.directory / "open.sock"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    path.chmod(0o777)
    world.directory.chmod(0o755)
    server.listen(64)
    thread = threading.Thread(target=_accept, args=(server,), daemon=True)
    thread.start()
    yield path
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()
    path.unlink()


def _accept(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


@needs_python
def test_a_host_socket_cannot_be_reached(world: Any, listener: Path) -> None:
    code, text = outcome(world, [PYTHON, "-c", CONNECT, str(listener)])

    assert code != 0
    assert "connected" not in text


@needs_python
def test_a_host_socket_can_be_reached_by_a_pod_that_was_given_its_directory(world: Any, listener: Path) -> None:
    """The positive control of the test above."""
    volumes = [{"source": f"host:{listener.parent}", "target": "/given"}]

    code, text = outcome(world, [PYTHON, "-c", CONNECT, "/given/open.sock"], volumes=volumes)

    assert (code, text) == (0, "connected\n")


@needs_python
def test_the_agents_socket_cannot_be_reached(world: Any) -> None:
    world.meso("ps")

    code, text = outcome(world, [PYTHON, "-c", CONNECT, str(world.run_dir / "agent.sock")])

    assert code != 0
    assert "connected" not in text


@needs_python
@pytest.mark.needs_root
def test_the_agents_socket_answers_denied_to_a_container_that_was_given_it(world: Any) -> None:
    """The socket as such can be reached with a weakened pod, and then the peer is known for a container."""
    world.meso("ps")
    speak = (
        "import socket,struct; s=socket.socket(socket.AF_UNIX); s.connect('/given/agent.sock'); print('connected');"
        "b=b'\\x94\\x00\\x01\\xaeGET_CONTAINERS\\x91\\x80'; s.send(struct.pack('>I',len(b))+b); print(s.recv(4096))"
    )
    volumes = [{"source": f"host:{world.run_dir}", "target": "/given"}]

    code, text = outcome(world, [PYTHON, "-c", speak], volumes=volumes, namespaces={"user": "host"})

    assert code == 0, text
    assert "connected" in text
    assert "denied" in text


def test_secrets_of_the_host_are_not_there(world: Any) -> None:
    code, text = outcome(world, ["sh", "-c", "cat /etc/shadow; ls -A /root; ls -A /home /var/lib /run/lock /boot /srv; true"])

    assert code == 0
    assert "root:" not in text
    # What is listed are empty directories of the container's own.
    headings_and_complaints = (":", "cannot", "No such")
    assert [line for line in text.splitlines() if line and not any(word in line for word in headings_and_complaints)] == []


@pytest.mark.needs_root
def test_secrets_of_the_host_are_there_for_a_pod_that_was_given_them(world: Any) -> None:
    volumes = [{"source": "host:/etc", "target": "/given", "read_only": True}]

    code, text = outcome(world, ["sh", "-c", "cat /given/shadow"], volumes=volumes, namespaces={"user": "host"})

    assert code == 0, text
    assert "root:" in text


@pytest.fixture
def submount() -> Iterator[Path]:
    """A writable tmpfs mounted below a directory that the view shows."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    import subprocess

    path = Path(f"/opt/mesocosm-test-{os.getpid()}")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(path)], check=True)
    (path / "file").write_text("host")
    path.chmod(0o777)
    (path / "file").chmod(0o666)
    yield path
    subprocess.run(["umount", str(path)], check=True)
    path.rmdir()


@pytest.mark.needs_root
def test_a_sub_mount_of_the_view_cannot_be_written(submount: Path, world: Any) -> None:
    code, _ = outcome(world, ["sh", "-c", f"echo taken > {submount}/file || echo taken > {submount}/new"])

    assert code != 0
    assert (submount / "file").read_text() == "host"
    assert not (submount / "new").exists()


@pytest.mark.needs_root
def test_a_sub_mount_can_be_written_by_a_pod_that_was_given_it(submount: Path, world: Any) -> None:
    volumes = [{"source": f"host:{submount}", "target": "/given"}]

    code, text = outcome(world, ["sh", "-c", "echo taken > /given/file"], volumes=volumes)

    assert code == 0, text
    assert (submount / "file").read_text() == "taken\n"


def test_exactly_three_descriptors_are_open(world: Any) -> None:
    code, text = outcome(world, ["sh", "-c", "ls -l /proc/self/fd | grep -c -- '->'; readlink /proc/self/fd/0"])

    assert code == 0
    assert text == "4\n/dev/null\n"  # 0, 1, 2 and the directory that ls itself reads


@needs_python
def test_a_descriptor_left_open_on_purpose_is_seen_by_the_same_attack(world: Any) -> None:
    """The positive control: the way of counting does see a descriptor that was passed on."""
    count = "import os; os.set_inheritable(os.open('/dev/zero', os.O_RDONLY), True); os.execvp('sh', ['sh','-c',"
    count += "\"ls -l /proc/self/fd | grep -c -- '->'\"])"

    code, text = outcome(world, [PYTHON, "-c", count])

    assert (code, text) == (0, "5\n")


def test_only_its_own_processes_are_visible(world: Any) -> None:
    code, text = outcome(world, ["sh", "-c", "ls -d /proc/[0-9]* | wc -l; echo $$"])

    assert code == 0
    first, own = text.split()
    assert own == "1"
    assert int(first) <= 4


def test_rights_are_no_more_than_twelve_capabilities(world: Any) -> None:
    code, text = outcome(world, ["sh", "-c", "grep -E 'Cap|NoNewPrivs|Seccomp:' /proc/self/status"])

    sets = dict(line.split(":\t") for line in text.splitlines())
    assert code == 0
    assert sets["CapInh"] == sets["CapAmb"] == "0" * 16
    # CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT SETFCAP
    assert int(sets["CapBnd"], 16) & ~0x800425FB == 0
    assert int(sets["CapEff"], 16) & ~0x800425FB == 0
    assert sets["NoNewPrivs"] == "1"


ATTACKS = {
    "mount": "mount -t tmpfs none /tmp",
    "remount the root": "mount -o remount,rw /",
    "unmount a mask": "umount /proc/keys || umount /proc/interrupts",
    "make a device": "mknod /tmp/sda b 8 0 && head -c1 /tmp/sda",
    "write a sysctl": "echo x > /proc/sys/kernel/core_pattern",
    "write sysrq": "echo x > /proc/sysrq-trigger",
    "write to the view": "echo x > /usr/bin/x || echo x > /etc/passwd || echo x > /x",
    "change the clock": "date -s 2000-01-01",
    "make users of its own": "unshare -Ur true",
    "make mounts of its own": "unshare -Urm mount -t tmpfs none /tmp",
    "use the key store": "keyctl show 2>/dev/null | grep -q keyring",
    "raise its own limit": "ulimit -H -n 2000000000",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
def test_root_inside_cannot(world: Any, attack: str) -> None:
    code, text = outcome(world, ["sh", "-c", f"( {attack} ) && echo TAKEN; true"])

    assert code == 0
    assert "TAKEN" not in text


def test_users_and_mounts_of_its_own_can_be_made_by_a_pod_that_was_given_the_capability(world: Any) -> None:
    """The positive control of two attacks above: it is the filter that stops them."""
    command = ["sh", "-c", "unshare -Urm mount -t tmpfs none /tmp && echo TAKEN"]

    code, text = outcome(world, command, capabilities=["SYS_ADMIN", "SETUID", "SETGID", "SETFCAP"])

    assert (code, text) == (0, "TAKEN\n")


STATUS = "id -u; id -g; grep -E '^(CapPrm|CapBnd):' /proc/self/status; touch /tmp/mine && echo mine"


def test_a_user_other_than_root_is_that_user_and_has_no_power_at_all(world: Any) -> None:
    nobody = "7\n8\nCapPrm:\t0000000000000000\nCapBnd:\t0000000000000000\nmine\n"

    assert outcome(world, ["sh", "-c", STATUS], user="7:8") == (0, nobody)


def test_who_its_parent_is_does_not_decide_who_a_nested_container_is(world: Any) -> None:
    nested = [{"name": "root", "command": STATUS}, {"name": "other", "command": STATUS, "user": "9:9"}]
    pod = {"name": "users", "tasks": [{"name": "parent", "user": "7:8", "command": "sleep 60", "tasks": nested}]}
    answer = world.run(pod, "-d")
    assert answer.code == 0, (answer.out, answer.err)

    for name, ids in {"root": ["0", "0"], "other": ["9", "9"]}.items():
        assert world.meso("wait", f"users.parent.{name}").code == 0
        said = world.meso("logs", f"users.parent.{name}").out.splitlines()
        assert [*said[:2], said[-1]] == [*ids, "mine"]
    world.meso("kill", "users")
    world.meso("wait", "users")
    assert world.meso("rm", "users").code == 0


def test_ids_of_two_pods_are_disjoint(world: Any) -> None:
    if world.uid != 0:
        pytest.skip("this machine cannot give an ordinary user more than one id")
    maps = []
    for name in ("a", "b"):
        world.start("run", "--json", "-d", "--name", name, "--", "sleep", "60").communicate(timeout=60)
        maps.append(Path(f"/proc/{world.ps()[name]['pid']}/uid_map").read_text().split())
    world.meso("kill", "-s", "KILL", "a")
    world.meso("kill", "-s", "KILL", "b")

    (_, first, count), (_, second, _) = maps
    assert abs(int(first) - int(second)) >= int(count) == 65536
