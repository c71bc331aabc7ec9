"""Clients that lie, dawdle or fall silent, at the agent itself: they are refused, the others served, and nothing changes."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest

from mesocosm.kernel.testing.census import left_over

pytestmark = pytest.mark.system

FRAME_SECONDS = 10.0  # that a frame may take


def frame(message: Any) -> bytes:
    body = msgpack.packb(message)
    return struct.pack(">I", len(body)) + bytes(body)


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"tasks": [value]}
    return value


@contextmanager
def connected(world: Any) -> Iterator[socket.socket]:
    """A plain connection to the agent."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(30)
        peer.connect(str(world.run_dir / "agent.sock"))
        yield peer


def told(peer: socket.socket) -> list[Any]:
    """Every message until the agent closes the connection."""
    data = b""
    while chunk := peer.recv(65536):
        data += chunk
    messages = []
    while data:
        size = struct.unpack(">I", data[:4])[0]
        messages.append(msgpack.unpackb(data[4 : 4 + size]))
        data = data[4 + size :]
    return messages


def too_large(_: Any) -> bytes:
    return struct.pack(">I", 2**18 + 1)


def too_deep(_: Any) -> bytes:
    return frame([0, 1, "LAUNCH_GROUP", [{"group": nested(40)}]])


def too_many(_: Any) -> bytes:
    return frame([0, 1, "LAUNCH_GROUP", [{"group": {"tasks": [0] * 20_001}}]])


def no_message(_: Any) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("attack", "code"), [(too_large, "too_large"), (too_deep, "too_large"), (too_many, "too_large"), (no_message, "too_large")]
)
def test_what_is_no_decent_frame_is_refused_with_a_code_and_the_connection_closed(
    canary: Any, attack: Callable[[Any], bytes], code: str
) -> None:
    before = canary.census()
    with connected(canary.world) as peer:
        peer.sendall(attack(canary.world))

        (refusal,) = told(peer)

    assert refusal[0] == 1
    assert refusal[2]["code"] == code
    assert refusal[2]["message"]
    assert left_over(before) == []
    canary.assert_untouched()


def test_a_frame_half_sent_is_dropped_with_its_sender(canary: Any) -> None:
    before = canary.census()
    launch = frame([0, 1, "LAUNCH_GROUP", [{"group": {"name": "half", "tasks": [{"name": "t", "command": "sleep 60"}]}}]])
    with connected(canary.world) as peer:
        peer.sendall(launch[: len(launch) // 2])

    canary.assert_untouched()
    assert "half" not in canary.world.ps()
    assert left_over(before) == []


@pytest.mark.slow
def test_a_frame_that_takes_too_long_is_refused_while_others_are_served(canary: Any) -> None:
    before = canary.census()
    launch = frame([0, 1, "LAUNCH_GROUP", [{"group": {"name": "slow", "tasks": [{"name": "t", "command": "sleep 60"}]}}]])
    started = time.monotonic()
    with connected(canary.world) as peer:
        for byte in launch[:8]:
            peer.sendall(bytes([byte]))
            canary.assert_untouched()  # others are served meanwhile

        (refusal,) = told(peer)

    assert refusal[2]["code"] == "timeout"
    assert FRAME_SECONDS - 1 < time.monotonic() - started < FRAME_SECONDS + 20
    assert "slow" not in canary.world.ps()
    assert left_over(before) == []
