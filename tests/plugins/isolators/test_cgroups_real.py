"""The effect kinds of control groups on this kernel, in groups of the test's own, which it removes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mesocosm.kernel.contracts import EffectContext, HostFacts
from mesocosm.kernel.core.errors import ConflictError, LaunchError
from mesocosm.kernel.linux.probe import probe
from mesocosm.plugins.isolators.cgroups import v1, v2

pytestmark = [pytest.mark.needs_root, pytest.mark.system]
CONTEXT = EffectContext(HostFacts(), "test")


@pytest.fixture(scope="module")
def facts():
    return probe("/run/mesocosm", "/var/lib/mesocosm").cgroups


def remove(top: str) -> None:
    for directory, _, _ in os.walk(top, topdown=False):
        os.rmdir(directory)


def group(facts, controller: str) -> str:
    if controller not in facts.v1:
        pytest.skip(f"this machine cannot: no {controller} controller of cgroup v1")
    return f"{facts.v1[controller]}/mesocosm-test-{os.getpid()}"


@pytest.fixture
def memory(facts):
    yield (path := group(facts, "memory"))
    remove(path)


@pytest.fixture
def cpu(facts):
    yield (path := group(facts, "cpu"))
    remove(path)


@pytest.fixture
def pids(facts):
    yield (path := group(facts, "pids"))
    remove(path)


@pytest.fixture
def unified(facts):
    if facts.v2 is None:
        pytest.skip("this machine cannot: no cgroup v2")
    yield (path := f"{facts.v2}/mesocosm-test-{os.getpid()}")
    remove(path)


def make1(controller: str, path: str, limits: dict[str, int] | None = None, *, attach: bool = True):
    args = {"controller": controller, "path": path, "limits": limits or {}, "attach": attach}
    return v1.Cgroup1().do(args, CONTEXT)


def read(*parts: str) -> str:
    return Path(*parts).read_text().strip()


@pytest.fixture(params=["cgroupspy", "plain files"])
def way(request, monkeypatch):
    if request.param == "plain files":
        monkeypatch.setattr(v1, "_cgroupspy", lambda: None)
    else:
        pytest.importorskip("cgroupspy")


@pytest.mark.usefixtures("way")
def test_memory_is_limited_swap_included(memory):
    facts = make1("memory", memory, {"memory": 64 * 2**20})
    os.close(facts["tasks"])
    assert read(memory, "memory.limit_in_bytes") == str(64 * 2**20)
    if os.path.exists(f"{memory}/memory.memsw.limit_in_bytes"):
        assert read(memory, "memory.memsw.limit_in_bytes") == str(64 * 2**20)


@pytest.mark.usefixtures("way")
def test_a_kernel_without_swap_limits_is_no_error_and_one_without_limits_is(tmp_path):
    """A directory with the files that a kernel without swap accounting has."""
    group = tmp_path / "group"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("")
    v1._set("memory", str(group), 4096)
    assert read(group, "memory.limit_in_bytes") == "4096"
    assert [path.name for path in group.iterdir()] == ["memory.limit_in_bytes"]
    with pytest.raises(LaunchError, match=r"memory\.limit_in_bytes"):
        v1._set("memory", str(tmp_path), 4096)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("millicpus", "quota", "period"), [(500, 50_000, 100_000), (2500, 250_000, 100_000), (2, 2000, 1_000_000)])
def test_cpus_become_a_quota(cpu, millicpus, quota, period):
    os.close(make1("cpu", cpu, {"cpu": millicpus})["tasks"])
    assert (read(cpu, "cpu.cfs_quota_us"), read(cpu, "cpu.cfs_period_us")) == (str(quota), str(period))
    assert read(cpu, "cpu.shares") == str(max(2, millicpus * 1024 // 1000))


@pytest.mark.usefixtures("way")
def test_a_process_that_writes_itself_in_is_limited(pids):
    facts = make1("pids", pids, {"pids": 1})
    program = "import os\ntry: os.fork()\nexcept OSError as error: print(error.errno)"
    enter = lambda: os.write(facts["tasks"], b"0")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, preexec_fn=enter)
    os.close(facts["tasks"])
    assert done.stdout.split() == ["11"]  # EAGAIN
    assert read(pids, "pids.max") == "1"


def test_more_cpu_than_the_parent_has_is_not_an_error_and_the_parents_limit_holds(cpu):
    make1("cpu", cpu, {"cpu": 500}, attach=False)
    os.close(make1("cpu", f"{cpu}/inner", {"cpu": 2000})["tasks"])
    assert read(cpu, "inner", "cpu.cfs_quota_us") == "-1"


def test_making_it_again_finds_what_a_crash_has_left_and_goes_on(pids):
    for _ in range(2):
        os.close(make1("pids", pids, {"pids": 7})["tasks"])
    assert read(pids, "pids.max") == "7"


def test_a_group_with_somebody_in_it_is_not_taken_over(pids):
    facts = make1("pids", pids)
    sleeper = subprocess.Popen(["sleep", "60"], preexec_fn=lambda: os.write(facts["tasks"], b"0"))
    os.close(facts["tasks"])
    try:
        with pytest.raises(ConflictError) as caught:
            make1("pids", pids)
        assert caught.value.fields["target"] == pids
        assert caught.value.fields["errno"] == "EEXIST"
    finally:
        sleeper.send_signal(signal.SIGKILL)
        sleeper.wait()


def test_a_limit_that_the_kernel_refuses_names_file_value_and_errno(cpu):
    with pytest.raises(LaunchError) as caught:
        make1("pids", cpu, {"pids": 5})
    fields = caught.value.fields
    assert fields["target"] == f"{cpu}/pids.max"
    assert fields["errno"] in ("ENOENT", "EACCES", "EPERM")
    assert fields["need"] == "5"


def test_find_sees_every_group_below(pids):
    make1("pids", pids, attach=False)
    os.close(make1("pids", f"{pids}/a")["tasks"])
    assert sorted(v1.Cgroup1().find(pids)) == [pids, f"{pids}/a"]
    assert list(v1.Cgroup1().find(f"{pids}/none")) == []


def test_a_group_of_v2_is_made_opened_and_found(unified):
    kind = v2.Cgroup2()
    args = {"path": unified, "limits": {}, "controllers": [], "attach": True}
    facts = kind.do(args, CONTEXT)
    try:
        assert os.path.samestat(os.fstat(facts["fd"]), os.stat(unified))
        assert not os.get_inheritable(facts["fd"])
    finally:
        os.close(facts["fd"])
    assert list(kind.find(unified)) == [unified]


def test_v2_without_the_controller_says_which_file_was_missing(unified):
    args = {"path": unified, "limits": {"memory": 2**20}, "controllers": [], "attach": True}
    with pytest.raises(LaunchError) as caught:
        v2.Cgroup2().do(args, CONTEXT)
    assert caught.value.fields["target"] == f"{unified}/memory.max"


def test_weight_follows_the_kernels_line():
    assert v2.weight(1) == 1
    assert v2.weight(1000) == 39  # shares 1024
    assert v2.weight(10**6) == 10_000
