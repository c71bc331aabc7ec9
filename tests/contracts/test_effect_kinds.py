"""Every kind of effects finds what it has made: the kernel's own, and those of the default set's plug-ins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesocosm.kernel.contracts import Effect, EffectContext, EffectKind, Undo
from mesocosm.kernel.linux.probe import probe
from mesocosm.kernel.runtime.kinds import DirectoryKind, LogKind
from mesocosm.kernel.testing import EffectKindContract
from mesocosm.plugins.isolators.cgroups import Cgroup1, Cgroup2


class TestDirectories(EffectKindContract):
    @pytest.fixture
    def kind(self) -> EffectKind:
        return DirectoryKind()

    @pytest.fixture
    def effect(self, tmp_path: Path) -> Effect:
        path = str(tmp_path / "made")
        return Effect("directory", {"path": path, "mode": 0o711}, (Undo("remove_tree", path),))

    def test_a_link_or_a_file_is_none(self, kind: EffectKind, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "link").symlink_to(tmp_path)
        assert list(kind.find(str(tmp_path))) == [str(tmp_path)]
        assert list(kind.find(str(tmp_path / "link"))) == []


class TestLogs(EffectKindContract):
    @pytest.fixture
    def kind(self) -> EffectKind:
        return LogKind()

    @pytest.fixture
    def effect(self, tmp_path: Path) -> Effect:
        path = str(tmp_path / "stdout")
        return Effect("log", {"path": path}, (Undo("unlink", path),))


def base(top: str | None, version: str) -> str:
    if top is None:
        pytest.skip(f"this machine cannot: no cgroup {version}")
    return f"{top.rstrip('/')}/mesocosm-contract-{os.getpid()}"


@pytest.mark.needs_root
class TestCgroup1(EffectKindContract):
    @pytest.fixture
    def kind(self) -> EffectKind:
        return Cgroup1()

    @pytest.fixture
    def effect(self) -> Iterator[Effect]:
        path = base(probe("/run/mesocosm", "/var/lib/mesocosm").cgroups.v1.get("pids"), "v1 with the controller pids")
        os.mkdir(path)
        inner = f"{path}/one"
        args = {"path": inner, "controller": "pids", "limits": {"pids": 7}, "attach": True}
        yield Effect("cgroup1", args, (Undo("kill_cgroup", inner), Undo("rmdir_cgroup", inner)))
        os.rmdir(path)


@pytest.mark.needs_root
class TestCgroup2(EffectKindContract):
    @pytest.fixture
    def kind(self) -> EffectKind:
        return Cgroup2()

    @pytest.fixture
    def effect(self) -> Iterator[Effect]:
        path = base(probe("/run/mesocosm", "/var/lib/mesocosm").cgroups.v2, "v2")
        os.mkdir(path)
        inner = f"{path}/one"
        args = {"path": inner, "limits": {}, "controllers": [], "attach": True}
        yield Effect("cgroup2", args, (Undo("kill_cgroup", inner), Undo("rmdir_cgroup", inner)))
        os.rmdir(path)


@pytest.mark.parametrize("kind", [Cgroup1(), Cgroup2()], ids=lambda kind: kind.name)
def test_directories_that_are_no_groups_are_not_found(kind: EffectKind, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()

    assert list(kind.find(str(tmp_path))) == []


class Forgetful:
    """A kind that does not find what it makes."""

    name = "forgetful"

    def do(self, args: dict[str, str], _context: EffectContext) -> dict[str, str]:
        Path(args["path"]).touch()
        return {}

    def find(self, _prefix: str) -> Iterator[str]:
        return iter(())


def test_a_kind_that_does_not_find_what_it_makes_fails_the_contract(tmp_path: Path) -> None:
    """The control."""
    path = str(tmp_path / "thing")
    effect = Effect("forgetful", {"path": path}, (Undo("unlink", path),))

    with pytest.raises(AssertionError):
        EffectKindContract().test_what_is_made_is_found_until_it_is_undone(Forgetful(), effect)

    assert not os.path.exists(path)
