"""What must be: random operations on containers, and what has to come of each, whatever the timing. Pure.

What lives here: the vocabulary of operations, how the next one is chosen, and the model, which knows after each of them who lives,
who is ending and in which ways that may be told. What must not: clients, machines, clocks; `soak.py` does the same operations on
a real machine, `tests/runtime/test_random_operations.py` on a simulated one.

Theory: the next operation is a function of the seed and of the model, and the model changes by operations alone, never by what
was observed. So a seed is a list of operations, the same one on every machine. What nobody can foresee (an agent that dies in
the middle of a launch) is *unsure*: until the next quiet point everything is allowed of it that is whole, and there it is ended.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NAMES = tuple(f"s{number}" for number in range(14))  # few enough to be used again and again
ROOM = 60  # containers that may live at once
DEEPEST = 5
PAUSE = "pause"  # the first process of a pod, which only waits
ANY = ("ok", "conflict", "dying", "not_found", "launch_failed", "agent_gone", "over_budget", "timeout", "internal")

Status = tuple[int | None, int | None]  # exit code, signal
Ending = tuple[str, int | None, int | None]  # reason, exit code, signal

KILLED: Status = (None, 9)
# What a kill by their own policy makes of them. `polite` hears TERM: it says so with 5, or dies of it where it can have no handler.
BY_POLICY: Mapping[str, tuple[Status, ...]] = {"polite": ((5, None), (None, 15), KILLED), PAUSE: (KILLED, (None, 15), (0, None))}
CONSEQUENCES = ("group", "parent", "killed")
# An agent that has sent a signal and dies takes along why it did: the next one sees an exit.
FORGOTTEN = ("signaled", "exited")


class Task(NamedTuple):
    """A member of a group. `program`: gate (ends when told to), polite (has a handler), brief (ends at once with `code`), hungry
    (eats more memory than it has), absent (is not there) or broken (is there, and cannot be executed)."""

    name: str
    program: str = "gate"
    code: int = 0
    essential: bool = True
    sidecar: bool = False
    limited: bool = False
    tasks: tuple[Task, ...] = ()


class Operation(NamedTuple):
    """One thing to do. `answers`: the codes that are allowed as its answer, "ok" among them or not."""

    kind: str
    target: str = ""
    tasks: tuple[Task, ...] = ()
    number: int = 0  # an exit code, or thousandths of a second
    signal: str = ""
    answers: tuple[str, ...] = ("ok",)

    def __str__(self) -> str:
        words = [self.kind, self.target, ",".join(_shown(task) for task in self.tasks), self.signal, str(self.number or "")]
        return " ".join(word for word in words if word)


def _shown(task: Task) -> str:
    marks = ("" if task.essential else "?") + ("~" if task.sidecar else "") + (f"={task.code}" if task.program == "brief" else "")
    inner = f"({','.join(_shown(each) for each in task.tasks)})" if task.tasks else ""
    return f"{task.name}:{task.program}{marks}{inner}"


@dataclass
class Box:
    """A container. `endings`: the ways in which it may have ended; none while it has to live. `dead`: that has been waited for."""

    id: str
    group: str
    program: str
    essential: bool = True
    sidecar: bool = False
    endings: set[Ending] = field(default_factory=set)
    dead: bool = False
    blind: bool = False  # nobody may have seen it end
    wait: Mapping[str, Any] | None = None  # as it was seen first
    pid: int | None = None

    @property
    def parent(self) -> str:
        """The id above; "" for a pod."""
        return self.id.rpartition(".")[0]

    @property
    def lives(self) -> bool:
        """Whether nothing has happened that ends it."""
        return not self.endings


class Model:
    """Who has to live and who has to be dead. `can`: what the machine can do ("limits", "launcher", "descriptors")."""

    def __init__(self, can: Iterable[str] = ()) -> None:
        self.boxes: dict[str, Box] = {}
        self.unsure: set[str] = set()  # names of pods of which only wholeness is known
        self.deaths: Counter[str] = Counter()  # how often each id has to have been told dead
        self.can = frozenset(can)
        self._members: dict[str, list[str]] = {}  # group → ids; PARENT+N for a nested one
        self._number = 0

    # -- choosing -----------------------------------------------------------------------------------------------

    def choose(self, rng: random.Random) -> Operation:
        """The next operation."""
        makers = self._makers()
        while True:
            [kind] = rng.choices(list(makers), [weight for weight, _ in makers.values()])
            made: Operation | None = makers[kind][1](rng)
            if made is not None:
                return made

    def _makers(self) -> dict[str, tuple[int, Any]]:
        makers: dict[str, tuple[int, Any]] = {
            "launch": (14, self._launch),
            "broken": (3, self._broken),
            "taken": (2, self._taken),
            "soon": (4, self._soon),
            "left": (2, self._left),
            "nested": (10, self._nested),
            "nested_broken": (2, self._nested_broken),
            "end": (14, self._natural),
            "kill": (6, self._kill),
            "signal": (6, self._signal),
            "wait": (6, self._wait),
            "remove": (7, self._remove),
            "unknown": (1, self._unknown),
            "agent_dies": (4, self._agent_dies),
            "agent_stops": (1, lambda rng: Operation("agent_stops", number=rng.randrange(5, 50))),
            "quiet": (4, lambda _: Operation("quiet")),
        }
        if "descriptors" in self.can:
            makers["descriptors"] = (1, self._starved)
        if "launcher" in self.can:
            makers["launcher_dies"] = (1, lambda _: Operation("launcher_dies"))
        return makers  # a resize belongs here when there is one: ("resize", target, new limits), answers ok or over_budget

    def _free(self) -> list[str]:
        return [name for name in NAMES if name not in self.unsure and (name not in self.boxes or self.boxes[name].dead)]

    def _living(self, *programs: str) -> list[Box]:
        return [box for box in self.boxes.values() if box.lives and (not programs or box.program in programs)]

    def _tasks(self, rng: random.Random, *, depth: int = 0, only: str = "") -> tuple[Task, ...]:
        count = rng.choice((1, 1, 2, 2, 3, 4, 10) if not depth else (1, 2))
        programs = ["gate"] * 6 + ["polite"] * 2 + ["brief"] * 2
        programs += ["hungry"] if "limits" in self.can else []
        programs += ["broken"] if "broken" in self.can and not depth else []
        made = []
        for at in range(count):
            program = only or rng.choice(programs)
            inner = rng.random() < 0.2 and depth < 2 and program in ("gate", "polite")
            made.append(
                Task(
                    f"t{at}",
                    program,
                    rng.choice((0, 0, 3)) if program == "brief" else 0,
                    rng.random() < 0.8 or program == "broken",
                    at > 0 and rng.random() < 0.15,
                    "limits" in self.can and (program == "hungry" or rng.random() < 0.3),
                    self._tasks(rng, depth=depth + 1, only=only) if inner else (),
                )
            )
        return tuple(made)

    def _launch(self, rng: random.Random) -> Operation | None:
        free = self._free()
        if not free or len(self._living()) > ROOM:
            return None
        name = rng.choice(free)
        if rng.random() < 0.25:
            program = rng.choice(("gate", "polite", "brief"))
            return Operation("single", name, (Task(name, program, rng.choice((0, 7)) if program == "brief" else 0),))
        return Operation("launch", name, self._tasks(rng))

    def _broken(self, rng: random.Random) -> Operation | None:
        free = self._free()
        if not free:
            return None
        tasks = list(self._tasks(rng, only="gate"))
        at = rng.randrange(len(tasks))
        tasks[at] = tasks[at]._replace(program="absent", tasks=())
        return Operation("launch", rng.choice(free), tuple(tasks), answers=("launch_failed",))

    def _taken(self, rng: random.Random) -> Operation | None:
        names = [box.id for box in self._living() if not box.parent and box.id in NAMES]
        return Operation("launch", rng.choice(names), self._tasks(rng, only="gate"), answers=("conflict",)) if names else None

    def _agent_dies(self, rng: random.Random) -> Operation:
        """Now; with a number, the one after it too, so many thousandths of a second after it was started."""
        return Operation(
            "agent_dies", signal=rng.choice(("KILL", "KILL", "KILL", "TERM")), number=rng.choice((0, 0, rng.randrange(400)))
        )

    def _soon(self, rng: random.Random) -> Operation | None:
        """A launch, and the agent dies so many thousandths of a second after it has been asked."""
        free = self._free()
        if not free:
            return None
        return Operation("launch_and_die", rng.choice(free), self._tasks(rng, only="gate"), rng.randrange(25), answers=ANY)

    def _left(self, rng: random.Random) -> Operation | None:
        """A launch whose client goes away, and perhaps a kill after it."""
        free = self._free()
        if not free:
            return None
        kind = rng.choice(("launch_and_leave", "launch_and_kill"))
        return Operation(kind, rng.choice(free), self._tasks(rng, only="gate"), rng.randrange(25), answers=ANY)

    def _starved(self, rng: random.Random) -> Operation | None:
        """A launch while the agent may open no more than so many descriptors."""
        free = self._free()
        if not free:
            return None
        return Operation("launch_starved", rng.choice(free), self._tasks(rng, only="gate"), rng.randrange(12), answers=ANY)

    def _nested(self, rng: random.Random) -> Operation | None:
        parents = [box.id for box in self._living("gate", "polite") if box.id.count(".") < DEEPEST]
        if not parents or len(self._living()) > ROOM:
            return None
        self._number += 1
        tasks = tuple(task._replace(name=f"n{self._number}{task.name}") for task in self._tasks(rng, depth=1))
        return Operation("nested", rng.choice(parents), tasks)

    def _nested_broken(self, rng: random.Random) -> Operation | None:
        made = self._nested(rng)
        if made is None:
            return None
        tasks = tuple(task._replace(program="gate", tasks=()) for task in made.tasks[:-1])
        last = made.tasks[-1]._replace(program="absent", tasks=())
        return made._replace(tasks=(*tasks, last), answers=("launch_failed",))

    def _natural(self, rng: random.Random) -> Operation | None:
        living = self._living("gate", "polite")
        return Operation("end", rng.choice(living).id, number=rng.choice((0, 0, 0, 4))) if living else None

    def _kill(self, rng: random.Random) -> Operation | None:
        living = self._living()
        return Operation("kill", rng.choice(living).id) if living else None

    def _signal(self, rng: random.Random) -> Operation | None:
        living = self._living("gate")
        return Operation("signal", rng.choice(living).id, signal=rng.choice(("KILL", "CONT"))) if living else None

    def _wait(self, rng: random.Random) -> Operation | None:
        ending = [box.id for box in self.boxes.values() if not box.lives]
        return Operation("wait", rng.choice(ending)) if ending else None

    def _remove(self, rng: random.Random) -> Operation | None:
        names = [box.id for box in self.boxes.values() if not box.parent and (box.dead or box.lives)]
        if not names:
            return None
        name = rng.choice(names)
        return Operation("remove", name, answers=("ok",) if self.boxes[name].dead else ("conflict",))

    def _unknown(self, rng: random.Random) -> Operation:
        return Operation(rng.choice(("kill", "wait", "remove")), "nobody", answers=("not_found",))

    # -- what follows -------------------------------------------------------------------------------------------

    def done(self, made: Operation) -> None:
        """The operation has been done, and answered as it has to be."""
        if "ok" not in made.answers and "launch_failed" not in made.answers:
            return
        kind, target = made.kind, made.target
        if kind in ("launch", "single", "nested"):
            self._launched(made)
        elif kind.startswith("launch_and") or kind == "launch_starved":
            self._forget(target)
            self.unsure.add(target)
            if kind == "launch_and_die":
                self._agent_died()
        elif kind == "end":
            self._end(self.boxes[target], {("exited", made.number, None)}, success=made.number == 0)
        elif kind == "kill":
            self._end(self.boxes[target], _by_policy(self.boxes[target], ("killed",)), success=False)
        elif kind == "signal" and made.signal == "KILL":
            self._end(self.boxes[target], {("killed", None, 9)}, success=False)
        elif kind == "wait":
            self._is_dead(self.boxes[target])
        elif kind == "remove":
            self._forget(target)
        elif kind == "agent_dies":
            self._agent_died()
        elif kind == "launcher_dies":
            self._agent_died()
            for box in self.boxes.values():
                box.blind |= not box.dead
        elif kind == "quiet":
            for box in self.boxes.values():
                if not box.lives:
                    self._is_dead(box)
            self.unsure.clear()

    def clear(self) -> None:
        """All of them have been ended, waited for and removed."""
        for name in [name for name in self.boxes if "." not in name]:
            self._is_dead(self.boxes[name])
            self._forget(name)
        self.unsure.clear()

    def _agent_died(self) -> None:
        for box in self.boxes.values():
            if not box.dead and any(reason in CONSEQUENCES for reason, _, _ in box.endings):
                statuses = {(exit_code, signal) for _, exit_code, signal in box.endings}
                box.endings |= {(reason, *status) for reason in FORGOTTEN for status in statuses}

    def _is_dead(self, box: Box) -> None:
        """It is known to be dead, and with it all that is below."""
        for found in (box, *self._below(box.id)):
            if not found.dead:
                found.dead = True
                self.deaths[found.id] += ("rolled_back", None, None) not in found.endings

    def _forget(self, name: str) -> None:
        for found in [found for found in self.boxes if found == name or found.startswith(name + ".")]:
            del self.boxes[found]
        for group in [group for group in self._members if group.partition("+")[0] not in self.boxes]:
            del self._members[group]

    def _launched(self, made: Operation) -> None:
        if made.kind == "nested":
            group, around = f"{made.target}+{made.tasks[0].name}", made.target
        else:
            self._forget(made.target)
            group, around = made.target, made.target
        boxes = []
        if made.kind == "single":
            boxes.append(Box(made.target, group, made.tasks[0].program))
        elif made.kind == "launch":
            boxes.append(Box(made.target, group, PAUSE))
        if made.kind != "single":
            boxes += [Box(found, group, task.program, task.essential, task.sidecar) for found, task in under(around, made.tasks)]
        self._members[group] = [box.id for box in boxes]
        self.boxes |= {box.id: box for box in boxes}
        if "ok" not in made.answers:
            for box in boxes:
                box.endings.add(("rolled_back", None, None))
                box.dead = True
            return
        tasks = {made.target: made.tasks[0]} if made.kind == "single" else dict(under(around, made.tasks))
        for found, task in tasks.items():
            if task.program == "brief":
                self._end(self.boxes[found], {("exited", task.code, None)}, success=task.code == 0)
            elif task.program == "hungry":
                self._end(self.boxes[found], {("memory", None, 9)}, success=False)
            elif task.program == "broken":
                _add(self.boxes[found], {("exited", 127, None), ("group", 127, None)})
                for box in boxes:  # a program that could not even be executed ends all of its group, essential or not
                    self._follows(box)

    def _end(self, box: Box, endings: set[Ending], *, success: bool) -> None:
        _add(box, endings)
        self._take_along(box)
        self._react(box, success=success)

    def _take_along(self, box: Box) -> None:
        """What is below it ends with it."""
        for other in self._below(box.id):
            self._follows(other)

    def _follows(self, box: Box) -> None:
        is_new = box.lives
        if not box.dead:
            _add(box, _by_policy(box, CONSEQUENCES))
        if is_new:
            self._take_along(box)
            self._react(box, success=True)  # a consequence decides nothing, but it may have been the last one

    def _react(self, ended: Box, *, success: bool) -> None:
        """The rules of the default executor, once more."""
        members = [self.boxes[found] for found in self._members[ended.group] if found in self.boxes]
        around = ended.group.partition("+")[0]
        is_nested = "+" in ended.group
        tasks = members if is_nested else members[1:]
        if not tasks or ended.id == around:
            return
        scope = ended.id
        if not success:
            while scope != around and self.boxes[scope].essential:
                scope = self.boxes[scope].parent
        awaited = [box for box in tasks if not box.sidecar] or tasks
        if scope == around or all(not box.lives for box in awaited):
            for box in tasks if is_nested else members:
                self._follows(box)
        elif scope != ended.id:
            self._follows(self.boxes[scope])

    def _below(self, name: str) -> list[Box]:
        return [box for found, box in self.boxes.items() if found.startswith(name + ".")]

    # -- comparing ----------------------------------------------------------------------------------------------

    def findings(self, lines: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
        """What is not as it has to be among the lines of `ps -a`, at a quiet point before it is `done`. Keeps pids and waits."""
        known = {found: line for found, line in lines.items() if found.partition(".")[0] not in self.unsure}
        for found in known.keys() - self.boxes.keys():
            yield f"{found} is {known[found]['state']}, and should not be there"
        for found, box in self.boxes.items():
            line = known.get(found)
            if line is None:
                yield f"{found} is not there; it should {'live' if box.lives else 'be dead'}"
            elif box.lives:
                yield from self._of_the_living(box, line)
            else:
                yield from self._of_the_dead(box, line)
        for name in self.unsure:
            of_it = {line["state"] for found, line in lines.items() if found.partition(".")[0] == name}
            if of_it not in (set(), {"RUNNING"}, {"DEAD"}):
                yield f"{name} is neither whole nor gone: {sorted(of_it)}"

    def _of_the_living(self, box: Box, line: Mapping[str, Any]) -> Iterator[str]:
        if line["state"] != "RUNNING":
            yield f"{box.id} is {line['state']}, and nothing has ended it: {line.get('wait')}"
        elif box.pid not in (None, line["pid"]):
            yield f"{box.id} was process {box.pid} and is {line['pid']}"
        box.pid = line["pid"]

    def _of_the_dead(self, box: Box, line: Mapping[str, Any]) -> Iterator[str]:
        wait = line.get("wait")
        if line["state"] != "DEAD" or not wait:
            yield f"{box.id} is {line['state']}, and should be dead of {sorted(box.endings, key=str)}"
            return
        yield from self.wrong_wait(box.id, wait)

    def wrong_wait(self, container_id: str, wait: Mapping[str, Any]) -> Iterator[str]:
        """Whether it may have ended like that, and has not been told otherwise before."""
        box = self.boxes[container_id]
        told: Ending = (wait["reason"], wait["exit"], wait["signal"])
        statuses = {(exit_code, signal) for _, exit_code, signal in box.endings} | {(None, None)}
        if told not in box.endings and not (box.blind and told[1:] in statuses):
            yield f"{container_id} ended as {told}; allowed is {sorted(box.endings, key=str)}"
        short = {key: wait[key] for key in ("id", "status", "exit", "signal", "reason", "oom")}
        if box.wait not in (None, short):
            yield f"{container_id} ended as {box.wait}, and now as {short}"
        box.wait = short


def under(around: str, tasks: Iterable[Task]) -> Iterator[tuple[str, Task]]:
    """All tasks with their ids, each before what is nested in it."""
    for task in tasks:
        yield f"{around}.{task.name}", task
        yield from under(f"{around}.{task.name}", task.tasks)


def _add(box: Box, endings: set[Ending]) -> None:
    """More ways to have ended. Who ends by itself while it is being ended has its own status, and may have the others' reason."""
    box.endings |= endings
    statuses = {(exit_code, signal) for _, exit_code, signal in box.endings}
    box.endings |= {(reason, *status) for reason, _, _ in tuple(box.endings) if reason in CONSEQUENCES for status in statuses}


def _by_policy(box: Box, reasons: Iterable[str]) -> set[Ending]:
    return {(reason, *status) for reason in reasons for status in BY_POLICY.get(box.program, (KILLED,))}


class Told:
    """What the events said, line by line: numbers without gaps, and each end once."""

    def __init__(self, since: int = 0) -> None:
        self.seq = since
        self.dead: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()  # groups, by their root
        self.wrong: list[str] = []
        self._exited: Counter[str] = Counter()

    def hear(self, line: Mapping[str, Any]) -> None:
        """One line."""
        if line["seq"] != self.seq + 1:
            self.wrong.append(f"event {line['seq']} after {self.seq}")
        self.seq = line["seq"]
        found, kind = line["id"], line["type"]
        if kind == "exited":
            self._exited[found] += 1
            if self._exited[found] != self.dead[found] + 1:
                self.wrong.append(f"event {self.seq}: {found} exited {self._exited[found]} times and died {self.dead[found]} times")
        elif kind == "dead":
            self.dead[found] += 1
            if self._exited[found] != self.dead[found]:
                self.wrong.append(f"event {self.seq}: {found} died {self.dead[found]} times and exited {self._exited[found]} times")
        elif kind == "end" and "group" not in line:
            self.ended[found] += 1
