"""The undo vocabulary on a real file system: idempotent, through no link, over no mount."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from mesocosm.kernel.core.plan import Undo
from mesocosm.kernel.runtime import undo
from mesocosm.kernel.runtime.machine import LinuxMachine
from mesocosm.kernel.runtime.undo import VERBS, Attempt
from mesocosm.kernel.runtime.undoing import Entry, undo_at_once, undo_one


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_there_is_done(verb: str, tmp_path: Path) -> None:
    for target in (tmp_path / "absent", tmp_path / "absent" / "below"):
        assert VERBS[verb](str(target)) is Attempt.GONE


async def test_a_tree_is_removed_in_pieces_and_links_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    tree = tmp_path / "tree"
    for number in range(20):
        (tree / str(number)).mkdir(parents=True)
        for other in range(50):
            (tree / str(number) / str(other)).write_text("x")
    (tree / "link").symlink_to(precious)
    (tree / "locked").mkdir(mode=0)
    assert undo.remove_tree(str(tree)) is Attempt.PROGRESS
    assert await undo_one(LinuxMachine(), [Undo("remove_tree", str(tree))]) is None
    assert not tree.exists()
    assert (precious / "file").exists()


def test_a_target_that_has_become_a_link_is_unlinked_itself(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "precious")
    assert undo.remove_tree(str(tmp_path / "target")) is Attempt.GONE
    assert (tmp_path / "precious").is_dir()


@pytest.mark.needs_root
async def test_a_mount_in_a_tree_is_not_entered_and_said(tmp_path: Path) -> None:
    inner, outer = tmp_path / "tree" / "mnt", tmp_path / "elsewhere"
    inner.mkdir(parents=True)
    outer.mkdir()
    (outer / "file").write_text("x")
    made = subprocess.run(["mount", "--bind", str(outer), str(inner)], check=False)
    if made.returncode:
        pytest.skip("this machine cannot mount")
    try:
        note = await undo_one(LinuxMachine(), [Undo("remove_tree", str(tmp_path / "tree"))])
        assert note is not None
        assert "EBUSY" in note
        assert (outer / "file").exists()
    finally:
        assert await undo_one(LinuxMachine(), [Undo("umount", str(inner))]) is None
    assert await undo_one(LinuxMachine(), [Undo("remove_tree", str(tmp_path / "tree"))]) is None
    assert (outer / "file").exists()


async def test_what_cannot_be_undone_says_what_and_why(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    note = await undo_one(LinuxMachine(), [Undo("rmdir", str(tmp_path / "full")), Undo("unlink", str(tmp_path / "full" / "x"))])
    assert note is not None
    assert note.startswith(f"rmdir {tmp_path}/full: ENOTEMPTY")
    assert not (tmp_path / "full" / "x").exists(), "the verbs after a failing one are still tried"


async def test_an_unknown_verb_is_parked_and_not_raised() -> None:
    note = await undo_one(LinuxMachine(), [Undo("format", "/")])
    assert note is not None
    assert "not a verb" in note


def test_a_cgroup_without_the_kill_file_is_killed_process_by_process(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    (tmp_path / "inner").mkdir()
    (tmp_path / "cgroup.procs").write_text("")
    (tmp_path / "inner" / "cgroup.procs").write_text(f"0\n1\n{child.pid}\n")
    assert undo.kill_cgroup(str(tmp_path)) is Attempt.BUSY
    assert child.wait(10) == -9


def test_every_verb_stays_in_the_closed_vocabulary() -> None:
    assert sorted(VERBS) == ["close", "kill_cgroup", "remove_tree", "rmdir", "rmdir_cgroup", "umount", "unlink"]


def test_errors_other_than_absence_are_raised(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError) as caught:
        undo.unlink(str(tmp_path / "directory"))
    assert caught.value.errno in (errno.EISDIR, errno.EPERM)
    assert os.path.isdir(tmp_path / "directory")


def test_a_tree_deeper_than_any_stack_is_removed(tmp_path: Path) -> None:
    """A container can nest directories without end: no recursion, and no descriptor for each level."""
    top = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    os.mkdir("deep", dir_fd=top)
    inner = os.open("deep", os.O_RDONLY | os.O_DIRECTORY, dir_fd=top)
    for _ in range(3000):
        os.mkdir("d", dir_fd=inner)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=inner)
        os.close(inner)
        inner = below
    os.close(inner)
    os.close(top)

    while undo.remove_tree(str(tmp_path / "deep")) is not undo.Attempt.GONE:
        pass

    assert list(tmp_path.iterdir()) == []


class Scripted(LinuxMachine):
    """Answers attempts from a script, and remembers what it was asked."""

    def __init__(self, **answers: Attempt | OSError) -> None:
        super().__init__()
        self.answers = answers
        self.asked: list[str] = []

    def undo(self, verb: str, target: str) -> Attempt:
        self.asked.append(f"{verb} {target}")
        answer = self.answers.get(verb, Attempt.GONE)
        if isinstance(answer, OSError):
            raise answer
        return answer


CGROUP = Entry(1, "cgroup2", (Undo("kill_cgroup", "c"), Undo("rmdir_cgroup", "c")), keep=False)
DIRECTORY = Entry(0, "directory", (Undo("remove_tree", "d"),), keep=False)


def test_at_once_means_in_reverse_and_without_asking_who_is_in_a_cgroup_that_can_be_removed() -> None:
    machine = Scripted()
    assert undo_at_once(machine, [DIRECTORY, CGROUP])
    assert machine.asked == ["rmdir_cgroup c", "remove_tree d"]


def test_a_cgroup_that_is_only_to_be_emptied_is_emptied() -> None:
    machine = Scripted()
    assert undo_at_once(machine, [Entry(0, "cgroup2", (Undo("kill_cgroup", "c"),), keep=False)])
    assert machine.asked == ["kill_cgroup c"]


@pytest.mark.parametrize("answer", [Attempt.BUSY, Attempt.PROGRESS, OSError(errno.EBUSY, "busy")])
def test_what_takes_patience_is_left_to_somebody_patient(answer: Attempt | OSError) -> None:
    machine = Scripted(rmdir_cgroup=answer)
    assert not undo_at_once(machine, [DIRECTORY, CGROUP])
    assert machine.asked == ["rmdir_cgroup c"], "and what comes after it in the undoing is not touched before it"


def test_a_directory_that_becomes_something_else_under_our_hands_is_still_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    real = os.rmdir

    def swapped(name: str, *, dir_fd: int | None = None) -> None:
        if name in ("to_link", "to_file"):  # listed as a directory, and then changed by whoever owns it
            real(name, dir_fd=dir_fd)
            if name == "to_link":
                os.symlink(precious, name, dir_fd=dir_fd)
            else:
                os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=dir_fd))
            raise NotADirectoryError(errno.ENOTDIR, "not a directory", name)
        real(name, dir_fd=dir_fd)

    for name in ("to_link", "to_file", "full/x"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    monkeypatch.setattr(os, "rmdir", swapped)
    assert undo.remove_tree(str(tmp_path / "tree")) is Attempt.GONE
    assert not (tmp_path / "tree").exists()
    assert (precious / "file").exists()
