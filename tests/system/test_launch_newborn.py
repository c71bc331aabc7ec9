"""The launch under attack: a hostile parent sees each child of its container being born, and whoever shares its process ids.

A parent's processes see what is nested in their container: process ids nest. Until it has become its program, a newborn is a
copy of the launcher. It may be ended by its parent, which may end it anyway; it may not be looked into, or made to work.
"""

from __future__ import annotations

import contextlib
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mesocosm.kernel.client import RemoteError

pytestmark = pytest.mark.system

# Everything that one process could do to another. `into(pid)` records what got through under the words of the attempt.
REACH = """
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
PTRACE_ATTACH, PTRACE_DETACH, PTRACE_SEIZE = 16, 17, 0x4206
def trace(request, pid):
    call("ptrace", request, pid, 0, 0)
    if request == PTRACE_ATTACH:
        os.waitpid(pid, 0x40000000)
        call("ptrace", PTRACE_DETACH, pid, 0, 0)
def vm(name, pid):
    buffer = ctypes.create_string_buffer(8)
    here, there = Vector(ctypes.addressof(buffer), 8), Vector(0x400000, 8)
    call(name, pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
def take(pid):
    pidfd = call("syscall", 434, pid, 0)
    try:
        for fd in range(64):
            try:
                return os.close(call("syscall", 438, pidfd, fd, 0))
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
        raise OSError(errno.EBADF, "")
    finally:
        os.close(pidfd)
def some(data):
    if not data:  # of one that is ending, whose memory has gone: whoever asks may open this, and sees nothing
        raise OSError(errno.ESRCH, "")
WAYS = {
    "attach": lambda pid: trace(PTRACE_ATTACH, pid), "seize": lambda pid: trace(PTRACE_SEIZE, pid),
    "read its memory": lambda pid: vm("process_vm_readv", pid), "write its memory": lambda pid: vm("process_vm_writev", pid),
    "open its memory": lambda pid: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)),
    "take a descriptor": take,
    "open a descriptor": lambda pid: os.close(os.open(f"/proc/{pid}/fd/0", os.O_RDONLY)),
    "see its root": lambda pid: os.stat(f"/proc/{pid}/root/"), "see its cwd": lambda pid: os.stat(f"/proc/{pid}/cwd/"),
    "see its program": lambda pid: os.stat(f"/proc/{pid}/exe"), "see its variables": lambda pid: get(f"/proc/{pid}/environ"),
    "see its maps": lambda pid: some(get(f"/proc/{pid}/maps")), "see its system call": lambda pid: get(f"/proc/{pid}/syscall"),
    "enter its mounts": lambda pid: os.stat(f"/proc/{pid}/ns/mnt"),
    "change its ids": lambda pid: put(f"/proc/{pid}/uid_map", "0 0 1"),
}
if not os.path.exists("/proc/self/syscall"):  # not every kernel has it
    del WAYS["see its system call"]
def into(pid):
    for what, way in WAYS.items():
        attempt(what, lambda: way(pid))
"""
# The first process that has become /bin/sleep.
FIND = """
found = []
while not found:
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            found += [pid] if get(f"/proc/{pid}/comm") == b"sleep\\n" else []
        except OSError:
            pass
"""
# Stops whoever is still a copy of the launcher (execve changes the name), and so has all the time in the world. Whom it may not
# stop yet is root of the host still, and tried as well: what gets through counts if that is so afterwards, too.
STALK = (
    REACH
    + """
def is_newborn(pid):
    try:
        words = get(f"/proc/{pid}/stat").split()
        return words[1].startswith(b"(meso-") and words[2] not in b"ZX"  # of the dead there is nothing to see
    except OSError:
        return False
def stop(pid):
    try:
        os.kill(pid, signal.SIGSTOP)
    except PermissionError:
        return False
    except ProcessLookupError:  # it has been its own program for its whole life since it was looked at
        return True
    while get(f"/proc/{pid}/stat").split()[2] not in (b"T", b"Z"):
        pass
    return True
print("ready", flush=True)
stages, taken, told = {}, [], set()
while not os.path.exists("/sandbox/enough"):
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if not is_newborn(pid) or pid in told:
                continue
            stopped = stop(pid)
            if not is_newborn(pid):
                os.kill(pid, signal.SIGCONT)
                continue
            try:
                for what, way in WAYS.items():
                    try:
                        way(pid)
                    except OSError:
                        continue
                    late = not stopped and stop(pid)  # it has become its own users' since: no way into root of the host
                    if is_newborn(pid) and not late:
                        taken.append(what)
                    if late:
                        break
                stage = "its own users" if stopped else "the host's users"
                stages[stage] = stages.get(stage, 0) + 1
                if stopped:
                    told.add(pid)
            finally:
                os.kill(pid, signal.SIGCONT)  # nobody else does, and it is waited for
        except OSError:
            pass
print(json.dumps({"stages": stages, "taken": taken}))
"""
)
# Ends, or stops, whatever is not yet its own program.
SIGNAL = """
print("ready", flush=True)
hit = set()
while not os.path.exists("/sandbox/enough"):
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if pid not in hit and get(f"/proc/{pid}/comm").startswith(b"meso-"):
                os.kill(pid, int(sys.argv[1]))
                hit.add(pid)
                print("hit", flush=True)
        except OSError:
            pass
print(len(hit))
"""
DENIED = {"EPERM", "EACCES"}
DEADLINE = 60.0


def enough(attacks: Any, parent: str) -> Any:
    """Tells a stalking parent to report; what it says."""
    (attacks.world.run_dir / f"containers/{parent}/sandbox/enough").touch()
    return attacks.end(parent)


def test_a_parent_cannot_look_into_its_children_while_they_are_born(attacks: Any, rounds: Any, figure: Any) -> None:
    parent = attacks.start_python(STALK)
    tasks = [{"name": f"c{number}", "command": ["/bin/true"]} for number in range(20)]
    many = rounds(3, 100)

    for round_ in range(many):
        attacks.client.launch_nested_group(parent, [{**task, "name": f"r{round_}{task['name']}"} for task in tasks])
        for task in tasks:
            attacks.client.wait(f"{parent}.r{round_}{task['name']}", DEADLINE)

    outcome = enough(attacks, parent)
    seen = json.loads(outcome.out.splitlines()[-1])
    figure(born=many * len(tasks), caught=seen["stages"], looked_into=len(seen["taken"]))
    assert seen["stages"].get("its own users", 0) > 0, "no newborn was caught: this attack did not take place"
    assert seen["taken"] == []


def test_a_parent_can_look_into_its_children_once_they_are_their_own_programs(attacks: Any) -> None:
    """The positive control: the same ways lead into a child that runs, which has no more rights than its parent."""
    parent = attacks.start_python(REACH + "print('ready')\n" + FIND + "into(found[0])\n")

    attacks.client.launch_nested_group(parent, [{"name": "child", "command": ["/bin/sleep", "60"]}])

    attacks.wait_for(parent, "}\n")
    tried = attacks.end(parent).tried
    assert {"attach", "open its memory", "see its root"} <= {what for what, said in tried.items() if said == "done"}


def test_a_parent_that_kills_its_newborn_children_loses_them_and_nothing_else(
    attacks: Any, pulse: Any, rounds: Any, figure: Any
) -> None:
    parent = attacks.start_python(SIGNAL, "9")
    launched, refused = 0, 0

    with pulse() as seen:
        for number in range(rounds(40, 1000)):
            outcome = attacks.run(["/bin/true"], parent=parent, name=f"c{number}")
            launched += outcome.error is None
            refused += outcome.error is not None
            assert outcome.error is None or outcome.error["code"] == "launch_failed", outcome

    hits = int(enough(attacks, parent).out.split()[-1])
    figure(launches=launched + refused, hits=hits, refused=refused, ping_p99_ms=seen.p99_ms, ping_max_ms=seen.max_ms)
    assert hits > 0
    assert refused > 0


def test_a_newborn_that_its_parent_has_stopped_is_given_up_when_the_parent_is_killed(attacks: Any, pulse: Any) -> None:
    """Nobody waits for it but its own launch, which is over as soon as the group is."""
    parent = attacks.start_python(SIGNAL, str(int(signal.SIGSTOP)))
    children = [{"name": f"c{number}", "command": ["/bin/sleep", "60"]} for number in range(20)]

    with pulse() as seen, ThreadPoolExecutor() as pool, attacks.connection() as another:
        launch = pool.submit(another.launch_nested_group, parent, children)
        attacks.wait_for(parent, "hit")
        attacks.client.kill(parent, "KILL")
        error = launch.exception(DEADLINE)

    assert error is None or isinstance(error, RemoteError)
    attacks.end(parent)
    assert seen.asked > 0
    assert [line["id"] for line in attacks.client.containers() if line["id"].startswith(parent)] == []


def test_a_task_that_shares_the_pods_process_ids_cannot_make_its_init_work_for_it(attacks: Any) -> None:
    """The pod's own process stands in the pod's control groups, not in the task's: tracing it would be a way out of a limit."""
    task = {"name": "heir", "command": attacks.program(REACH + "into(1)\n"), "namespaces": {"pid": "parent"}}

    tried = _tried(attacks, [task], "heir")

    assert set(tried.values()) <= DENIED, tried


def test_it_can_reach_a_sibling_that_shares_them_too(attacks: Any) -> None:
    """The positive control: the same ways, the same process ids, a process that is no more than the attacker."""
    shared = {"namespaces": {"pid": "parent"}}
    attacker = {"name": "attacker", "command": attacks.program(REACH + FIND + "into(found[0])\n"), **shared}
    victim = {"name": "victim", "command": ["/bin/sleep", "3600"], "essential": False, **shared}

    tried = _tried(attacks, [victim, attacker], "attacker")

    assert {"attach", "open its memory", "see its root"} <= {what for what, said in tried.items() if said == "done"}


def _tried(attacks: Any, tasks: list[dict[str, Any]], name: str) -> dict[str, str]:
    """What a task of a pod has tried; afterwards the pod is gone."""
    attacks.client.launch_group({"name": "shared", "tasks": tasks})
    attacks.client.wait(f"shared.{name}", DEADLINE)
    found = json.loads(attacks.text(f"shared.{name}").splitlines()[-1])
    with contextlib.suppress(RemoteError):  # it may have ended with its last task
        attacks.client.kill("shared", "KILL")
    attacks.end("shared")
    return {what: said for what, (said, _) in found.items()}


def test_a_sibling_is_not_there(attacks: Any) -> None:
    """Tasks have process ids of their own by default: there is no number to begin with."""
    look = "attempt('others', lambda: 1 / (len([p for p in os.listdir('/proc') if p.isdigit()]) == 1) or 1)\n"
    tasks = [{"name": "a", "command": attacks.program(look)}, {"name": "b", "command": ["/bin/sleep", "3600"], "essential": False}]

    assert _tried(attacks, tasks, "a") == {"others": "done"}


LAUNCHERS = (
    REACH
    + """
mine = [int(p) for p in os.listdir("/proc") if p.isdigit()]
for pid in mine:
    name = get(f"/proc/{pid}/comm").decode().strip()
    if name in ("meso-launcher", "meso-keeper", "meso-cradle") or pid == int(sys.argv[1]):
        for what, way in WAYS.items():
            attempt(f"{name}: {what}", lambda: way(pid))
        attempt(f"{name}: signal", lambda: os.kill(pid, 0))
"""
)


@pytest.mark.needs_root  # an ordinary user's agent cannot show a container the host's processes
def test_agent_and_launcher_cannot_be_reached_even_from_the_hosts_process_ids(attacks: Any) -> None:
    """With `pid = "host"` a container sees them; its users are others, and they may not be traced at all."""
    outcome = attacks.python(LAUNCHERS, str(attacks.world.agent_pid()), namespaces={"pid": "host"})

    tried = outcome.tried
    reached = {what for what, said in tried.items() if said == "done"}
    assert {what.split(":")[0] for what in tried} >= {"meso-launcher", "meso-keeper", "meso-cradle"}
    assert reached == set()


def test_kill_everybody_means_everybody_inside(attacks: Any) -> None:
    """kill(-1) ends what shares the process ids, which is the container."""
    outcome = attacks.python(
        "child = os.fork()\nif not child:\n    time.sleep(3600)\nattempt('everybody', lambda: os.kill(-1, 9))\n"
        "print(os.waitpid(child, 0)[1])\n"
    )

    assert outcome.out.splitlines()[:1] == ["9"], outcome
    assert outcome.tried == {"everybody": "done"}
