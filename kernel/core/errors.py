"""Every error of mesocosm, on one page, grouped by whose fault it is.

An error is a value first: the same object travels on the wire, stands in ``--json`` and is printed by
``explain``. It says what was tried (`step`, `syscall`), on what (`target`, `path`, `id`), what the machine
answered (`errno`, `have`, `need`) and what to do next (`hint`). A field that is not known is absent.

The classes exist so that code can catch by fault; they add nothing to the value but their `code`.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Mapping
from typing import Any, ClassVar

from mesocosm.kernel.core.advice import ADVICE

FIELDS = ("code", "message", "path", "id", "plugin", "step", "syscall", "errno", "target", "have", "need", "hint")

LONGEST = 4096  # characters of a field: an error quotes its cause, and whoever sent that must not make it too long for a frame

# The exit code of a verb that ends with this error. Nothing-changed refusals are 2: the input was the cause.
EXIT_CODES: Mapping[str, int] = {
    "bad_input": 2,
    "bad_frame": 2,
    "too_large": 2,
    "over_budget": 2,
    "unsupported": 2,
    "not_found": 3,
    "conflict": 4,
    "dying": 4,
    "denied": 5,
    "agent_gone": 7,
    "timeout": 124,
    "unknown_outcome": 1,
    "launch_failed": 125,
    "exec_failed": 126,
    "internal": 1,
}


class MesoError(Exception):
    """What went wrong, as data. Abstract: raise one of the classes below, which say whose fault it is."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(_sayable(message))
        unknown = fields.keys() - set(FIELDS)
        if unknown:
            raise TypeError(f"an error has no field {sorted(unknown)}")
        self.message: str = _sayable(message)
        self.fields: dict[str, Any] = {key: _sayable(value) for key, value in fields.items() if value is not None}

    def __str__(self) -> str:
        return describe(self.as_object())

    def as_object(self) -> dict[str, Any]:
        """The error object of the wire: {"code", "message", …}, unknown fields absent."""
        return {"code": self.code, "message": self.message, **self.fields}

    def with_fields(self, **fields: Any) -> MesoError:
        """The same error with fields added where they were unknown; what is known is never overwritten."""
        merged = {key: value for key, value in fields.items() if value is not None} | self.fields
        return type(self)(self.message, **merged)

    @property
    def exit_code(self) -> int:
        """What a verb that ends with this error exits with; ENOENT of a program is 127 as in a shell."""
        stage = (self.fields.get("step") or {}).get("stage")
        if self.code in ("launch_failed", "exec_failed") and stage in ("check", "exec"):
            return 127 if self.fields.get("errno") in ("ENOENT", "ENOTDIR") else 126
        return EXIT_CODES[self.code]


def _sayable(value: Any) -> Any:
    """Text that can go into the ledger and onto the wire: not too long, and bytes of a file name that are no UTF-8 as escapes."""
    if not isinstance(value, str):
        return value
    short = value[:LONGEST] + "…" if len(value) > LONGEST else value
    return short if short.isascii() else short.encode("utf-8", "backslashreplace").decode()


class SpecError(MesoError):
    """The caller's input is wrong; nothing has changed. (Refused for lack of rights: DeniedError.)"""

    code = "bad_input"


class FrameError(MesoError):
    """The bytes on the socket are not a message of ours; a well-formed message with bad content is a SpecError."""

    code = "bad_frame"


class TooLargeError(FrameError):
    """Well-formed perhaps, but over a limit of size, depth or count."""

    code = "too_large"


class NotFoundError(MesoError):
    """No container or group of that id; one that exists in the wrong state is a ConflictError."""

    code = "not_found"


class ConflictError(MesoError):
    """The id is taken, or the container is not in the state that the verb needs."""

    code = "conflict"


class DyingError(ConflictError):
    """The container, or an ancestor, is on its way out: nothing new may start in it."""

    code = "dying"


class DeniedError(MesoError):
    """The caller may not do this, whatever the input."""

    code = "denied"


class OverBudgetError(MesoError):
    """More than the parent, the pool or the machine has left; carries `have` and `need`."""

    code = "over_budget"


class UnsupportedError(MesoError):
    """Understood, but this build, host or user cannot do it; the hint says what would make it possible."""

    code = "unsupported"


class LaunchError(MesoError):
    """A launch failed before its barrier: no instruction of a user's program ran, everything was undone."""

    code = "launch_failed"


class ExecError(MesoError):
    """The barrier had opened and execve failed all the same: the group ends, but it did start."""

    code = "exec_failed"


class DeadlineError(MesoError):
    """Nothing happened within the time allowed, and it is certain that nothing will."""

    code = "timeout"


class LaggedError(DeadlineError):
    """A reader of events did not keep up, and what it would have read next is not kept for it. Ends its stream and nothing else."""


class UnknownOutcomeError(MesoError):
    """No answer within the deadline: it may have happened. Ask again, then undo; never treat it as failed."""

    code = "unknown_outcome"


class AgentGoneError(MesoError):
    """No agent answers on the socket, or it closed the connection in the middle of an answer."""

    code = "agent_gone"


class InternalError(MesoError):
    """An invariant of ours is broken. A bug: please report it."""

    code = "internal"


def _subclasses(cls: type[MesoError]) -> list[type[MesoError]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


_BY_CODE = {cls.code: cls for cls in _subclasses(MesoError)}


def from_object(value: Mapping[str, Any]) -> MesoError:
    """The exception for an error object off the wire; unknown fields and codes of newer agents are kept harmless."""
    cls = _BY_CODE.get(str(value.get("code")), InternalError)
    fields = {key: value[key] for key in FIELDS if key in value and key not in ("code", "message")}
    return cls(str(value.get("message", "no message")), **fields)


def from_oserror(
    error: OSError, *, syscall: str | None, target: str | None = None, doing: str | None = None, **fields: Any
) -> LaunchError:
    """A LaunchError that keeps what the machine said: the system call (None: nobody knows which), the errno's name, the path.

    `doing` is said in place of the system call. Without a `hint` the errno has one of its own.
    """
    name = _errno.errorcode.get(error.errno or 0, str(error.errno))
    fields["hint"] = fields.get("hint") or ADVICE.get(name)
    target = target if target is not None else error.filename and str(error.filename)
    said = error.strerror or str(error)
    return LaunchError(
        f"{doing or syscall}{f' {target}' if target else ''} failed: {said[:1].lower()}{said[1:]}",
        syscall=syscall,
        errno=name,
        target=target,
        **fields,
    )


def describe(value: Mapping[str, Any]) -> str:
    """An error object as one paragraph for people: what, where, what the machine said, what to do."""
    where = [f"at {value['path']}" if value.get("path") else "", f"in {value['id']}" if value.get("id") else ""]
    if step := value.get("step"):
        where.append(f"step {step['index']} ({step['stage']}: {step['kind']})")
    if value.get("plugin"):
        where.append(f"plug-in {value['plugin']}")
    said = [f"{value['syscall']}()" if value.get("syscall") else "", value.get("errno") or "", value.get("target") or ""]
    numbers = [f"have {value['have']}" if value.get("have") else "", f"need {value['need']}" if value.get("need") else ""]
    lines = [f"{value['message']}"]
    for label, parts in (("where", where), ("machine", said), ("limit", numbers)):
        text = (", " if label != "machine" else " ").join(part for part in parts if part)
        if text:
            lines.append(f"  {label + ':':9}{text}")
    if value.get("hint"):
        lines.append(f"  {'hint:':9}{value['hint']}")
    return "\n".join(lines)
