"""Writes errors.md: every way in which a launch can fail, as `meso` says it, by making it fail on this machine.

python contrib/manual/make_errors.py            # prints the page
python contrib/manual/make_errors.py --write    # replaces contrib/manual/errors.md

As root, and on a machine that can have limits: an agent of its own, pods that are wrong in one way each (CASES), and one pod of
which every effect, setup step and own call of the agent is made to fail (tests/system/every_fault.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mesocosm.kernel.core.advice import ADVICE
from mesocosm.kernel.launcher.diagnosis import HINTS

PAGE = Path(__file__).with_name("errors.md")
REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = "/srv/demo"  # what the page calls the scratch directory
Document = dict[str, Any]
Row = tuple[str, ...]


def crowd(_: Path) -> Document:
    """A thousand and one."""
    return {"name": "demo", "tasks": [{"name": f"t{number}", "command": "true"} for number in range(1001)]}


class Case(NamedTuple):
    """What is wrong, and a pod that is wrong in this way; `place` is a directory for what it needs."""

    cause: str
    pod: Callable[[Path], Document]


def one(**task: Any) -> Document:
    """A pod of one task."""
    return {"name": "demo", "tasks": [{"name": "t", "command": ["true"]} | task]}


def given(**task: Any) -> Callable[[Path], Document]:
    """The same, for a case that needs no place."""
    return lambda _: one(**task)


def program(content: bytes, mode: int = 0o755) -> Callable[[Path], Document]:
    """A task whose program is a file with this content, on a volume of the host."""

    def pod(place: Path) -> Document:
        (place / "program").write_bytes(content)
        (place / "program").chmod(mode)
        return one(command=["/data/program"], volumes=[{"source": f"host:{place}", "target": "/data"}])

    return pod


def inside_a_volume(place: Path) -> Document:
    """A mount on a place that does not exist, inside the host's own directory."""
    volumes = [{"source": f"host:{place}", "target": "/data"}, {"source": "shared:more", "target": "/data/more"}]
    return one(volumes=volumes)


def through_a_link(place: Path) -> Document:
    """A root directory in which the volume's place is a link."""
    root = place / "root"
    for name in ("bin", "proc", "dev", "sys", "tmp"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "data").symlink_to("/srv")
    return one(rootfs=str(root), volumes=[{"source": "shared:more", "target": "/data/more"}])


def no_loader(place: Path) -> Document:
    """A program whose loader has another name."""
    return program(Path("/bin/true").read_bytes().replace(b"/lib64/ld-linux-x86-64.so.2", b"/lib64/no-such-loader.so.2\0"))(place)


CASES = (
    Case("a field is misspelt", given(volums=[])),
    Case("a field is missing", lambda _: {"name": "demo", "tasks": [{"name": "t"}]}),
    Case("a quantity has no such unit", given(resources={"memory": "64Mib"})),
    Case("a quantity is negative", given(resources={"cpus": -1})),
    Case("a name is a path", given(name="a/b")),
    Case("two tasks have one name", lambda _: {"name": "demo", "tasks": [{"name": "t", "command": "true"}] * 2}),
    Case("there is nothing to run", given(command=[])),
    Case("no such signal", given(kill={"signal": "NOPE"})),
    Case("no such kind of volume", given(volumes=[{"source": "nfs:x", "target": "/data"}])),
    Case("a target that leads out", given(volumes=[{"source": "shared:x", "target": "/a/../../b"}])),
    Case("no such limit", given(limits={"nofiles": 1})),
    Case("no such capability", given(capabilities=["SYS_GOD"])),
    Case("an argument longer than the kernel takes", given(command=["echo", "x" * 131_073])),
    Case("more arguments than the kernel takes", given(command=["echo", *["x" * 100_000] * 30])),
    Case("more members than a group may have", crowd),
    Case("no such executor", lambda _: {**one(), "executor": "nobody"}),
    Case("an image, which nobody can unpack yet", given(image="debian:12")),
    Case("more open files than the agent may have", given(limits={"nofile": 2**40})),
    Case("a program that is not there", given(command=["/no/such/program"])),
    Case("a program that is nowhere on PATH", given(command=["no-such-program"])),
    Case("a program that may not be executed", program(b"#!/bin/sh\n", 0o644)),
    Case("a script whose interpreter is not there", program(b"#!/no/such/interpreter\n")),
    Case("a program whose loader is not there", no_loader),
    Case("a file that is no program", program(b"\x01\x02\x03\x04" * 16)),
    Case("a volume whose source is not there", given(volumes=[{"source": "host:/no/such/directory", "target": "/data"}])),
    Case("a volume inside a volume of the host", inside_a_volume),
    Case("a volume whose place is a link", through_a_link),
    Case("a working directory that is not there", given(cwd="/no/such/directory")),
    Case("a working directory that is not the user's", given(cwd="/root", user="nobody")),
    Case("a user that is not in the container", given(user="no-such-user")),
    Case("a root directory that is not there", given(rootfs="/no/such/root")),
    Case("an empty root directory", lambda place: one(rootfs=str(place))),
    Case("a memory limit in which nothing can start", given(resources={"memory": "64KiB"})),
)  # fmt: skip


class Meso:
    """The command, with an agent and directories of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._environment = {
            **os.environ,
            "MESOCOSM_RUN_DIR": str(place / "run"),
            "MESOCOSM_STATE_DIR": str(place / "state"),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "contrib/import-root"), os.environ.get("PYTHONPATH", "")]),
        }

    def __call__(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """A verb, to its end."""
        command = [sys.executable, "-B", "-m", "mesocosm.kernel.cli.main", *words]
        return subprocess.run(command, input=given, env=self._environment, capture_output=True, text=True, check=False, timeout=120)

    def every_fault(self, pod: Document) -> list[Document]:
        """What comes of each fault of its launch."""
        script = str(REPOSITORY / "tests/system/every_fault.py")
        marks = self.place / "marks"
        marks.mkdir()
        self("agent", "--stop")  # one agent to a run directory
        command = [sys.executable, "-B", script, "effect,step,call", str(marks), json.dumps(pod)]
        done = subprocess.run(command, env=self._environment, cwd="/", capture_output=True, text=True, check=True, timeout=300)
        return [json.loads(line) for line in done.stdout.splitlines()]


def cases(meso: Meso) -> Iterator[Row]:
    """(cause, what meso says, exit code, what to do) of each case."""
    place = meso.place / "scratch"
    for case in CASES:
        place.mkdir(mode=0o755)
        answer = meso("run", "--json", "-", given=json.dumps(case.pod(place)))
        meso("rm", "demo")
        subprocess.run(["rm", "-rf", str(place)], check=True)
        errors = [line["error"] for line in map(json.loads, answer.stdout.splitlines()) if line.get("error")]
        assert errors, (case.cause, answer)
        error = errors[-1]
        yield case.cause, said(error, meso.place), str(answer.returncode), plain(error.get("hint", ""), meso.place)


def faults(meso: Meso) -> Iterator[Row]:
    """(plug-in, step or effect, system call, what meso says) of each that can fail, once."""
    task = {
        "name": "t",
        "command": ["/bin/true"],
        "volumes": [{"source": "host:/srv", "target": "/data"}, {"source": "shared:x", "target": "/more"}],
        "limits": {"nofile": 256},
        "resources": {"memory": "64MiB", "cpus": 0.5, "pids": 50},
    }
    seen = set()
    for line in meso.every_fault({"name": "demo", "tasks": [task]}):
        error = line["error"]
        if error is None or "syscall" not in error:
            continue
        row = error["plugin"], f"{error['step']['stage']}: {error['step']['kind']}", error["syscall"]
        if row not in seen:
            seen.add(row)
            yield (*row, said(error, meso.place))


def said(error: Mapping[str, Any], place: Path) -> str:
    """The message, where, what the machine said, the limits."""
    text = str(error["message"])
    words = (str(error[key]) for key in ("syscall", "errno", "target") if error.get(key))
    machine = " ".join(word for word in words if word not in text)
    limits = ", ".join(f"{key} {re.sub('[0-9]+', 'N', str(error[key]))}" for key in ("have", "need") if error.get(key))
    at = f"at {error['path']}" if error.get("path") else ""
    return plain("; ".join(part for part in (text, at, machine, limits) if part), place)


def plain(text: str, place: Path) -> str:
    """Without what differs from machine to machine, and fit for a cell."""
    text = text.replace(str(place / "scratch"), DEMO).replace(str(place / "run"), "/run/mesocosm")
    text = re.sub(r"mesocosm-[0-9a-f]{6}", "mesocosm-RUN", text)
    text = re.sub(r"ask for \d+", "ask for N", text)
    return text.replace("|", "\\|").replace("\n", " ")


def table(head: Row, rows: Iterator[Row] | list[Row]) -> str:
    """In Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def advice() -> str:
    """The two tables that need no machine: what to do about an errno, at a step or anywhere."""
    steps = sorted((f"`{step}`", errno, plain(hint, Path("/nowhere"))) for (step, errno), hint in HINTS.items())
    anywhere = sorted((errno, plain(hint, Path("/nowhere"))) for errno, hint in ADVICE.items())
    return f"""## What to do about an errno

At a certain step:

{table(("step", "errno", "what to do"), [(*row,) for row in steps])}

Anywhere else:

{table(("errno", "what to do"), [(*row,) for row in anywhere])}
"""


def page(meso: Meso) -> str:
    """The whole page."""
    return f"""# Why a launch fails

Made by make_errors.py, which makes each of these happen; tests compare. Every error is one object (`meso … --json`, the
wire, `meso explain ID`): `code`, `message`, and as far as they are known `path` (of the field), `id`, `plugin`, `step`,
`syscall`, `errno`, `target`, `have`, `need`, `hint`. Whatever fails before the barrier, nothing of the group has run and
nothing of it is left. Exit codes: 2 the input is wrong, 125 the launch failed, 126 the program cannot be executed, 127 it is
not there.

## By cause

{table(("what is wrong", "what meso says", "exit code", "what to do"), cases(meso))}

## By step

Each effect (what the agent makes before the container exists) and each setup step (what the newborn does to itself), as it looks
when the kernel refuses the call: here for want of room (effects) or because there is no such call (steps).

{table(("plug-in", "step", "system call", "what meso says"), faults(meso))}

{advice()}"""


def main() -> None:
    """Prints or writes it."""
    with tempfile.TemporaryDirectory(prefix="meso-") as name:
        os.chmod(name, 0o755)
        meso = Meso(Path(name))
        try:
            text = page(meso)
        finally:
            meso("agent", "--stop")
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
