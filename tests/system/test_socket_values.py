"""Requests of sound form with values that mean harm: wrong types everywhere, ids that are paths, odd numbers and texts.

Each is answered with an error that names the field; the connection lives on, and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.one_world]

BY_ID = (
    "WAIT_CONTAINER", "WAIT_NESTED_CONTAINER", "KILL_CONTAINER", "KILL_NESTED_CONTAINER", "REMOVE_CONTAINER",
    "REMOVE_NESTED_CONTAINER", "EXPLAIN", "LAUNCH_CONTAINER", "LAUNCH_NESTED_CONTAINER",
)  # fmt: skip
IDS = [
    "", ".", "..", "/", "a/../b", "../../etc", "a/b", "x" * 64, "x" * 256, "a." * 32 + "a", "canary.", ".canary", "canary..bird",
    "a\0b", "canary\n", "%s%n%d", "cаnary", "canary.bіrd", "con:null", "canary bird", "-canary", "_canary", "١", "canary+1",
    "\u202ecanary",
]  # fmt: skip
TYPES = [None, True, 0, -1, 2**64 - 1, 1.5, b"canary", ["canary"], {"canary": "bird"}, [], {}]
NUMBERS = [True, -1, -(2**63), 2**63, 2**64 - 1, 0.5, "0", None, [0]]
SIGNALS = [0, -9, 65, 2**64 - 1, 9.5, True, "", "NOPE", "²", "9" * 5000, "SIG", [9], b"KILL"]
GRACES = ["-1s", "3 parsecs", 1e308]
SIZES = [f"tmpfs:{size}" for size in ("", "0", "-1", "1e9", "1Mib", "9" * 30)]
SOURCES = ["nfs:x", "", "shared:", "shared:..", "shared:a/b", "host:etc", "host:/a/../b", *SIZES]
TARGETS = ["d", "../d", "/a/../../d", "/", "//", "/\0", 7]
# Of a field of a task: values that no host may take for what they are not.
TASK: dict[str, list[Any]] = {
    "name": ["", "a/b", "..", "a.b", "x" * 64, 7, None, True, "a\0"],
    "command": [[], [""], 7, [7], None, {}, ["a\0b"], ["true", None], ["x" * (128 * 1024)]],
    "env": [{"": "x"}, {"A=B": "x"}, {"A": 1}, {"A": "\0"}, ["A=1"], {"A": None}, {"A": "x" * (128 * 1024)}],
    "user": ["no such user", "0:", ":0", "0:wheel", "-1", -1, 2**64 - 1, "9" * 5000, 1.0, ["0"], "٣"],
    "cwd": ["", "relative", "/a/../../b", "/x\0", "/" + "x" * 5000, 7],
    "rootfs": ["relative", "/a/..", "", "/x\0"],
    "limits": [{"nofiles": 1}, *({"nofile": value} for value in (-1, 2**63, [2, 1], [1], "many", 0.5, None))],
    "kill": [*({"signal": signal} for signal in SIGNALS), *({"grace": grace} for grace in GRACES)],
    "essential": [1, "yes", None],
    "volumes": [
        *([{"source": source, "target": "/d"}] for source in SOURCES),
        *([{"source": "shared:x", "target": target}] for target in TARGETS),
    ],
    "namespaces": [{"net": "theirs"}, {"everything": "host"}, {"net": None}, ["host"]],
    "capabilities": [["SYS_GOD"], "ALL", [7], ["\0"]],
    "labels": [{"a": 1}, ["a"]],
    "tasks": [[7], {}, "t", [{"name": "n"}], [{"name": "n", "command": "x", "colour": 1}]],
    "colour": ["red"],
}  # fmt: skip
# Quantities: what is not a whole number of the smallest unit, or nothing, or too much, is refused and never rounded.
AMOUNTS: dict[str, list[Any]] = {
    "cpus": [0, -1, -0.0, 0.0001, 1e308, 5e-324, "0", "1.0005", "0.5m", "1e3", "2 cpus", "500mm", "1,5", "", " 1", 2**64 - 1, True],
    "memory": [0, -1, 0.5, 1e308, "1.5", "64MiB 1kB", "64 Mib", "64mb", "-64MiB", "0x40", "1e6", "9" * 19, "8388608TiB", "", True],
    "pids": [0, -1, 2**22, 2**64 - 1, 0.5, "10", True, []],
}  # fmt: skip


def pod(**task: Any) -> dict[str, Any]:
    return {"name": "bad", "tasks": [{"name": "t", "command": "true"} | task]}


def requests() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(method, parameters, beginning of the path of what is wrong)."""
    for method in BY_ID:
        more = {"command": "true"} if method.startswith("LAUNCH") else {}
        yield from ((method, {"container_id": value, **more}, "$.container_id") for value in [*IDS, *TYPES])
    for value in [*IDS, *TYPES]:
        yield "LAUNCH_NESTED_GROUP", {"container_id": value, "tasks": [{"name": "t", "command": "true"}]}, "$.container_id"
    yield from (("KILL_CONTAINER", {"container_id": "canary.bird", "signal": value}, "$.signal") for value in SIGNALS)
    yield from (("GET_CONTAINERS", {"all": value}, "$.all") for value in [0, 1, "yes", None, [True]])
    yield from (("PLAN_GROUP", {"group": value}, "$.group") for value in [None, 7, "pod", [], [pod()]])
    yield from (("LAUNCH_GROUP", {"group": pod(), "stream": value}, "$.stream") for value in [0, "yes", None])
    yield from (
        ("LAUNCH_NESTED_GROUP", {"container_id": "canary", "tasks": value}, "$.tasks") for value in [{}, "t", None, [], [7]]
    )
    yield from (("PING", {name: 1}, "$.") for name in ("x", "", "\0", "a.b", "$", "container_id"))
    for field, values in TASK.items():
        yield from (("LAUNCH_GROUP", {"group": pod(**{field: value})}, f"$.tasks[0].{field}") for value in values)
    for field, values in AMOUNTS.items():
        yield from (("LAUNCH_GROUP", {"group": pod(resources={field: value})}, f"$.tasks[0].resources.{field}") for value in values)
        yield from (("LAUNCH_GROUP", {"group": pod() | {"resources": {field: value}}}, f"$.resources.{field}") for value in values)


def test_every_wrong_value_is_refused_by_the_path_of_its_field_and_changes_nothing(siege: Any, dial: Any) -> None:
    asked = list(requests())
    with siege(requests=len(asked)), dial() as peer:
        before = peer.ask("GET_CONTAINERS", all=True)[3]
        for number, (method, params, path) in enumerate(asked, 2):
            error = peer.ask(method, number, **params)[2]
            what = f"{method} {str(params)[:300]}: {str(error)[:300]}"
            assert error is not None, what
            assert error["code"] in ("bad_input", "unsupported"), what
            assert error["path"].startswith(path), what
        assert peer.ask("GET_CONTAINERS", 1, all=True)[3] == before


def test_what_another_version_would_say_is_refused_politely_and_the_connection_is_good_for_more(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        assert peer.refused("HELLO", protocol=2)["code"] == "unsupported"
        assert peer.refused("LAUNCH_GROUP_V2", group=pod())["code"] == "unsupported"
        error = peer.refused("GET_VERSION", features=["compression"])
        assert (error["code"], error["path"]) == ("bad_input", "$.features")
        peer.send([2, "FEATURES", [{"compression": True}]])  # a notification is never answered, known or not
        assert peer.ask("GET_VERSION", 2)[3]["protocol"] == 1


def test_offsets_and_numbers_that_are_none_end_in_an_error_and_no_stream_goes_on(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        for number, value in enumerate(NUMBERS, 2):
            for method, field in (("READ_LOGS", "offset"), ("SUBSCRIBE_EVENTS", "since")):
                params: dict[str, Any] = {"container_id": "canary.bird", field: value}
                error = peer.ask(method, number, **params)[2]
                assert (error["code"], error["path"]) == ("bad_input", f"$.{field}"), (method, value, error)


RAW = {
    "not a number": b"\x81\xa6memory\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    "an infinity": b"\x81\xa6memory\xca\x7f\x80\x00\x00",
    "a timestamp": b"\x81\xa6memory\xd6\xff\x00\x00\x00\x00",
    "an extension": b"\x81\xa6memory\xc7\x01\x05x",
    "the same key twice": b"\x82\xa6memory\x01\xa6memory\x02",
    "text that is not UTF-8": b"\x81\xa6memory\xa2\xff\xfe",
    "a lone surrogate": b"\x81\xa6memory\xa3\xed\xa0\x80",
}


def test_values_that_no_request_may_hold_are_named_by_their_path_as_well(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        for number, (name, value) in enumerate(RAW.items()):
            body = b"\x94\x00" + bytes([number]) + b"\xacLAUNCH_GROUP\x91\x81\xa5group\x81\xa9resources" + value
            peer.sock.sendall(len(body).to_bytes(4, "big") + body)
            answer = peer.receive()
            assert (answer[1], answer[2]["code"], answer[2]["path"]) == (number, "bad_input", "$.resources.memory"), (name, answer)


def test_quantities_are_exact_whatever_the_unit(siege: Any, dial: Any) -> None:
    """The control of the refusals: the same values where they are whole numbers of what counts."""
    same = {"cpus": [0.5, "0.5", "500m", "0.500"], "memory": [2**26, "64MiB", "0.0625GiB", "67108864", "67108.864kB", "65536 KiB"]}
    with siege(), dial() as peer:
        for field, values in same.items():
            plans = [peer.ask("PLAN_GROUP", group=pod(resources={field: value}))[3] for value in values]
            assert plans[0] is not None
            assert all(plan == plans[0] for plan in plans), field
            assert plans[0] != peer.ask("PLAN_GROUP", group=pod())[3]
