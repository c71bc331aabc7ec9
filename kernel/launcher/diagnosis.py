"""From "row 117, errno 2" to an error that teaches: plug-in, step, system call, what it was done to, what to do.

Pure: the table itself says what its row was about to do. HINTS is the advice by step and errno; where it has none,
core.advice has some by errno.
"""

from __future__ import annotations

import errno as _errno
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from mesocosm.kernel.core.advice import ADVICE
from mesocosm.kernel.core.errors import ExecError, LaunchError, MesoError
from mesocosm.kernel.core.plan import STEPS, Step
from mesocosm.kernel.launcher.compile import Compiled
from mesocosm.kernel.launcher.table import ROW_BYTES, ROW_WORDS, pairs
from mesocosm.kernel.linux.constants import SYS

_ROW = struct.Struct("=10q")
_NAMES = {number: name for name, number in SYS.items()}
# Which argument of a system call says what it is done to.
_TARGET = {
    "openat2": 1, "openat": 1, "mkdirat": 1, "mknodat": 1, "symlinkat": 2, "execve": 0, "execveat": 1, "faccessat2": 1,
    "open_tree": 1, "sethostname": 0, "chdir": 0,
}  # fmt: skip

# (step kind, errno): what to do next.
HINTS: Mapping[tuple[str, str], str] = {
    ("check", "ENOENT"): "no such program in the container's root; name it by an absolute path, or mount it with a volume",
    ("check", "EACCES"): "the file is there but may not be executed: check its mode, and that its mount is not noexec",
    ("check", "ENOTDIR"): "a part of the path is a file, not a directory",
    ("exec", "ENOEXEC"): "the file has no #! line and is not an ELF executable for this machine",
    ("exec", "ENOENT"): "the program or its interpreter disappeared after it was checked",
    ("working_directory", "ENOENT"): "cwd must exist inside the container",
    ("working_directory", "EACCES"): "the container's user may not enter its cwd",
    ("clone", "ENOSPC"): "a limit on nested or total namespaces is reached: 32 levels, or user.max_*_namespaces",
    ("clone", "ENOMEM"): "no memory for another process",
    ("new_user", "ENOSPC"): "user.max_user_namespaces is reached, or user namespaces are nested 32 deep",
    ("new_user", "EPERM"): "this kernel or its policy does not let the agent make user namespaces (see meso doctor), or a link in "
    "the root directory has led a mount over the root itself",
    ("identity", "ENOSPC"): "user.max_user_namespaces is reached, or user namespaces are nested 32 deep",
    ("attach_cgroup", "EAGAIN"): "the pids limit of an ancestor's cgroup leaves no room for one more process",
    ("rlimit", "EPERM"): "above the agent's own hard limit: ask for less, or start the agent with more",
    ("bind", "ENOENT"): "the target must exist: nothing is made inside a volume of the host, or below a read-only one",
    ("bind", "ELOOP"): "nothing is made through a link: name the place that the link leads to",
    ("view_part", "ELOOP"): "the root directory has a link there: make it a directory",
    ("tmpfs", "ELOOP"): "nothing is made through a link: name the place that the link leads to",
    ("working_directory", "EMFILE"): "fewer volumes: the agent's own limit of open files (ulimit -n) is too small for so many",
    ("join", "ESRCH"): "the parent container has ended",
    ("join", "ENOMEM"): "the parent container is ending, or there is no memory for another process",
    ("overlay", "EINVAL"): "overlayfs cannot use these directories (overlays three deep, or a file system without d_type)",
    ("tmpfs", "ENOENT"): "the target must exist: nothing is made inside a volume of the host, or below a read-only one",
    ("scratch", "EROFS"): "these directories must exist in the root directory, or it must be writable",
    ("scratch", "ENOENT"): "these directories must exist in the root directory, or it must be writable",
}


def explain_row(
    answer: Mapping[str, Any], steps: Sequence[Step], compiled: Compiled | None, container_id: str, *, after_barrier: bool = False
) -> MesoError:
    """The error for a launcher's "failed": {row, errno, message?, kind?, status?}."""
    kind = ExecError if after_barrier else LaunchError
    number = max(0, answer.get("errno") or 0)  # less than 0: a write that was too short
    name = _errno.errorcode.get(number, str(number)) if number else None
    row = answer.get("row")
    index = _step_of(answer, steps, compiled)
    step = steps[index] if index is not None else None
    fields: dict[str, Any] = {"id": container_id, "errno": name}
    if step is not None and index is not None:
        fields |= {"plugin": step.plugin or "kernel", "step": {"index": index, "stage": step.stage, "kind": step.kind}}
        fields["hint"] = HINTS.get((step.kind, name or "")) or ADVICE.get(name or "")
    if row is not None and compiled is not None and 0 <= row < len(compiled.row_steps):
        syscall, target = _row_of(compiled, row)
        fields |= {"syscall": syscall, "target": target or _target_of(step)}
        if step is not None and step.stage in ("check", "exec") and step.kind != "pause":
            fields["target"] = _target_of(step)
        said = os.strerror(number).lower() if number else "the other end is gone"
        return kind(f"{_doing(step)}: {said}", **fields)
    fields["hint"] = fields.get("hint") or ADVICE.get(name or "")
    message = answer.get("message") or "it ended before it was ready"
    if status := answer.get("status"):
        message += f" (wait status {status})"
        if status == 9:  # SIGKILL, and not from us
            fields["hint"] = "a memory limit too small to start a process with does this: give it a few MiB"
    return kind(str(message), **fields)


def explain_late(failed: Mapping[str, Any], steps: Sequence[Step], container_id: str) -> MesoError:
    """The error for the `failed` of an inventory: the table that its row counts in has gone with an earlier agent, but behind
    the barrier there is little that can fail. `steps` may have references in them."""
    step = next((each for each in reversed(steps) if each.stage == "exec"), None)
    answer: dict[str, Any] = {"errno": failed["errno"], "kind": step.kind if step else None}
    said = os.strerror(failed["errno"]).lower() if failed["errno"] > 0 else "the other end is gone"
    error = explain_row(answer | {"message": f"{_doing(step)}: {said}"}, steps, None, container_id, after_barrier=True)
    return error if step is None else error.with_fields(syscall=STEPS[step.kind][1], target=_target_of(step))


def _step_of(answer: Mapping[str, Any], steps: Sequence[Step], compiled: Compiled | None) -> int | None:
    row: int | None = answer.get("row")
    if row is not None and compiled is not None and 0 <= row < len(compiled.row_steps):
        return compiled.row_steps[row]
    for index, step in enumerate(steps):
        if step.kind == answer.get("kind"):
            return index
    return None


def _row_of(compiled: Compiled, row: int) -> tuple[str, str | None]:
    """The system call of a row, and the text it was given, if it was given one."""
    table = compiled.table
    number = _ROW.unpack_from(table.rows, row * ROW_BYTES)[0]
    name = _NAMES.get(number, str(number))
    if name == "fsconfig":
        key, value = _text(compiled, row, 2), _text(compiled, row, 3)
        return name, "=".join(part for part in (key, value) if part) or None
    return name, _text(compiled, row, _TARGET[name]) if name in _TARGET else None


def _text(compiled: Compiled, row: int, argument: int) -> str | None:
    word, table = row * ROW_WORDS + 1 + argument, compiled.table
    for part in table.parts:
        for at, to in pairs(part.pointers):
            if part.word + at == word:
                start = part.start + to
                return os.fsdecode(table.blob[start : table.blob.index(b"\0", start)]) or None
    return None


def _target_of(step: Step | None) -> str | None:
    if step is None:
        return None
    args = step.args
    if step.kind in ("check", "exec"):
        return str(args["argv"][0])
    if step.kind == "scratch":
        return " ".join(args["places"])
    return next((str(args[key]) for key in ("target", "path", "name", "resource", "of") if args.get(key)), None)


def _doing(step: Step | None) -> str:
    if step is None:
        return "the launch failed"
    what = _target_of(step)
    return {
        "check": f"{what} cannot be executed",
        "exec": f"{what} could not be executed",
        "clone": "no new process could be made",
        "working_directory": f"cannot enter {what or '/'}",
    }.get(step.kind, f"{step.kind}{f' {what}' if what else ''} failed")
