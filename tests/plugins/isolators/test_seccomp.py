"""The filter, run here by a BPF machine of a dozen lines: what passes, what does not, for which capabilities."""

from __future__ import annotations

import errno
import struct

import msgspec
import pytest

from mesocosm.kernel.core.containers import CAPABILITIES, DEFAULT_CAPABILITIES, ContainerSpec
from mesocosm.kernel.testing import GRANTS, HOSTS
from mesocosm.plugins.isolators import seccomp

X86_64, I386, ALLOW, ERRNO = 0xC000003E, 0x40000003, 0x7FFF0000, 0x00050000


def verdict(program: bytes, number: int, first: int = 0, arch: int = X86_64) -> int:
    """What the kernel would answer for this system call."""
    data = struct.pack("=IIQ6Q", number, arch, 0, first, 0, 0, 0, 0, 0)
    code, at, accumulator = list(struct.iter_unpack("=HBBI", program)), 0, 0
    while True:
        kind, if_true, if_false, k = code[at]
        at += 1
        if kind == 0x06:
            return int(k)
        if kind == 0x20:
            accumulator = struct.unpack_from("=I", data, k)[0]
        else:
            holds = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[kind]
            at += if_true if holds else if_false


DEFAULT = seccomp.program(DEFAULT_CAPABILITIES)


@pytest.mark.parametrize("number", [0, 1, 59, 231, 322, 3, 436, 157, 14, 202, 57, 61], ids=str)
def test_what_a_launch_and_every_program_needs_passes(number):
    assert verdict(DEFAULT, number) == ALLOW


@pytest.mark.parametrize("number", sorted(seccomp.refused(DEFAULT_CAPABILITIES)), ids=str)
def test_what_is_refused_is_refused_with_eperm(number):
    assert verdict(DEFAULT, number) == ERRNO | errno.EPERM


@pytest.mark.parametrize("flag", [0x10000000, 0x20000, 0x40000000, 0x20000000, 0x4000000, 0x8000000, 0x2000000], ids=hex)
def test_clone_may_not_make_namespaces_but_may_make_processes(flag):
    assert verdict(DEFAULT, 56, flag | 17) == ERRNO | errno.EPERM
    assert verdict(DEFAULT, 56, 0x1200011) == ALLOW


@pytest.mark.parametrize("family", [38, 40], ids=["AF_ALG", "AF_VSOCK"])
def test_sockets_past_the_network_namespace_are_refused_and_others_are_not(family):
    assert verdict(DEFAULT, 41, family) == ERRNO | errno.EPERM
    assert [verdict(DEFAULT, 41, other) for other in (1, 2, 10, 16, 17)] == [ALLOW] * 5


def test_personality_may_be_asked_for_and_set_to_what_changes_no_protection():
    assert [verdict(DEFAULT, 135, value) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)] == [ALLOW] * 5
    assert [verdict(DEFAULT, 135, value) for value in (0x40000, 0x400000, 1)] == [ERRNO | errno.EPERM] * 3


def test_clone3_is_not_there_because_its_flags_cannot_be_seen():
    assert verdict(DEFAULT, 435) == ERRNO | errno.ENOSYS


def test_other_tables_of_numbers_are_not_there():
    assert verdict(DEFAULT, 4, arch=I386) == ERRNO | errno.ENOSYS
    assert verdict(DEFAULT, 0x40000000 + 1) == ERRNO | errno.ENOSYS


def test_a_capability_brings_back_its_calls_and_no_others():
    admin = seccomp.program((*DEFAULT_CAPABILITIES, "SYS_ADMIN"))

    assert [verdict(admin, number) for number in (165, 272, 435)] == [ALLOW] * 3
    assert verdict(admin, 56, 0x10000011) == ALLOW
    assert verdict(admin, 250) == ERRNO | errno.EPERM
    assert verdict(admin, 321) == ERRNO | errno.EPERM


def test_with_all_capabilities_only_what_nobody_needs_is_refused():
    assert seccomp.refused(CAPABILITIES) == frozenset(seccomp._ALWAYS.values())


def test_the_filter_fits_into_the_kernels_limit():
    assert len(seccomp.program(())) // 8 <= 4096


def test_a_machine_without_a_table_gets_no_filter_and_doctor_says_so():
    host = HOSTS["root, cgroup v2"]
    other = msgspec.structs.replace(host, arch="riscv64")

    assert seccomp.plan(ContainerSpec(id="x", command=("x",)), None, other, GRANTS) is None
    assert not seccomp.checks(other)[0].ok
