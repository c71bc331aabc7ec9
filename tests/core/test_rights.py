"""The attenuation rule: a rule for every field, and that within is a preorder."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesocosm.kernel.core import rights
from mesocosm.kernel.core.containers import CAPABILITIES, ContainerSpec, VolumeMount

SHARES = st.sampled_from(["own", "parent", "host"])
VOLUMES = st.builds(
    VolumeMount, st.sampled_from(["shared", "host", "tmpfs"]), st.sampled_from(["x", "/srv"]), st.just("/mnt"), st.booleans()
)
LIMIT = st.none() | st.integers(1, 4)
SPECS = st.builds(
    ContainerSpec,
    id=st.sampled_from(["a", "a.b", "a.b.c"]),
    role=st.sampled_from(["default", "other"]),
    user=st.sampled_from(["0", "root", "1000", "0:0"]),
    rootfs=st.sampled_from(["host", "/srv/x"]),
    read_only=st.booleans(),
    namespaces=st.fixed_dictionaries({"net": SHARES, "user": SHARES}),
    cpus=LIMIT,
    memory=LIMIT,
    pids=LIMIT,
    rlimits=st.dictionaries(st.sampled_from(["nofile", "core"]), st.integers(1, 3).map(lambda n: (n, n)), max_size=2),
    capabilities=st.lists(st.sampled_from(CAPABILITIES[:3]), unique=True).map(tuple),
    volumes=st.lists(VOLUMES, max_size=2).map(tuple),
    api=st.booleans(),
)


def within(child: ContainerSpec, parent: ContainerSpec) -> bool:
    return not rights.exceeds(child, parent)


def test_every_field_of_a_spec_has_a_rule() -> None:
    assert set(rights.RULES) == {field.name for field in msgspec.structs.fields(ContainerSpec)}


@given(SPECS)
def test_everything_is_within_itself(spec: ContainerSpec) -> None:
    assert within(spec, spec)


@given(SPECS, SPECS, SPECS)
def test_within_within_is_within(a: ContainerSpec, b: ContainerSpec, c: ContainerSpec) -> None:
    # Random specs rarely nest: give each the limits of the next with only a few fields of its own.
    b = msgspec.structs.replace(c, id=b.id, cpus=b.cpus, capabilities=b.capabilities, user=b.user, namespaces=b.namespaces)
    a = msgspec.structs.replace(b, id=a.id, memory=a.memory, volumes=a.volumes, user=a.user, rlimits=a.rlimits, api=a.api)
    if within(a, b) and within(b, c):
        assert within(a, c)


@given(SPECS, SPECS)
def test_what_is_left_open_follows_the_parent(child: ContainerSpec, parent: ContainerSpec) -> None:
    filled = rights.effective(child, parent)
    for error in rights.exceeds(filled, parent):
        field = error.fields["path"].rpartition(".")[2]
        if field in ("cpus", "memory", "pids"):
            assert getattr(child, field) is not None


@pytest.mark.parametrize(
    ("field", "parent", "child"),
    [
        ("capabilities", ("CHOWN",), ("CHOWN", "SYS_ADMIN")),
        ("memory", 64, 65),
        ("user", "1000", "0"),
        ("namespaces", {"net": "own"}, {"net": "host"}),
        ("rootfs", "/srv", "host"),
        ("volumes", (), (VolumeMount("host", "/etc", "/mnt", read_only=True),)),
        ("volumes", (VolumeMount("host", "/d", "/d", read_only=True),), (VolumeMount("host", "/d", "/d"),)),
        ("volumes", (VolumeMount("host", "/d", "/d"),), (VolumeMount("host", "/d/sub", "/d"),)),
        ("rlimits", {"nofile": (10, 10)}, {"nofile": (10, 11)}),
        ("api", False, True),
        ("read_only", True, False),
        ("role", "a", "b"),
    ],
)
def test_more_than_the_parent_has_is_denied(field: str, parent: object, child: object) -> None:
    above = ContainerSpec(id="web", **{field: parent})  # type: ignore[arg-type]
    below = ContainerSpec(id="web.x", **{"rootfs": above.rootfs, field: child})  # type: ignore[arg-type]
    (error,) = rights.exceeds(rights.effective(below, above), above)
    assert error.code == "denied"
    assert error.fields["id"] == "web.x"
    assert error.fields["have"] != error.fields["need"]
