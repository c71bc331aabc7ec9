"""Which limit an errno stands for, in numbers."""

from __future__ import annotations

import resource

import pytest

from mesocosm.kernel.linux import limits


@pytest.mark.parametrize(("errno", "kind"), [("ENOENT", "check"), ("EAGAIN", "bind"), (None, "")])
def test_an_errno_that_is_about_no_limit_stands_for_none(errno: str | None, kind: str) -> None:
    assert limits.reached(errno, kind) is None


@pytest.mark.parametrize("kind", ["log", "tmpfs", ""])
def test_whoever_has_no_descriptor_left_has_used_all_of_them(kind: str) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    assert limits.reached("EMFILE", kind) == (most, most, "open files", "ulimit -n")


def test_of_the_limits_on_processes_the_nearest_is_named() -> None:
    named = {found.name.partition(" ")[0]: found for found in limits._processes()}
    reached = limits.reached("EAGAIN", "clone")

    assert {"kernel.pid_max", "kernel.threads-max"} <= named.keys()
    nearest = max(found.used / found.most for found in named.values())
    if reached is None:  # none of them is near: naming one would lead astray
        assert nearest < 0.95
    else:
        assert reached.used / reached.most >= max(0.9, nearest - 0.05)


def test_keys_are_counted_against_the_users_quota() -> None:
    found = limits.reached("EDQUOT", "keyring")
    if found is None:
        pytest.skip("this machine cannot: this user has no keys, or no /proc/key-users")

    assert found.used <= found.most + 1000  # the kernel itself may go above it
    assert found.name.startswith("kernel.keys.max")
