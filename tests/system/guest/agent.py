"""The guest's PID 1: finishes setting the machine up, then runs the commands that arrive on its serial line.

Runs inside the guest with the standard library only; nothing of mesocosm is imported here, since this is what
mesocosm is tested under. A request is one line of JSON {"id", "argv", "user", "env", "cwd", "timeout"}, its answer one
line {"id", "status", "out", "err", "seconds"}, "status" as `subprocess` has it, or null when time ran out.
Requests run beside each other, each in a process of its own, so that a pod can be watched while it runs.

Output goes to memory files and not through pipes: a command may leave a daemon behind that holds its stdout open,
and its answer must not wait for the daemon to end. Orphans are reaped as soon as they die, as a real init would.
The end of the serial line is the end of the guest: whoever booted it is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
import tty
from typing import Any

USER = 1000  # the ordinary user; commands of theirs run in the delegated cgroup's leaf
CGROUPS = "/sys/fs/cgroup"
DELEGATED = f"{CGROUPS}/user-{USER}"
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "pids")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def mount(kind: str, target: str, options: str) -> None:
    """Mounts by the host's mount(8): the guest has no ctypes worth loading before /tmp is there."""
    os.makedirs(target, exist_ok=True)
    subprocess.run(["/bin/mount", "-n", "-t", kind, "-o", options, kind, target], check=True)


def write(path: str, text: str) -> None:
    """One write(2), as kernel interfaces want it."""
    with open(path, "w") as file:
        file.write(text)


def command_line(word: str) -> str:
    """The value of meso.WORD= on the kernel command line, or ""."""
    with open("/proc/cmdline") as file:
        found = [part.partition("=")[2] for part in file.read().split() if part.startswith(f"meso.{word}=")]
    return found[0] if found else ""


def make_scratch(keep: list[str]) -> None:
    """Empty file systems for /tmp and its like, with what the tests need from the host's kept in place.

    They must not be part of the root's overlay: an overlay's upper directory cannot itself be on an overlay.
    """
    for index, path in enumerate(keep):
        os.makedirs(f"/run/keep/{index}", exist_ok=True)
        subprocess.run(["/bin/mount", "-n", "--bind", path, f"/run/keep/{index}"], check=True)
    for scratch in ("/tmp", "/var/tmp", "/home"):
        mount("tmpfs", scratch, "mode=0755" if scratch == "/home" else "mode=1777")
    for index, path in enumerate(keep):
        if not os.path.exists(path):
            os.makedirs(path)
            subprocess.run(["/bin/mount", "-n", "--bind", f"/run/keep/{index}", path], check=True)
    for path in keep:
        while (path := os.path.dirname(path)) != "/":
            os.chmod(path, os.stat(path).st_mode | 0o011)  # the host's /root is closed; an interpreter may be below it
    mount("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666")
    mount("tmpfs", "/dev/shm", "mode=1777")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        with contextlib.suppress(FileExistsError):
            os.symlink(target, f"/dev/{name}")


def make_cgroups() -> None:
    """Pure cgroup v2, and in it a subtree that belongs to the ordinary user, whose shell stands in a leaf of it."""
    mount("cgroup2", CGROUPS, "nsdelegate,memory_recursiveprot")
    os.makedirs(f"{DELEGATED}/shell")
    for base in (CGROUPS, DELEGATED):
        with open(f"{base}/cgroup.controllers") as file:
            present = file.read().split()
        for controller in CONTROLLERS:  # one at a time: a write with one that is missing fails whole
            if controller in present:
                write(f"{base}/cgroup.subtree_control", f"+{controller}")
    for base in (DELEGATED, f"{DELEGATED}/shell"):
        for name in ("", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
            os.chown(os.path.join(base, name), USER, USER)


def make_user() -> None:
    """An ordinary user with a home and a runtime directory, as a login would have made them."""
    with open("/etc/passwd") as file:
        known = any(line.split(":")[2:3] == [str(USER)] for line in file)
    if not known:
        with open("/etc/passwd", "a") as file:
            file.write(f"meso:x:{USER}:{USER}::/home/meso:/bin/sh\n")
        with open("/etc/group", "a") as file:
            file.write(f"meso:x:{USER}:\n")
    for path in ("/home/meso", f"/run/user/{USER}"):
        os.makedirs(path, mode=0o700, exist_ok=True)
        os.chown(path, USER, USER)


def environment(user: int | None) -> dict[str, str]:
    """What a login of that user would have; nothing of the host's environment."""
    common = {"PATH": PATH, "LANG": "C.UTF-8", "TERM": "dumb"}
    if user is None:
        return {**common, "HOME": "/root", "USER": "root"}
    return {**common, "HOME": "/home/meso", "USER": "meso", "XDG_RUNTIME_DIR": f"/run/user/{user}"}


def perform(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one command to its end; the answer without its id."""
    user, start = request.get("user"), time.monotonic()
    out, err = os.memfd_create("out"), os.memfd_create("err")
    status: int | None = None
    problem = b""
    try:
        if user is not None:
            write(f"{DELEGATED}/shell/cgroup.procs", str(os.getpid()))
        process = subprocess.Popen(
            request["argv"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            env={**environment(user), **request.get("env", {})},
            cwd=request.get("cwd") or "/",
        )
        try:
            status = process.wait(request.get("timeout"))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            problem = f"guest: killed after {request['timeout']} s\n".encode()
    except (OSError, ValueError) as error:
        status, problem = 127, f"guest: {type(error).__name__}: {error}\n".encode()
    texts = []
    for output in (out, err):
        os.lseek(output, 0, os.SEEK_SET)
        with open(output, "rb") as file:
            texts.append(file.read())
    seconds = round(time.monotonic() - start, 3)
    out_text, err_text = (text.decode("utf-8", "surrogateescape") for text in (texts[0], texts[1] + problem))
    return {"status": status, "out": out_text, "err": err_text, "seconds": seconds}


def serve(line: bytes, serial: int) -> None:
    """One request in a process of its own; PID 1 goes on at once."""
    if os.fork():
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(line)
    answer = (json.dumps({"id": request["id"], **perform(request)}) + "\n").encode()
    with open("/run/guest-agent.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # answers are longer than one write to a serial line
        while answer:
            answer = answer[os.write(serial, answer) :]
    os._exit(0)


def reap() -> None:
    """Every orphan that has died, at once: a process that waits for its own death to be seen must not wait for us."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """Sets the machine up, says so, and serves until the line ends."""
    make_scratch([path for path in command_line("keep").split(",") if path])
    make_cgroups()
    make_user()
    os.umask(0o022)
    subprocess.run(["/bin/sh", "-c", "ip link set lo up; hostname guest"], check=True, env={"PATH": PATH})
    os.chdir("/")

    waker, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    serial = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    tty.setraw(serial)
    with open("/proc/uptime") as file:
        os.write(serial, json.dumps({"ready": float(file.read().split()[0])}).encode() + b"\n")
    pending = b""
    while True:
        ready, _, _ = select.select([serial, waker], [], [])
        if waker in ready:
            os.read(waker, 4096)
            reap()
        if serial in ready:
            chunk = os.read(serial, 65536)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                serve(line, serial)


if __name__ == "__main__":
    try:
        main()
    except Exception as problem:  # the kernel would only say that init was killed
        print(f"[agent] {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
    write("/proc/sysrq-trigger", "o")
    time.sleep(10)
