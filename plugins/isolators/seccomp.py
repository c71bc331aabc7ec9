"""Which system calls a container may not make: those that only serve to reach past its walls.

What lives here: the list, by capability, and the little program (BPF) that the kernel runs before every system
call. What does not: capabilities themselves (hardening).

A list of what is refused, not of what is allowed: a new harmless system call works on the day the C library starts
using it. What is refused is what Docker's default profile refuses (moby profiles/seccomp/default.json), which
comes down to: mounts and namespaces of one's own, keys, modules, clocks, raw hardware, sockets to the hypervisor and to
the kernel's ciphers, and kernel interfaces with a long record of holes. A capability brings back the calls that it is
needed for. Refused calls fail with EPERM; clone3, whose flags are in memory where a filter cannot see them, with ENOSYS,
so that clone is used instead. Calls by the 32-bit and x32 tables, which the list does not cover, fail with ENOSYS.

The kernel knows which calls pass whatever their arguments and does not run the program for them at all (Linux 5.11).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from mesocosm.kernel import Grant, Plan, Step, hookimpl
from mesocosm.kernel.contracts import Check, ContainerPlan, ContainerSpec, HostFacts

# asm/unistd_64.h. What no capability brings back:
_ALWAYS = {
    "_sysctl": 156, "add_key": 248, "create_module": 174, "get_kernel_syms": 177, "io_uring_enter": 426,
    "io_uring_register": 427, "io_uring_setup": 425, "keyctl": 250, "nfsservctl": 180, "query_module": 178, "request_key": 249,
    "sysfs": 139, "uselib": 134, "userfaultfd": 323, "ustat": 136,
}  # fmt: skip
_NEEDS: Mapping[str, Mapping[str, int]] = {
    "BPF": {"bpf": 321},
    "DAC_READ_SEARCH": {"open_by_handle_at": 304},
    "PERFMON": {"perf_event_open": 298},
    "SYS_ADMIN": {
        "fsconfig": 431, "fsmount": 432, "fsopen": 430, "fspick": 433, "lookup_dcookie": 212, "mount": 165, "mount_setattr": 442,
        "move_mount": 429, "open_tree": 428, "pivot_root": 155, "quotactl": 179, "quotactl_fd": 443, "setns": 308, "swapoff": 168,
        "swapon": 167, "umount2": 166, "unshare": 272,
    },
    "SYS_BOOT": {"kexec_file_load": 320, "kexec_load": 246, "reboot": 169},
    "SYS_MODULE": {"delete_module": 176, "finit_module": 313, "init_module": 175},
    "SYS_NICE": {"get_mempolicy": 239, "mbind": 237, "move_pages": 279, "set_mempolicy": 238},
    "SYS_PACCT": {"acct": 163},
    "SYS_PTRACE": {"kcmp": 312},
    "SYS_RAWIO": {"ioperm": 173, "iopl": 172},
    "SYS_TIME": {"clock_adjtime": 305, "clock_settime": 227, "settimeofday": 164},
    "SYS_TTY_CONFIG": {"vhangup": 153},
    "SYSLOG": {"syslog": 103},
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _PERSONALITY = 56, 435, 41, 135
_VSOCK, _ALG = 40, 38  # linux/socket.h: to the hypervisor, which no network namespace holds; the kernel's own ciphers
_PERSONALITIES = (0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux, 32 bits of it, the names of either, "which is it?"
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW… flag that fits into clone's flags
_X32 = 0x40000000
_AUDIT_ARCH_X86_64 = 0xC000003E

# linux/bpf_common.h, linux/seccomp.h
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


@hookimpl
def plan(container: ContainerSpec, parent: ContainerPlan | None, host: HostFacts, grants: Mapping[str, Grant]) -> Plan | None:
    """The filter, after everything that a container may do to itself; nothing where there is no table for the machine."""
    if host.arch != "x86_64" or not host.has("seccomp"):
        return None
    return Plan(setup=[Step("seccomp", {"filter": program(container.capabilities)})])


@hookimpl
def checks(host: HostFacts) -> Sequence[Check]:
    """Whether filters work here."""
    works = host.arch == "x86_64" and host.has("seccomp")
    hint = "" if works else "containers run without a filter: capabilities, users and mounts still hold them"
    return [Check("system call filter", ok=works, have=host.arch, need="x86_64, CONFIG_SECCOMP_FILTER", hint=hint)]


def refused(capabilities: Iterable[str]) -> frozenset[int]:
    """The numbers of the calls that a container with these capabilities may not make at all."""
    have = set(capabilities)
    lacking = [calls for capability, calls in _NEEDS.items() if capability not in have]
    return frozenset(number for calls in (_ALWAYS, *lacking) for number in calls.values())


def _search(numbers: Sequence[int], answer: int) -> list[tuple[int, int, int, int]]:
    """Code that answers `answer` for these (sorted) numbers and lets all others pass, by halving: when a filter is
    installed, the kernel tries every system call on it once, so its length is part of every launch."""
    if len(numbers) <= 2:
        checks = [part for number in numbers for part in ((_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer))]
        return [*checks, (_RETURN, 0, 0, _ALLOW)]
    half = len(numbers) // 2
    below, above = _search(numbers[:half], answer), _search(numbers[half:], answer)
    return [(_JUMP_GREATER_EQUAL, len(below), 0, numbers[half]), *below, *above]


def _by_argument(call: int, values: Sequence[int], matching: int, others: int) -> list[tuple[int, int, int, int]]:
    """Code for one call: it is answered `matching` if its first argument is one of `values`, and `others` if not."""
    count = len(values)
    return [
        (_JUMP_EQUAL, 0, count + 3, call),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        *((_JUMP_EQUAL, count - index, 0, value) for index, value in enumerate(values)),
        (_RETURN, 0, 0, others),
        (_RETURN, 0, 0, matching),
    ]


@cache
def program(capabilities: tuple[str, ...]) -> bytes:
    """The filter as BPF: struct sock_filter after struct sock_filter, 8 bytes each. seccomp(2)."""
    may_enclose = "SYS_ADMIN" in capabilities
    not_permitted, no_such_call = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    code = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, no_such_call),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER_EQUAL, 0, 1, _X32),
        (_RETURN, 0, 0, no_such_call),
    ]
    if not may_enclose:
        code += [
            (_JUMP_EQUAL, 0, 1, _CLONE3),
            (_RETURN, 0, 0, no_such_call),
            (_JUMP_EQUAL, 0, 4, _CLONE),
            (_LOAD, 0, 0, _FIRST_ARGUMENT),
            (_JUMP_ANY_BIT, 0, 1, _NEW_NAMESPACES),
            (_RETURN, 0, 0, not_permitted),
            (_RETURN, 0, 0, _ALLOW),
        ]
    code += _by_argument(_SOCKET, (_VSOCK, _ALG), not_permitted, _ALLOW)
    code += _by_argument(_PERSONALITY, _PERSONALITIES, _ALLOW, not_permitted)
    code += _search(sorted(refused(capabilities)), not_permitted)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
