"""Bytes that are no message, or half of one, or one that claims to be enormous, at the agent itself."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

pytestmark = [pytest.mark.system, pytest.mark.one_world]

LARGEST = 256 * 1024  # bytes of a frame
LAUNCH = [0, 1, "LAUNCH_GROUP", [{"group": {"name": "half", "tasks": [{"name": "t", "command": "sleep 60"}]}}]]


def raw(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def request(value: bytes) -> bytes:
    """A launch whose group is this value."""
    return raw(b"\x94\x00\x01\xacLAUNCH_GROUP\x91\x81\xa5group" + value)


BOMBS: dict[str, tuple[bytes, str]] = {
    "a length of 0": (raw(b""), "bad_frame"),
    "a length over the limit by 1": (struct.pack(">I", LARGEST + 1), "too_large"),
    "a length of 4 GiB": (b"\xff\xff\xff\xff", "too_large"),
    "a length of 8 bytes": (struct.pack(">Q", 2**63), "too_large"),
    "another protocol": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "too_large"),
    "33 levels": (request(b"\x91" * 30 + b"\x90"), "too_large"),
    "1,024 levels, which decoders take": (request(b"\x91" * 1024), "too_large"),
    "1,025 levels": (request(b"\x91" * 1025), "too_large"),
    "100,000 levels": (request(b"\x91" * 100_000), "too_large"),
    "an array of 4 billion": (request(b"\xdd\xff\xff\xff\xff"), "bad_frame"),
    "a map of 4 billion": (request(b"\xdf\xff\xff\xff\xff"), "bad_frame"),
    "4 GiB of bytes": (request(b"\xc6\xff\xff\xff\xff"), "bad_frame"),
    "4 GiB of text": (request(b"\xdb\xff\xff\xff\xff"), "bad_frame"),
    "a thousand arrays of 65,535 in one another": (request(b"\xdc\xff\xff" * 1000), "bad_frame"),
    "more items than allowed by 1": (request(b"\xdc\x4e\x20" + b"\x01" * 20_000), "too_large"),
    "260,000 empty arrays": (request(b"\xdd\x00\x03\xf7\xa0" + b"\x90" * 260_000), "too_large"),
    "bytes after the message": (raw(b"\x90\x90"), "bad_frame"),
    "a byte that nobody uses": (raw(b"\xc1"), "bad_frame"),
    "an answer": (raw(msgpack.packb([1, 1, None, {}])), "bad_frame"),
}


def test_what_is_no_decent_frame_is_refused_with_its_code_and_the_connection_closed(
    siege: Any, dial: Any, rounds: Callable[[int, int], int]
) -> None:
    with siege(bombs=len(BOMBS)):
        for _ in range(rounds(1, 100)):
            for name, (data, code) in BOMBS.items():
                with dial() as peer:
                    peer.sock.sendall(data)
                    ((kind, number, error, result),) = peer.told()
                    assert (kind, number, error["code"], result) == (1, None, code, None), name
                    assert error["message"], name


def test_a_million_empty_arrays_one_frame_after_the_other_do_not_keep_others_waiting(siege: Any, dial: Any) -> None:
    bomb = request(b"\xdd\x00\x03\xf7\xa0" + b"\x90" * 260_000)
    with siege():
        for _ in range(4):
            with dial() as peer:
                peer.sock.sendall(bomb)
                assert [message[2]["code"] for message in peer.told()] == ["too_large"]


def test_a_frame_of_exactly_the_limit_is_answered_and_the_connection_lives_on(siege: Any, dial: Any) -> None:
    body = msgpack.packb([0, 1, "PING", [{"padding": ""}]])
    padding = "x" * (LARGEST - len(body) - 4)  # the length of so long a text takes five bytes and not one
    with siege(), dial() as peer:
        assert len(msgpack.packb([0, 1, "PING", [{"padding": padding}]])) == LARGEST
        assert peer.refused("PING", padding=padding)["path"] == "$.padding"
        assert peer.ask("PING", 2) == [1, 2, None, {}]


@pytest.mark.parametrize("end", ["close", "reset", "shut down"])
def test_half_a_frame_does_nothing_and_ends_with_its_sender(siege: Any, dial: Any, end: str) -> None:
    whole = raw(msgpack.packb(LAUNCH))
    with siege():
        for length in (1, 3, 4, 5, len(whole) // 2, len(whole) - 1):
            with dial() as peer:
                if end == "reset":
                    peer.send([0, 9, "PING", []])  # closing with an answer unread is a reset for the other side
                peer.sock.sendall(whole[:length])
                if end == "shut down":
                    peer.sock.shutdown(socket.SHUT_WR)
                    assert [message[2]["code"] for message in peer.told()] == ["bad_frame"]
        with dial() as peer:
            assert peer.refused("EXPLAIN", container_id="half")["code"] == "not_found"


def test_a_launch_whose_sender_is_gone_at_once_is_whole_all_the_same(siege: Any, dial: Any) -> None:
    """The control of the test before: a byte more, and it happens."""
    with siege():
        with dial() as peer:
            peer.send(LAUNCH)
        with dial() as peer:
            deadline = time.monotonic() + 60
            while peer.ask("EXPLAIN", container_id="half.t")[2] is not None:
                assert time.monotonic() < deadline
            assert peer.ask("KILL_CONTAINER", container_id="half", signal="KILL")[2] is None
            assert peer.ask("WAIT_CONTAINER", container_id="half")[2] is None
            assert peer.ask("REMOVE_CONTAINER", container_id="half")[2] is None
