"""The launch under attack: descriptors, working directories, and the launcher's own program.

A container begins as a copy of the launcher's process. Nothing of that may be reached by what it becomes: no descriptor, no
directory behind one, and not the file that the launcher executes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

NUMBERS = range(3, 65)
# The directory of the descriptors does not count, which is open only while it is read.
COUNT = """
found = [int(fd) for fd in os.listdir("/proc/self/fd")]
print(sorted(fd for fd in found if os.path.exists(f"/proc/self/fd/{fd}")))
"""
# Opens what it is executed from, becomes another program, and changes that file by the descriptor.
OVERWRITE = """
import os
fd = os.open("/proc/self/exe", os.O_RDONLY)
os.set_inheritable(fd, True)
os.execv("/usr/bin/python3", ["python3", "-I", "-c", "import errno, os, sys\\n"
    "try:\\n    os.fchmod(int(sys.argv[1]), 0o777)\\n    print('changed')\\n"
    "except OSError as error:\\n    print(errno.errorcode[error.errno])", str(fd)])
"""


def test_a_container_and_its_child_have_three_descriptors(attacks: Any) -> None:
    parent = attacks.start("sleep 60")

    alone, nested = attacks.python(COUNT), attacks.python(COUNT, parent=parent)
    sharing = attacks.python(COUNT, parent=parent, namespaces={"mount": "parent", "pid": "parent"})

    attacks.kill(parent)
    assert (alone.out, nested.out, sharing.out) == ("[0, 1, 2]\n",) * 3


def test_no_descriptor_of_the_launchers_can_be_a_working_directory(attacks: Any) -> None:
    errors = [attacks.run("pwd -P; ls", cwd=f"/proc/self/fd/{number}").error for number in NUMBERS]

    assert {(error and error["step"]["kind"]) for error in errors} == {"working_directory"}
    assert {error["errno"] for error in errors} <= {"ELOOP", "ENOENT"}


def test_no_working_directory_climbs_out_of_a_descriptor(attacks: Any) -> None:
    outcome = attacks.run("pwd -P; ls", cwd="/proc/self/fd/3/../..")

    assert (outcome.error["code"], outcome.error["path"]) == ("bad_input", "$.cwd")


def test_a_directory_that_is_there_can_be_a_working_directory(attacks: Any) -> None:
    """The positive control: the attack is refused for where it leads, not for how it is asked."""
    outcome = attacks.run("pwd -P", cwd="/proc/self/task")

    assert (outcome.code, outcome.out.split("/")[-1]) == (0, "task\n")


def test_a_program_by_a_descriptors_name_is_inside_or_refused(attacks: Any, rounds: Any) -> None:
    """Whatever the number stands for while the container is made, the program sees its own root and three descriptors."""
    paths = ("/../../../bin/sh", "/bin/sh", "", "/usr/bin/sh", "/0/bin/sh")[: rounds(1, 5)]
    for path in (f"/proc/self/fd/{number}{below}" for number in NUMBERS for below in paths):
        outcome = attacks.run([path, "-c", "cat /etc/shadow; ls /proc/self/fd"])
        assert outcome.error is not None or "root:" not in outcome.out, (path, outcome)
        assert outcome.error is not None or outcome.code != 0 or outcome.out.split() == ["0", "1", "2", "3"], (path, outcome)


def test_a_script_interpreted_by_whoever_reads_it_is_refused(attacks: Any) -> None:
    root = attacks.root("circle")
    (root / "entry").write_text("#!/proc/self/exe\nimport os; print(os.getpid())\n")
    (root / "entry").chmod(0o755)

    outcome = attacks.run(["/entry"], rootfs=str(root))

    assert (outcome.error["code"], outcome.error["errno"], outcome.error["target"]) == ("launch_failed", "ENOENT", "/proc/self/exe")


@pytest.fixture
def own_interpreter(world: Any) -> Iterator[Any]:
    """A world beside this one whose interpreter belongs to its user, as where somebody has installed Python for themselves."""
    directory = Path(world.directory) / "owning"
    directory.mkdir(exist_ok=True)
    copy = directory / "python"
    shutil.copy(os.path.realpath(world.python), copy)
    for path in (directory, copy):
        os.chown(path, world.uid, world.gid)
    if subprocess.run(world.as_user(str(copy), "-I", "-S", "-c", "import socket"), capture_output=True, check=False).returncode:
        pytest.skip("this machine cannot run a copy of its interpreter")
    places = {"MESOCOSM_RUN_DIR": str(directory / "run"), "MESOCOSM_STATE_DIR": str(directory / "state")}
    other = dataclasses.replace(
        world, directory=directory, python=str(copy), environment={**world.environment, **places}, children=[]
    )
    yield other
    assert other.meso("agent", "--stop").code in (0, 7)  # 7: there was none


def test_the_launchers_program_cannot_be_changed_by_a_container_that_executes_it(own_interpreter: Any) -> None:
    """In both worlds the container's root is the owner of the file: CVE-2019-5736."""
    before = os.stat(own_interpreter.python)
    namespaces = {"user": "host"} if own_interpreter.uid == 0 else {}
    task = {"name": "attack", "command": ["/proc/self/exe", "-I", "-S", "-c", OVERWRITE], "namespaces": namespaces}

    answer = own_interpreter.run({"name": "attack", "executor": "command", "tasks": [task]})

    after = os.stat(own_interpreter.python)
    text = "".join(line["data"] for line in answer.lines if line["type"] == "output")
    assert text.splitlines()[-1:] == ["EROFS"], answer
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_it_can_be_changed_by_whoever_executes_it_from_the_hosts_mounts(own_interpreter: Any) -> None:
    """The positive control: the same program, the same user, the same file."""
    command = own_interpreter.as_user(own_interpreter.python, "-I", "-S", "-c", OVERWRITE)

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines()[-1] == "changed"
    assert os.stat(own_interpreter.python).st_mode & 0o777 == 0o777
