"""What plug-ins and the kernel say to each other: types and Protocols, no behaviour.

A plug-in author needs this page, hookspecs.py and nothing else. Everything a plug-in is given is frozen;
everything it answers is data. The only code of a plug-in that touches the machine is an `EffectKind`, and
the kernel calls it only with a ledger entry already written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.host import HostFacts
from mesocosm.kernel.core.plan import ContainerPlan, Effect, Fact, Grant, Plan, Step, Undo, Watch
from mesocosm.kernel.core.spec import Pod

__all__ = [
    "Check", "ContainerPlan", "ContainerSpec", "Descriptor", "Effect", "EffectContext", "EffectKind", "Executor",
    "Fact", "Grant", "GroupView", "HostFacts", "Kill", "Plan", "Pod", "SlowEffectKind", "Step", "Translation",
    "Undo", "Wait", "Watch",
]  # fmt: skip


class Descriptor(int):
    """A fact that is an open file descriptor: the kernel closes it, and never writes it into the ledger."""


class EffectContext(msgspec.Struct, frozen=True):
    """Who an effect is made for."""

    host: HostFacts
    container_id: str


@runtime_checkable
class EffectKind(Protocol):
    """Code behind one kind of effect. Quick: it runs on the agent's only thread, a millisecond at most.

    `do` makes the thing that `args` describe (references resolved) and answers facts about it: plain data, and
    Descriptors. It raises OSError or MesoError; then nothing, or nothing that the recorded undo cannot remove,
    is left. It is called again after a crash, so it finds its own half-made things and goes on from there.
    Where it meets a thing of somebody else's it raises ConflictError, and has made and changed nothing: what is there is not
    undone, neither in the roll-back nor by an agent that follows this one. (What was there before the launch is known to the
    kernel; it becomes ours, and will be undone, when `do` returns.) A kind that marks what it makes in the instant in which
    that comes to be may have `owns(target)`, too: whether what is at a target of its undo lists has the mark. Recovery asks it
    about launches that were not finished, so that even who came in the middle of one loses nothing.
    `find` answers the targets (as undo lists have them) of everything of this kind on the machine, ours or not, that is at
    `prefix` or below it: an absolute path, with the thing at `prefix` itself first. It looks as it is asked (a generator),
    since an audit takes a few answers at a time; it changes nothing, and answers nothing for a place that is not there or
    where things of this kind cannot be. Whatever `do` has made is among the answers until it is undone.
    """

    name: str

    def do(self, args: Mapping[str, Any], context: EffectContext) -> Mapping[str, Any]:
        """Make it."""
        ...

    def find(self, prefix: str) -> Iterable[str]:
        """What of this kind is there."""
        ...


@runtime_checkable
class SlowEffectKind(Protocol):
    """An effect kind that talks to an outsider: the same contract, but `do` is awaited, and has a deadline in seconds.

    When the deadline passes, the outcome is unknown: the undo runs, the launch fails as `unknown_outcome`. Then, and when the
    launch is given up for other reasons, `do` is cancelled. If it goes on for more than two seconds all the same, it is left
    behind: what it makes is undone once more when it is through, and until that its container's id is not used again.
    """

    name: str
    deadline: float

    def do(self, args: Mapping[str, Any], context: EffectContext) -> Awaitable[Mapping[str, Any]]:
        """Make it."""
        ...

    def find(self, prefix: str) -> Iterable[str]:
        """What of this kind is there."""
        ...


class Wait(msgspec.Struct, frozen=True):
    """How a container ended (WAIT of the contract). `exit` or `signal`; both None and reason "unknown" if nobody saw it."""

    id: str
    status: int | None = None  # raw, as wait4(2) gives it
    exit: int | None = None
    signal: int | None = None
    reason: str | None = None  # exited, signaled, killed, group, parent, memory, rolled_back, unknown, rebooted
    limit: str | None = None
    oom: bool = False
    message: str | None = None

    @property
    def succeeded(self) -> bool:
        """Exit 0, and nothing else."""
        return self.exit == 0

    @property
    def code(self) -> int:
        """What a shell would report: the exit code, 128 + the signal, 1 where nobody knows."""
        if self.exit is not None:
            return self.exit
        return 1 if self.signal is None else 128 + self.signal


class GroupView(msgspec.Struct, frozen=True):
    """A running group as its executor sees it: all members, parents first; `waits` of those that have ended.

    `killed` are the members that have been told to end already.
    """

    id: str
    members: tuple[ContainerSpec, ...]
    waits: Mapping[str, Wait]
    killed: frozenset[str] = frozenset()


class Kill(msgspec.Struct, frozen=True):
    """An executor's answer: end this container (and all below it), each by its own kill policy.

    `reason` goes into the WAIT of those that die of it. `blame`: the member whose end decided, if one did.
    """

    id: str
    reason: str
    blame: str | None = None


class Executor(Protocol):
    """How a group is arranged into containers, and what follows when one of them ends. Pure."""

    name: str

    def arrange(self, pod: Pod) -> Sequence[ContainerSpec]:
        """The containers of the group: the root first, parents before their children."""
        ...

    def react(self, group: GroupView, ended: str) -> Sequence[Kill]:
        """What must end now that the container `ended` has."""
        ...


class Translation(msgspec.Struct, frozen=True):
    """A front-end's answer: the same group in our own words, and the fields that were left out, with their paths."""

    pod: dict[str, Any]
    ignored: tuple[str, ...] = ()


class Check(msgspec.Struct, frozen=True):
    """One line of ``meso doctor``."""

    check: str
    ok: bool
    have: str = ""
    need: str = ""
    hint: str = ""
