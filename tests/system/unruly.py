"""A plug-in that misbehaves on request: what the label `unruly` of a task says. For test_unruly_plugins.py, which installs it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from mesocosm.kernel import Effect, Plan, Step, hookimpl
from mesocosm.kernel.contracts import ContainerSpec, EffectContext, Executor, GroupView, Kill, Pod, Undo
from mesocosm.kernel.core.containers import single_container
from mesocosm.kernel.core.errors import ConflictError


def _raises() -> Any:
    raise ValueError("no idea")


def _sleeps() -> Any:
    time.sleep(3600)


def _spins() -> Any:
    while True:
        pass


def _refers_to_itself() -> Any:
    found: list[Any] = []
    found.append(found)
    return Plan(setup=[Step("tmpfs", {"target": found})])


PLANNERS: Mapping[str, Callable[[], Any]] = {
    "raises": _raises,
    "leaves": lambda: sys.exit(3),
    "sleeps": _sleeps,
    "spins": _spins,
    "answers text": lambda: "a plan",
    "refers to itself": _refers_to_itself,
    "is huge": lambda: Plan(setup=[Step("tmpfs", {"target": "x" * 2**26})]),
    "wants what nobody makes": lambda: Plan([Effect("no such kind")]),
    "is undone in no way": lambda: Plan([Effect("unruly", {}, (Undo("explode", "/"),))]),
    "has half a step": lambda: Plan(setup=[Step("tmpfs", {})]),
}


async def _hangs() -> Any:
    await trio.sleep_forever()


async def _hangs_shielded() -> Any:
    """Until somebody makes the file `go`, whatever anybody else wants."""
    with trio.CancelScope(shield=True):
        while not os.path.exists(f"{os.environ['MESOCOSM_STATE_DIR']}/go"):
            await trio.sleep(0.05)
    return {}


async def _answers_text() -> Any:
    return "made"


EFFECTS: Mapping[str, Callable[[], Any]] = {
    "hangs": _hangs,
    "hangs shielded": _hangs_shielded,
    "answers text": _answers_text,
    "dies": _raises,
}


class Unruly:
    """An effect kind of an outsider who does not answer, or not well. With `patient` nobody waits for a deadline."""

    def __init__(self, name: str, deadline: float) -> None:
        self.name, self.deadline = name, deadline

    def do(self, args: Mapping[str, Any], context: EffectContext) -> Any:
        """Does as it is told."""
        return EFFECTS[args["how"]]()

    def find(self, prefix: str) -> Sequence[str]:
        """Nothing of it is anywhere."""
        return []


class Claim:
    """A kind that behaves: a directory, and none that is somebody else's."""

    name = "claim"

    def do(self, args: Mapping[str, Any], context: EffectContext) -> Mapping[str, Any]:
        """Makes it."""
        try:
            os.mkdir(args["how"])
        except FileExistsError:
            raise ConflictError("it is somebody else's", target=args["how"]) from None
        return {}

    def find(self, prefix: str) -> Sequence[str]:
        """Nobody asks."""
        return []


@hookimpl
def effect_kinds() -> list[Any]:
    """One that is soon given up, one that only a kill ends, and one that is not unruly at all."""
    return [Unruly("unruly", 1.0), Unruly("patient", 1000.0), Claim()]


@hookimpl
def plan(container: ContainerSpec) -> Any:
    """What the label says: a planner's way, or an effect and its way."""
    how = container.labels.get("unruly")
    if how is None:
        return None
    kind, _, way = how.partition(": ")
    undo = (Undo("remove_tree", way),) if kind == "claim" else ()
    return PLANNERS[way]() if kind == "plan" else Plan([Effect(kind, {"how": way}, undo)])


class UnrulyExecutor:
    """An executor of single containers whose opinion is what the container's label says."""

    name = "unruly"

    def arrange(self, pod: Pod) -> Sequence[ContainerSpec]:
        """One container; for the label `arrange` a canary's."""
        if "arrange" in pod.tasks[0].labels:
            return [ContainerSpec(id="canary", command=("true",))]
        return [single_container(pod, pod.tasks[0], "$.tasks[0]")]

    def react(self, group: GroupView, ended: str) -> Any:
        """Nonsense."""
        return [None, Kill("canary", "group"), 5]


@hookimpl
def executor() -> Executor:
    """The executor `unruly`."""
    return UnrulyExecutor()
