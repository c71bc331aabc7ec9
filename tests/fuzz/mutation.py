"""Where hostile inputs come from: the manual's own examples, and what can be made of them by changing values and bytes.

What lives here: the corpus, and a mutator that knows what a frame and a message are. Theory: a frame that is mutated as mere
bytes is refused by the walk in front of the decoder, nearly always; what lies behind it is reached by changing the *value*
and encoding it again, with the fields and units that the product knows. Both are done, and whole conversations as well.
Nothing here is random but through the generator it is given, so a seed says it all.
"""

from __future__ import annotations

import json
import random
import re
import struct
import tomllib
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from mesocosm.kernel.core import containers, spec
from mesocosm.kernel.wire import framing
from mesocosm.kernel.wire.messages import METHODS

REPOSITORY = Path(__file__).resolve().parents[2]
STRUCTS = (spec.Pod, spec.Task, spec.Volume, spec.Kill, spec.Resources, *{method.request for method in METHODS.values()})
MESOS = [
    "task_id", "value", "task_group", "resources", "type", "scalar", "arguments", "shell", "environment", "variables", "container",
    "rlimit_info", "rlimits", "soft", "hard", "kill_policy", "grace_period", "nanoseconds", "container_path", "host_path", "mode",
    "source", "sandbox_path", "path",
]  # fmt: skip
FIELDS = sorted({*(field for struct_ in STRUCTS for field in struct_.__struct_fields__), *MESOS, "id"})
WORDS = [
    "", ".", "..", "/", "a/../b", "../etc", "web", "web.db", "web.done", "done", "x" * 64, "web." * 32 + "x", "a\0b", "a\nb",
    "%s%n", "\u00b2", "\u0661", "9" * 5000, "1e308", "-1", "0", "0x10", "64MiB", "0.5", "500m", "3s", "3 parsecs",
    "1.0000000001", "NaN", "KILL", "SIGTERM", "0:0", "root", "nobody:", "-1:-1", "4294967296", "own", "parent", "host",
    "host:/", "host:/etc", "shared:x", "shared:..", "tmpfs:1GiB", "tmpfs:", "volume:v", "/", "//", "/proc/self/fd/3",
    "/a/./b//c", "unlimited", "SYS_ADMIN", "stdout", "cap_net_raw", "default", "command", "pod", "none", "ignore", "exit",
    "missing", "exec-fails", "oom", "VALUE", "SCALAR", "RW", "PARENT", "SELF", "\u202e", "\ufeff", "\U0001f4a3", "a` - at `$.b",
    "=", "A=B", "y" * 70_000,
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 31, 32, 33, 63, 64, 65, 127, 255, 256, 65535, 65536, 2**22, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62,
    2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e-9, 1e308, 5e-324, 0.1 + 0.2, float("nan"), float("inf"),
]  # fmt: skip
SCALARS: list[Any] = [None, True, False, b"", b"bytes", [], {}, *NUMBERS, *WORDS]
# Single values that no encoder of ours writes: extension types, claims of size, bytes that are no text, halves of things.
TOKENS = [
    b"\xc1", b"\xd4\x00\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x0c\xff" + b"\xff" * 12, b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xde\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xa1\xff",
    b"\xa3\xed\xa0\x80", b"\x81\xa1a", b"\x90", b"\x91" * 40, b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", b"\xca\x7f\x80\x00\x00",
    b"\x82\xa1a\x01\xa1a\x02", b"\x81\x01\x01", b"\xc0", b"\xcf",
]  # fmt: skip


def framed(message: Any) -> bytes:
    """A message as a client sends it."""
    return closed(msgpack.packb(message, strict_types=True))


def closed(body: bytes) -> bytes:
    """A body with its length before it."""
    return struct.pack(">I", len(body)) + body


def corpus() -> list[bytes]:
    """What clients really send: every request of the manual's page, a request for every method, the pods of the examples."""
    page = (REPOSITORY / "contrib/manual/wire.md").read_text()
    manual = [bytes.fromhex(digits) for digits in re.findall(r"^→ .*\n((?:  [0-9a-f ]+\n)+)", page, re.M)]
    hello = tomllib.loads((REPOSITORY / "contrib/examples/hello/pod.toml").read_text())
    mesos = json.loads(_MESOS)
    rich = json.loads(_RICH)
    asked: list[tuple[str, Any]] = [(name, _params(name)) for name in METHODS if name != "STOP_AGENT"]
    asked += [(method, {"group": pod}) for pod in (hello, mesos, rich) for method in ("PLAN_GROUP", "LAUNCH_GROUP")]
    asked.append(("LAUNCH_GROUP", {"group": {**rich, "name": "streamed"}, "stream": True}))
    single = {key: rich["tasks"][0][key] for key in ("command", "kill", "limits")}
    asked.append(("LAUNCH_CONTAINER", {"container_id": "single", **single}))
    requests = [framed([0, number, method, [params]]) for number, (method, params) in enumerate(asked, 20)]
    lasting = framed([0, 9, "WAIT_CONTAINER", [{"container_id": "web.db"}]]) + framed([2, "CANCEL", [{"id": 9}]])
    return [*manual, *requests, lasting, b"".join(requests), b"".join(manual), framed([0, 9, "STOP_AGENT", []])]


def _params(method: str) -> dict[str, Any]:
    fields = METHODS[method].request.__struct_fields__
    values: dict[str, Any] = {
        "container_id": "web.db", "group": BASE, "tasks": BASE["tasks"], "all": True, "since": 0, "stream": "stderr", "offset": 0,
        "follow": True, "signal": "HUP", "life": 1, "at": 1.5, "cursor": 3, "limit": 7, "repair": False, "forget": True,
        "previous": False,
    }  # fmt: skip
    found = {field: values[field] for field in fields}
    if method.startswith("LAUNCH"):
        found.pop("stream", None)
    if method in ("LAUNCH_CONTAINER", "LAUNCH_NESTED_CONTAINER"):
        found |= {"container_id": "web.more", "command": ["ignore", "TERM"]}
    return found


BASE: dict[str, Any] = {"name": "more", "tasks": [{"name": "one", "command": ["ignore"]}, {"name": "two", "command": "exit 3"}]}
_RICH = """
{"name": "rich", "network": "none", "role": "r", "hostname": "h", "resources": {"cpus": 2, "memory": "64MiB", "pids": 99},
"labels": {"a": "b"}, "namespaces": {"ipc": "host"}, "tasks": [{"name": "t", "command": ["exit", "0"], "env": {"A": "1"},
"user": "1:1", "cwd": "/tmp", "rootfs": "/srv", "read_only": true, "resources": {"cpus": "500m", "memory": 99999, "pids": 9},
"limits": {"nofile": 64, "core": [0, "unlimited"]}, "kill": {"signal": "HUP", "grace": "1s"}, "essential": false,
"capabilities": ["CHOWN", "NET_RAW"], "volumes": [{"source": "shared:w", "target": "/w"}, {"source": "tmpfs:1MiB", "target":
"/x", "read_only": true}, {"source": "host:/etc", "target": "/y"}], "namespaces": {"net": "own"}, "labels": {"effect":
"refused"}, "tasks": [{"name": "in", "command": "ignore"}]}]}
"""
_MESOS = """
{"tasks": [{"name": "n", "task_id": {"value": "a b"}, "agent_id": {"value": ""}, "resources": [{"name": "cpus", "type":
"SCALAR", "scalar": {"value": 0.1}}, {"name": "mem", "type": "SCALAR", "scalar": {"value": 32}}], "limits": {"mem": {"value":
64}}, "command": {"value": "exit", "shell": false, "arguments": ["exit", "0"], "user": "root", "environment": {"variables":
[{"name": "A", "value": "b"}]}}, "container": {"type": "MESOS", "volumes": [{"container_path": "p", "mode": "RW", "source":
{"type": "SANDBOX_PATH", "sandbox_path": {"type": "PARENT", "path": "q"}}}], "rlimit_info": {"rlimits": [{"type": "RLMT_CORE",
"soft": 0, "hard": 9}]}}, "kill_policy": {"grace_period": {"nanoseconds": 1000}}, "labels": {"labels": [{"key": "k", "value":
"v"}]}}]}
"""


def cut(stream: bytes) -> list[bytes]:
    """The bodies in a stream of frames; what is no whole frame is the last."""
    bodies = []
    at = 0
    while at < len(stream):
        length = int.from_bytes(stream[at : at + 4], "big")
        bodies.append(stream[at + 4 : at + 4 + length] if at + 4 + length <= len(stream) else stream[at:])
        at += 4 + length
    return bodies


class Mutator:
    """Changes inputs, by a generator of its own."""

    def __init__(self, seed: int, seeds: list[bytes]) -> None:
        self._random = random.Random(seed)
        self._seeds = seeds
        self._bodies = [body for stream in seeds for body in cut(stream)]

    def reseed(self, seed: int) -> None:
        """What comes now depends on nothing but `seed`."""
        self._random.seed(seed)

    def fresh(self) -> bytes:
        """A seed after one to six changes."""
        stream = self._random.choice(self._seeds)
        for _ in range(self._random.randint(1, 4)):
            stream = self.mutate(stream)
        return stream

    def mutate(self, stream: bytes, most: int = 2 * framing.MAX_FRAME) -> bytes:
        """One change: of a value, of bytes inside a frame, of the frames' order, or of the stream as it is."""
        pick = self._random
        bodies = cut(stream) or [b"\x90"]
        at = pick.randrange(len(bodies))
        chance = pick.random()
        if chance < 0.8 and (tree := _decoded(bodies[at])) is not None:
            bodies[at] = _encoded(self._changed(tree), bodies[at])
        elif chance < 0.88:
            bodies[at] = self._scrambled(bodies[at])
        elif chance < 0.97:
            other = pick.choice(self._bodies)
            pick.choice([lambda: bodies.insert(at, other), lambda: bodies.append(bodies[at]), lambda: bodies.pop(at)])()
        else:
            return self._scrambled(stream)[:most]
        return b"".join(closed(body) for body in bodies[:24])[:most]

    def _scrambled(self, body: bytes) -> bytes:
        pick = self._random
        data = bytearray(body)
        for _ in range(pick.randint(1, 3)):
            at = pick.randint(0, len(data))
            token = pick.choice([pick.choice(TOKENS), pick.randbytes(pick.randint(1, 4))])
            start = pick.choice([at, max(0, at - len(token)), max(0, at - pick.randint(0, 9))])  # insert, overwrite, take out
            data[start:at] = token if pick.random() < 0.8 else b""
        return bytes(data)

    def _changed(self, tree: Any) -> Any:
        holder = [tree]
        slots = list(_slots(holder))
        slots = slots[5:] or slots if self._random.random() < 0.9 else slots  # what makes it a message is left alone mostly
        where, key = self._random.choice(slots)
        operations: list[Callable[[Any], Any]] = [
            self._scalar, self._scalar, self._nudged, self._nudged, self._another, self._with_field, self._with_field,
            self._without, self._renamed, self._repeated, self._wrapped,
        ]  # fmt: skip
        where[key] = self._random.choice(operations)(where[key])
        return holder[0]

    def _scalar(self, _: Any) -> Any:
        return self._random.choice(SCALARS)

    def _nudged(self, value: Any) -> Any:
        pick = self._random
        match value:
            case bool():
                return int(value)
            case int() | float():
                return pick.choice([value + 1, value - 1, -value, value * 2, float(value), str(value), f"{value}MiB", f"{value}m"])
            case str():
                at = pick.randint(0, len(value))
                middle = pick.choice([*WORDS[:20], ":", "-", " ", "x", "\u00e9"])
                return value[:at] + middle + value[at + pick.randint(0, 1) :]
        return value

    def _another(self, _: Any) -> Any:
        holder = [_decoded(self._random.choice(self._bodies))]
        where, key = self._random.choice(list(_slots(holder)))
        return where[key]

    def _with_field(self, value: Any) -> Any:
        if isinstance(value, dict):
            found = self._random.choice(SCALARS) if self._random.random() < 0.6 else self._another(None)
            return {**value, self._random.choice([*FIELDS, *containers.RLIMITS, *spec.NAMESPACES]): found}
        if isinstance(value, list):
            return [*value, self._another(None)]
        return self._random.choice(list(METHODS))

    def _without(self, value: Any) -> Any:
        if isinstance(value, (dict, list)) and value:
            gone = self._random.randrange(len(value))
            left = [item for index, item in enumerate(value.items() if isinstance(value, dict) else value) if index != gone]
            return dict(left) if isinstance(value, dict) else left
        return None

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, dict) and value:
            old = self._random.choice(list(value))
            return {self._random.choice([*FIELDS, *WORDS]) if key == old else key: item for key, item in value.items()}
        return value

    def _repeated(self, value: Any) -> Any:
        times = self._random.choice([2, 2, 3, 30, 300, 3000])
        if isinstance(value, list):
            return (value * times)[:3000]
        if isinstance(value, str):
            return (value * times)[:262_000]
        return [value] * times

    def _wrapped(self, value: Any) -> Any:
        for _ in range(self._random.choice([1, 1, 2, 8, 28, 40])):
            value = [value] if self._random.random() < 0.5 else {self._random.choice(FIELDS): value}
        return value


def _decoded(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body) if len(body) < 100_000 else None
    except (ValueError, RecursionError):
        return None


def _encoded(tree: Any, instead: bytes) -> bytes:
    try:
        return msgpack.packb(tree)
    except (ValueError, OverflowError, TypeError, RecursionError):
        return instead


def _slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value, as what holds it and its key there."""
    todo = deque([value])
    while todo:
        holder = todo.popleft()
        for key, item in list(enumerate(holder) if isinstance(holder, list) else holder.items()):
            yield holder, key
            if isinstance(item, (list, dict)):
                todo.append(item)
