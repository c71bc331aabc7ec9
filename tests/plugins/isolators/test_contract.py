"""Every isolator of ours keeps the contract that we ask of everybody's."""

from __future__ import annotations

from mesocosm.kernel.testing import IsolatorContract
from mesocosm.plugins.isolators import cgroups, hardening, namespaces, program, rlimits, rootfs, sandbox, volumes


class TestNamespaces(IsolatorContract):
    isolator = namespaces


class TestSandbox(IsolatorContract):
    isolator = sandbox


class TestRootfs(IsolatorContract):
    isolator = rootfs


class TestCgroups(IsolatorContract):
    isolator = cgroups


class TestVolumes(IsolatorContract):
    isolator = volumes


class TestHardening(IsolatorContract):
    isolator = hardening


class TestRlimits(IsolatorContract):
    isolator = rlimits


class TestProgram(IsolatorContract):
    isolator = program
