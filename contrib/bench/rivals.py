"""What mesocosm is measured against: the C floor and the other runtimes that this machine has.

A rival is something with a name and `once()`, which launches one container (or `at_once` of them), waits for it and
cleans up; setting up and building happen before. Each runs the same program, the host's `true`, from a read-only view
of the host's /usr, in its own mount, pid, net, ipc, uts and user namespaces where the rival can do that.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
USR_LINKS = ("bin", "sbin", "lib", "lib64")


@dataclass
class Rival:
    """`once()` is timed. `many(n, at_once)` launches n in all and answers its milliseconds; None where that would say nothing new.

    `every`: timed in each so manieth round only, for the slow ones. `pod`: how many containers `once` launches.
    """

    name: str
    once: Callable[[], object]
    many: Callable[[int, int], float] | None = None
    every: int = 1
    pod: int = 1


class Floor:
    """The C program beside this file, built on the spot and kept running: its own start is not what is measured."""

    def __init__(self, scratch: Path) -> None:
        program = scratch / "floor"
        subprocess.run(["gcc", "-O2", "-o", str(program), str(HERE / "floor.c")], check=True)
        self._process = subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the floor could not be measured: see above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def ask(self, words: str) -> float:
        """Milliseconds that the program measured for what `words` ask for."""
        assert self._process.stdin is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        return self._answer()["us"] / 1000

    def rivals(self) -> list[Rival]:
        """The floor of one container, and of ten at once."""
        return [
            Rival("C floor", lambda: self.ask("1"), lambda n, at_once: self.ask(f"x {n} {at_once}")),
            Rival("C floor, ten at once", lambda: self.ask("10"), pod=10),
        ]

    def close(self) -> None:
        """Ends it; it removes its own control groups."""
        self._process.communicate()


class Shell:
    """A shell that is kept running and told what to run: the cheapest parent a program can have that Python can talk to.

    `hide` is a directory that the programs do not see (in a mount namespace of the shell's own).
    """

    def __init__(self, hide: str | None = None) -> None:
        words = ["sh"]
        if hide is not None:
            words = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {shlex.quote(hide)} && exec sh"]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, *programs: Sequence[str]) -> int:
        """Runs programs to their ends, one after the other; the exit code of the last, or of the first that fails."""
        self.tell(*programs)
        return self.hear()

    def tell(self, *programs: Sequence[str]) -> None:
        """Begins that."""
        assert self._process.stdin is not None
        self._process.stdin.write(
            " && ".join(f"{shlex.join(argv)} </dev/null >/dev/null 2>&1" for argv in programs) + "; echo $?\n"
        )
        self._process.stdin.flush()

    def hear(self) -> int:
        """Waits for its end."""
        assert self._process.stdout is not None
        return int(self._process.stdout.readline() or -1)

    def close(self) -> None:
        """Ends the shell."""
        self._process.communicate()


def program(
    name: str, argv: Callable[[], list[str]], *, every: int = 1, throughput: bool = True, hide: str | None = None
) -> Rival | None:
    """A rival that is a program run anew each time; None, and a word why, if it does not work here."""
    if shutil.which(argv()[0]) is None:
        return None
    shell = Shell(hide)
    atexit.register(shell.close)

    def launch() -> None:
        if shell.run(argv()):
            raise SystemExit(f"{name} failed: {shlex.join(argv())}")

    def many(count: int, at_once: int) -> float:
        """The shells stand ready when the clock starts, and each does its share without being spoken to."""
        shells = [Shell(hide) for _ in range(at_once)]
        shares = [[argv() for _ in range(worker, count, at_once)] for worker in range(at_once)]
        for parent in shells:
            parent.run(["true"])
        began = time.perf_counter()
        for parent, share in zip(shells, shares, strict=True):
            parent.tell(*share)
        failed = [parent for parent in shells if parent.hear()]
        taken = time.perf_counter() - began
        for parent in shells:
            parent.close()
        if failed:
            raise SystemExit(f"{name} failed, {at_once} at once: {shlex.join(argv())}")
        return taken * 1000

    if shell.run(argv()):
        shown = subprocess.run(argv(), check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        print(f"# {name} does not work here: {shown.stderr.strip()[-200:]}", file=sys.stderr)
        return None
    return Rival(name, launch, many if throughput else None, every)


def oci(runtime: str, scratch: Path) -> Rival | None:
    """crun or runc with an OCI bundle as near to our default container as it can be said."""
    bundle = scratch / runtime
    root = bundle / "rootfs"
    for place in ("usr", "proc", "dev", "tmp", "run", "var", "home", "root", "sandbox"):
        (root / place).mkdir(parents=True)
    for link in USR_LINKS:
        if Path("/", link).is_symlink():
            (root / link).symlink_to(f"usr/{link}")
    if shutil.which(runtime) is None:
        return None
    for directory in (scratch, bundle, root):
        directory.chmod(0o755)  # its users must be able to reach it
    subprocess.run([runtime, "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    scratch_mounts = [
        {"destination": f"/{place}", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "size=64m"]}
        for place in ("tmp", "run", "home", "root", "var")
    ]
    usr = {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["bind", "ro"]}
    config["process"].update(args=["/usr/bin/true"], terminal=False)
    config["root"] = {"path": "rootfs", "readonly": True}
    kept = [mount for mount in config["mounts"] if mount["destination"] in ("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")]
    config["mounts"] = [*kept, usr, *scratch_mounts]
    config["linux"]["resources"] = {"memory": {"limit": 67108864}, "pids": {"limit": 64}, "cpu": {"shares": 512}}
    config["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount", "user")]
    config["linux"]["uidMappings"] = config["linux"]["gidMappings"] = [{"containerID": 0, "hostID": 1000000, "size": 65536}]
    (bundle / "config.json").write_text(json.dumps(config))
    store = [runtime, "--root", str(scratch / f"{runtime}-state")]
    numbers = itertools.count()

    def argv() -> list[str]:
        return [*store, "run", "--bundle", str(bundle), f"bench-{os.getpid()}-{next(numbers)}"]

    # crun refuses a hybrid host whose v2 tree has a controller left; it works when it does not see that tree.
    unified = "/sys/fs/cgroup/unified"
    hide = unified if runtime == "crun" and os.path.exists(unified) and os.geteuid() == 0 else None
    return program(f"{runtime} run", argv, hide=hide)


def bubblewrap() -> Rival | None:
    """bwrap: no control groups, and its mounts belong to the user namespace."""
    argv = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--hostname", "bench"]
    argv += ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev", "--bind", "/tmp", "/sandbox"]
    for link in USR_LINKS:
        if Path("/", link).is_symlink():
            argv += ["--symlink", f"usr/{link}", f"/{link}"]
    for place in ("/tmp", "/run", "/home", "/root", "/var"):
        argv += ["--tmpfs", place]
    return program("bwrap (no cgroups)", lambda: [*argv, "/usr/bin/true"])


def podman(scratch: Path) -> Rival | None:
    """podman, from a root file system and not from an image, so that nothing is pulled."""
    root = scratch / "podman"
    root.mkdir()
    argv = ["podman", "run", "--rm", "--network=none", "--volume", "/usr:/usr:ro", "--rootfs", str(root), "/usr/bin/true"]
    for link in USR_LINKS:
        if Path("/", link).is_symlink():
            (root / link).symlink_to(f"usr/{link}")
    return program("podman run", lambda: argv, every=10, throughput=False)


def installed(scratch: Path) -> Iterator[Rival]:
    """The other runtimes that are here and work, the quickest first."""
    for found in (bubblewrap(), oci("crun", scratch), oci("runc", scratch), podman(scratch)):
        if found is not None:
            yield found
