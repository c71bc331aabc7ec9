"""A guest with a kernel of its own: Debian's User Mode Linux, booted in seconds, to test what this kernel cannot show.

What lives here: fetching the kernel, packing the initrd, booting, running commands, stopping. What runs inside
is beside this file: `init` (in the initrd) and `agent.py` (the guest's PID 1). Needs no root and installs nothing.

Theory: UML is an ordinary program. Its root is this machine's file system, read-only (hostfs), under a tmpfs
overlay, so the same interpreter, virtual environment and repository are there under the same paths. Its first
serial line is one end of a socket pair that this process holds: commands and answers are lines of JSON on it, and
when this process dies, however it dies, the line ends and the guest turns itself off.

The guest has one CPU and cgroup v2 with cpu, io, memory and pids; it lacks cpuset, pressure files and hugetlb.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
MODULES = ("overlay", "loop", "fuse", "tun", "veth", "bridge")
BOOT_DEADLINE = 60.0  # seconds; it takes about two on an idle machine


class NoGuestError(Exception):
    """This machine cannot have a guest; the text says what is missing. (A guest that should boot and does not: GuestError.)"""


class GuestError(Exception):
    """The guest did not boot, died, or did not answer in time; carries the end of its console."""


@dataclass(frozen=True)
class Finished:
    """A command that ended in the guest. `status` as in subprocess (negative: a signal), None if its time ran out."""

    argv: tuple[str, ...]
    status: int | None
    out: str
    err: str
    seconds: float

    def check(self) -> str:
        """Its output, if it succeeded; AssertionError with everything it said otherwise."""
        assert self.status == 0, f"{' '.join(self.argv)}: status {self.status}\n{self.out}{self.err}"
        return self.out


def cache_directory() -> Path:
    """Where the fetched kernel stays: build/ of the repository, or the user's cache when that cannot be written."""
    for base in (REPOSITORY / "build", Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mesocosm"):
        with contextlib.suppress(OSError):
            (base / "guest").mkdir(parents=True, exist_ok=True)
            if os.access(base / "guest", os.W_OK):
                return base / "guest"
    raise NoGuestError("no directory to keep the guest's kernel in: neither build/ nor the user's cache can be written")


def fetch(package: str, wanted: str, cache: Path) -> Path:
    """The tree of a Debian package, unpacked and not installed; `wanted` is a file that must be in it."""
    tree = cache / package
    if (tree / wanted).exists():
        return tree
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise NoGuestError(f"{package} is not installed and there is no apt-get to fetch it with")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        got = subprocess.run(["apt-get", "download", "-qq", package], cwd=scratch, capture_output=True, text=True, check=False)
        found = list(Path(scratch).glob("*.deb"))
        if got.returncode or not found:
            said = got.stderr.strip()[-300:]
            raise NoGuestError(f"apt-get download {package} failed (old package lists? apt-get update): {said}")
        subprocess.run(["dpkg-deb", "-x", str(found[0]), f"{scratch}/tree"], check=True)
        if not (Path(scratch) / "tree" / wanted).exists():
            raise NoGuestError(f"the package {package} has no {wanted}")
        with contextlib.suppress(OSError):  # another worker was quicker: its tree is as good
            os.rename(f"{scratch}/tree", tree)
    return tree


def kernel_and_modules(cache: Path) -> tuple[Path, Path]:
    """The UML kernel and its directory of modules: the installed ones, or fetched ones."""
    root = Path("/") if Path("/usr/bin/linux.uml").exists() else fetch("user-mode-linux", "usr/bin/linux.uml", cache)
    return root / "usr/bin/linux.uml", next((root / "usr/lib/uml/modules").iterdir())


def is_static(program: Path) -> bool:
    """Whether an ELF program needs no loader: it names none (PT_INTERP)."""
    return b"ld-linux" not in program.read_bytes()[:8192]


def busybox(cache: Path) -> Path:
    """A static busybox: the initrd has nothing to load a shared library with."""
    for name in ("/bin/busybox", "/usr/bin/busybox"):
        if Path(name).exists() and is_static(Path(name)):
            return Path(name)
    return fetch("busybox-static", "bin/busybox", cache) / "bin/busybox"


def preload(cache: Path) -> dict[str, str]:
    """The environment that lets this kernel run on a processor with AMX; see xstate.c."""
    if " amx_tile" not in Path("/proc/cpuinfo").read_text():
        return {}
    source, library = HERE / "xstate.c", cache / "xstate.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise NoGuestError("a processor with AMX needs a C compiler for tests/system/guest/xstate.c")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # renamed when whole: another worker may be doing the same
            subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", f"{scratch}/xstate.so", str(source), "-ldl"], check=True)
            os.rename(f"{scratch}/xstate.so", library)
    return {"LD_PRELOAD": str(library)}


def module_files(modules: Path, names: Sequence[str]) -> list[Path]:
    """The files of `names` and of what they need, in the order in which they must be loaded."""
    needs: dict[str, list[str]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    order: list[str] = []
    for name in names:
        for path in (path for path in needs if path.endswith(f"/{name}.ko")):
            order += [need for need in [*reversed(needs[path]), path] if need not in order]
    return [modules / path for path in order]


def pack(entries: Mapping[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive ("newc", see the kernel's initramfs-buffer-format) of name → (mode, content)."""
    packed = bytearray()
    for inode, (name, (mode, content)) in enumerate([*entries.items(), ("TRAILER!!!", (0, b""))], start=1):
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
        packed += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        packed += bytes(-len(packed) % 4) + content
        packed += bytes(-len(packed) % 4)
    return bytes(packed)


def make_initrd(cache: Path, modules: Path) -> bytes:
    """The initrd: busybox, the modules in loading order, `init` and `agent.py`."""
    files = module_files(modules, MODULES)
    program, text, directory = stat.S_IFREG | 0o755, stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
    entries = dict.fromkeys(("bin", "modules"), (directory, b""))
    entries["bin/busybox"] = (program, busybox(cache).read_bytes())
    entries["init"] = (program, (HERE / "init").read_bytes())
    entries["agent.py"] = (text, (HERE / "agent.py").read_bytes())
    entries["modules/order"] = (text, "".join(f"{file.name}\n" for file in files).encode())
    entries |= {f"modules/{file.name}": (text, file.read_bytes()) for file in files}
    return pack(entries)


def needed_paths() -> list[str]:
    """What must be in the guest even where the guest has its own /tmp: the repository and the interpreter's trees."""
    paths = sorted({str(REPOSITORY), os.path.realpath(sys.prefix), sys.prefix, sys.base_prefix}, key=len)
    if any(mark in path for path in paths for mark in ", "):
        raise NoGuestError("a path with a blank or comma cannot be said on the guest's command line")
    return paths


def read_only_host(lower: Path) -> list[str]:
    """The words before the kernel's: as root, a mount and PID namespace of its own in which `lower` is / read-only.

    hostfs is mounted read-only in the guest too; this is the belt to that pair of braces, since the guest's root
    would otherwise write here as root. Everything in the PID namespace dies with its first process.
    """
    if os.geteuid() != 0:
        return ["setpriv", "--pdeathsig", "KILL"]
    mounts = sorted({mount_point(path) for path in needed_paths()} | {"/"}, key=len)
    script = " && ".join(
        f"mount --bind '{point}' '{lower}{point}' && mount -o remount,bind,ro '{lower}{point}'" for point in mounts
    )
    unshare = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"]
    return [*unshare, "sh", "-c", f'{script} && exec "$@"', "sh"]


def mount_point(path: str) -> str:
    """Where the file system that holds `path` is mounted."""
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


class Guest:
    """A running guest. Threads may run commands in it beside each other."""

    def __init__(self, memory: int = 768, *, disk: Path | None = None) -> None:
        """Boots; returns when commands can be run. `memory` in MiB. NoGuestError or GuestError otherwise.

        `disk`: an image that is /dev/ubda inside. UML 6.1 tells its kernel that this disk has a volatile cache, and does nothing
        when it is to be flushed; so the guest is told that it has none, which is true: what was written is in the image.
        """
        started = time.monotonic()
        cache = cache_directory()
        kernel, modules = kernel_and_modules(cache)
        self._directory = Path(tempfile.mkdtemp(prefix="meso-guest-"))
        try:
            (self._directory / "lower").mkdir()
            (self._directory / "initrd").write_bytes(make_initrd(cache, modules))
            self._boot(cache, kernel, memory, disk)
        except BaseException:
            self.stop()
            raise
        if disk is not None:
            self.run(["sh", "-c", "echo write through > /sys/block/ubda/queue/write_cache"]).check()
        self.boot_seconds = time.monotonic() - started
        self.python = sys.executable

    def _boot(self, cache: Path, kernel: Path, memory: int, disk: Path | None) -> None:
        self._ids = itertools.count(1)
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any] | None]] = {0: queue.SimpleQueue()}
        self._writing = threading.Lock()
        lower = self._directory / "lower"
        prefix = read_only_host(lower)
        self._line, theirs = socket.socketpair()
        words = [
            str(kernel), f"mem={memory}M", f"initrd={self._directory}/initrd", f"hostfs={lower if os.geteuid() == 0 else '/'}",
            "con=null", "con0=null,fd:1", "ssl=null", f"ssl0=fd:{theirs.fileno()}", f"uml_dir={self._directory}", "umid=guest",
            "quiet", "loglevel=4", "panic=-1",
            f"meso.python={os.path.realpath(sys.executable)}", f"meso.keep={','.join(needed_paths())}",
        ]  # fmt: skip
        words += [f"ubda={disk}"] if disk is not None else []
        with theirs, open(self._directory / "console", "wb") as console:
            self._process = subprocess.Popen(
                [*prefix, *words],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, pass_fds=[theirs.fileno()], start_new_session=True,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": str(self._directory), "HOME": "/", **preload(cache)},
            )  # fmt: skip
        threading.Thread(target=self._listen, name="guest's serial line", daemon=True).start()
        try:
            if self._answers[0].get(timeout=BOOT_DEADLINE) is None:
                raise GuestError(f"the guest ended while booting\n{self.console()}")
        except queue.Empty:
            raise GuestError(f"the guest did not boot in {BOOT_DEADLINE} s\n{self.console()}") from None

    def _listen(self) -> None:
        """Hands every answer to whoever waits for it; at the end of the line, None to all."""
        with self._line.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                answer = json.loads(line)
                self._answers[answer.get("id", 0)].put(answer)
        for waiting in list(self._answers.values()):
            waiting.put(None)

    def console(self) -> str:
        """The end of what the guest's kernel and init have printed."""
        with contextlib.suppress(OSError):
            return (self._directory / "console").read_text(errors="replace")[-4000:]
        return ""

    def said(self) -> str:
        """All that was printed on the console so far."""
        return (self._directory / "console").read_text(errors="replace")

    def cut_power(self) -> None:
        """Ends the guest at once, with all that is in its memory; what it said is still there."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def run(
        self,
        argv: Sequence[str],
        *,
        user: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        timeout: float = 120,
    ) -> Finished:
        """Runs one command to its end, as root or as `user` (1000, who has a delegated cgroup); `timeout` in seconds."""
        number = next(self._ids)
        waiting = self._answers.setdefault(number, queue.SimpleQueue())
        request = {"id": number, "argv": list(argv), "user": user, "env": dict(env or {}), "cwd": cwd, "timeout": timeout}
        try:
            with self._writing:
                self._line.sendall(json.dumps(request).encode() + b"\n")
            answer = waiting.get(timeout=timeout + 30)
        except (OSError, queue.Empty):
            answer = None
        finally:
            del self._answers[number]
        if answer is None:
            raise GuestError(f"no answer to {' '.join(argv)}\n{self.console()}")
        return Finished(tuple(argv), answer["status"], answer["out"], answer["err"], answer["seconds"])

    def stop(self) -> None:
        """Ends the guest as a power cut would and removes what it had on this machine. May be called again."""
        if hasattr(self, "_process"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if hasattr(self, "_line"):
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)
            self._line.close()
        shutil.rmtree(self._directory, ignore_errors=True)


@contextlib.contextmanager
def booted(memory: int = 768) -> Iterator[Guest]:
    """A guest for the length of a with block."""
    guest = Guest(memory)
    try:
        yield guest
    finally:
        guest.stop()
