"""The host's view is an allow-list, and a container's root is made of it."""

from __future__ import annotations

import msgspec
import pytest

from mesocosm.kernel.contracts import Fact, Undo
from mesocosm.kernel.core.errors import SpecError, UnsupportedError
from mesocosm.kernel.testing import HOSTS
from mesocosm.plugins.isolators import rootfs

ROOT = HOSTS["root, cgroup v2"]


def entries(host=ROOT):
    return {entry["target"]: entry for entry in rootfs.view_entries(host)}


def test_nothing_secret_is_in_the_view():
    shown = entries().keys()
    for path in (
        "/etc/shadow",
        "/etc/ssh",
        "/etc/sudoers",
        "/boot",
        "/work",
        "/etc/ssl/private",
        "/dev/kmsg",
        "/dev/mem",
        "/sys/firmware",
    ):
        assert path not in shown
    assert not any(
        entry.get("source") in ("/etc", "/", "/root", "/home", "/run", "/var", "/dev", "/sys") for entry in entries().values()
    )


def test_programs_are_overlays_and_links_stay_links():
    shown = entries()
    assert shown["/usr"] == {"target": "/usr", "kind": "overlay", "source": "/usr"}
    assert shown["/bin"] == {"target": "/bin", "kind": "link", "link": "usr/bin"}
    assert shown["/etc/ssl/certs"]["kind"] == "overlay"


def test_files_of_etc_are_copies_unless_a_link_stays_inside():
    shown = entries()
    assert shown["/etc/passwd"] == {"target": "/etc/passwd", "kind": "file", "source": "/etc/passwd", "optional": True}
    assert shown["/etc/localtime"]["kind"] == "link"
    assert shown["/etc/os-release"]["link"] == "../usr/lib/os-release"
    assert shown["/etc/resolv.conf"]["kind"] == "file", "its link leads into /run, which is the container's own"
    assert b"127.0.0.1" in shown["/etc/hosts"]["content"]


def test_parents_come_before_what_is_in_them():
    seen = {"/"}
    for entry in rootfs.view_entries(ROOT):
        assert entry["target"].rpartition("/")[0] or "/" in seen
        above = entry["target"].rpartition("/")[0] or "/"
        assert above in seen, entry
        assert entry["target"] not in seen, entry
        seen.add(entry["target"])


def test_devices_are_made_by_root_and_borrowed_by_everybody_else():
    assert entries()["/dev/null"]["kind"] == "device"
    assert entries()["/dev/null"]["device"] == [1, 3]
    assert entries()["/dev/null"]["source"] == "/dev/null"
    assert entries(HOSTS["user, nothing"])["/dev/null"] == entries()["/dev/null"]


def test_the_default_root_is_the_shared_view_with_scratch_of_its_own(p):
    plan = p.ask(rootfs, p.task())
    assert p.args(plan, "view") == {"name": "host"}
    scratch = p.args(plan, "scratch")["places"]
    assert scratch.keys() == {"/tmp", "/run", "/var", "/home", "/root", "/dev/shm"}
    assert scratch["/root"]["mode"] == 0o700
    assert scratch["/var"]["directories"]["tmp"] == 0o1777
    assert scratch["/dev/shm"]["flags"] == ["noexec"]
    assert p.args(plan, "pivot") == {"read_only": True}
    assert not plan.effects


def test_read_only_leaves_only_what_programs_cannot_do_without(p):
    plan = p.ask(rootfs, p.task(read_only=True))
    assert list(p.args(plan, "scratch")["places"]) == ["/tmp", "/run", "/var", "/dev/shm"]


def test_a_pod_that_waits_has_nothing_but_the_view(p):
    assert [step.kind for step in p.ask(rootfs, p.pod()).setup] == ["view", "pivot"]


def test_message_queues_are_shown_only_where_the_mount_would_show_the_right_ones(p):
    assert p.steps(p.ask(rootfs, p.task()), "mqueue")
    assert not p.steps(p.ask(rootfs, p.single()), "mqueue")
    assert not p.steps(p.ask(rootfs, p.task(namespaces={"ipc": "own"})), "mqueue")
    assert not p.steps(p.ask(rootfs, p.task(namespaces={"ipc": "host"})), "mqueue")


def volume(target, source="shared:data"):
    return {"source": source, "target": target}


def test_a_volume_where_the_view_has_nothing_gets_a_root_of_its_own(p):
    plan = p.ask(rootfs, p.task(volumes=[volume("/data"), volume("/srv/a/b", "shared:x"), volume("/tmp/c", "shared:y")]))
    args = p.args(plan, "view")
    assert args["extra"] == ["/", "/srv/a"], "what they stand in; the rest is made with the mounts"
    assert args["parts"]["/bin"] == "-> usr/bin"
    assert args["parts"]["/usr"] == "dir"
    assert "/srv" not in args["parts"], "it would be the view's, where nothing can be made"


@pytest.mark.parametrize("target", ["/tmp/x", "/run/x/y", "/var/lib/x", "/home", "/mnt", "/sandbox/x", "/dev/shm"])
def test_a_volume_where_there_is_a_place_for_it_costs_no_root(p, target):
    assert "extra" not in p.args(p.ask(rootfs, p.task(volumes=[volume(target)])), "view")


def test_a_volume_replaces_the_scratch_at_its_target(p):
    plan = p.ask(rootfs, p.task(volumes=[volume("/tmp", "tmpfs:1GiB")]))
    assert "/tmp" not in p.args(plan, "scratch")["places"]


def test_where_volumes_take_all_places_there_is_no_scratch(p):
    plan = p.ask(rootfs, p.task(rootfs="/srv/root", volumes=[volume("/dev/shm", "tmpfs:1MiB")]))
    assert not p.steps(plan, "scratch")


@pytest.mark.parametrize(
    "target", ["/usr/x", "/etc/passwd", "/proc/x", "/dev/x", "/bin/sh", "/lib64/x", "//etc//x", "/sys", "/opt/x"]
)
def test_a_volume_over_what_is_the_hosts_is_refused_with_the_field(p, target):
    with pytest.raises(SpecError) as caught:
        p.ask(rootfs, p.task(volumes=[volume("/data"), volume(target, "shared:x")]))
    assert caught.value.fields["path"] == "$.tasks[0].volumes[1].target"


def test_in_a_directory_of_its_own_a_volume_may_be_anywhere_but_in_the_kernels_places(p):
    assert p.ask(rootfs, p.task(rootfs="/srv/root", volumes=[volume("/etc/app", "shared:x"), volume("/usr/share/y", "shared:y")]))
    with pytest.raises(SpecError):
        p.ask(rootfs, p.task(rootfs="/srv/root", volumes=[volume("/proc/x")]))


def test_a_directory_becomes_an_overlay_that_goes_with_the_container(p):
    plan = p.ask(rootfs, p.task(rootfs="/srv/root"))
    assert plan.effects[0].undo == (Undo("remove_tree", "/run/mesocosm/containers/web.a/root"),)
    assert not plan.effects[0].keep
    assert p.args(plan, "overlay") == {"lower": [Fact(4, "fd")], "layer": Fact(5, "fd")}
    assert [plan.effects[index].kind for index in (4, 5)] == ["mount_tree"] * 2
    assert [step.args["source"] for step in p.steps(plan, "view_part")] == ["/dev", "/sys"]
    assert p.args(plan, "pivot") == {"read_only": False}


def test_a_read_only_directory_is_made_so_once_everything_is_in_its_place(p):
    plan = p.ask(rootfs, p.task(rootfs="/srv/root", read_only=True))
    assert p.args(plan, "pivot") == {"read_only": True}
    assert list(p.args(plan, "scratch")["places"]) == ["/tmp", "/run", "/dev/shm"]
    assert p.args(plan, "scratch")["create"] == "dir"


def test_without_mounts_of_its_own_a_container_has_no_root_of_its_own(p):
    bare = p.single(namespaces={"mount": "host"})
    assert p.ask(rootfs, bare).setup == ()
    with pytest.raises(SpecError):
        p.ask(rootfs, msgspec.structs.replace(bare, rootfs="/srv/root"))


def test_an_image_is_refused_with_what_to_do_instead(p):
    with pytest.raises(UnsupportedError) as caught:
        p.ask(rootfs, p.task(image="debian:12"))
    assert caught.value.fields["path"] == "$.tasks[0].image"
    assert "rootfs" in caught.value.fields["hint"]
