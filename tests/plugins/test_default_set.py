"""The default set as a whole: what one isolator makes is there when the next one needs it."""

from __future__ import annotations

import tomllib
from importlib import import_module, resources

import pytest

from mesocosm.kernel.contracts import Plan
from mesocosm.kernel.core.plan import merge
from mesocosm.kernel.testing import GRANTS, HOSTS

DEFAULT = tomllib.loads(resources.files("mesocosm.kernel.sets").joinpath("default.toml").read_text())["set"]["default"]


@pytest.fixture
def plan():
    """Any container's plan, by the isolators in the order of the packaged set."""

    def make(container, host, parent=None):
        modules = [(name, import_module(f"mesocosm.plugins.isolators.{name}")) for name in DEFAULT["isolators"]]
        plans = [(name, module.plan(container, parent, host, GRANTS) or Plan()) for name, module in modules]
        return merge(container.id, container.namespaces, plans)

    return make


def test_every_isolator_of_ours_is_in_it_and_required():
    expected = {"namespaces", "sandbox", "rootfs", "cgroups", "volumes", "hardening", "seccomp", "rlimits", "program"}
    assert set(DEFAULT["isolators"]) == expected
    assert expected <= set(DEFAULT["required"])


def test_directories_are_made_after_those_they_stand_in(p, plan):
    volume = {"source": "shared:x", "target": "/data"}
    root = plan(p.pod(), HOSTS["root, hybrid"])
    made = {effect.args["path"] for effect in root.effects if effect.kind == "directory"}
    made.add("/run/mesocosm/containers")
    for effect in plan(p.task(rootfs="/srv/root", volumes=[volume]), HOSTS["root, hybrid"], root).effects:
        if effect.kind == "directory":
            assert effect.args["path"].rpartition("/")[0] in made, effect.args["path"]
            made.add(effect.args["path"])


def test_nothing_is_mounted_over_what_was_mounted_before(p, plan):
    volumes = [{"source": "tmpfs:1MiB", "target": "/tmp"}, {"source": "shared:x", "target": "/var/lib/x"}]
    for fields in ({}, {"rootfs": "/srv/root"}, {"rootfs": "/srv/root", "read_only": True}):
        root = plan(p.pod(), HOSTS["root, cgroup v2"])
        setup = plan(p.task(volumes=volumes, **fields), HOSTS["root, cgroup v2"], root).setup
        targets: list[str] = []
        for step in setup:
            if step.stage == "mount":
                targets += step.args["places"] if step.kind == "scratch" else [step.args["target"]]
        for index, target in enumerate(targets):
            hidden = [before for before in targets[:index] if before == target or before.startswith(target + "/")]
            assert not hidden, f"{target} hides {hidden}"
