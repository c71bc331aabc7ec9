"""Clients that dawdle, fall silent or stop reading: each is given up after what the manual says, and the others are served."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.one_world]

LAUNCH = [0, 1, "LAUNCH_GROUP", [{"group": {"name": "slow", "tasks": [{"name": "t", "command": "sleep 60"}]}}]]
CLAIM = (4096).to_bytes(4, "big") + b"\xdc\xff\xff" * 1000  # most of a frame, which claims thousands of millions of values
BUFFERS = 1024 * 1024  # more than two sockets and the agent's own queue hold


@pytest.mark.slow
def test_whoever_falls_silent_is_given_up_and_others_are_served_meanwhile(siege: Any, dial: Any) -> None:
    """180 clients that send a byte now and then, 20 that claim much and send no more, and one that reads no more of its
    events, all at once: the waiting is the same ten seconds."""
    with siege(lorises=180, claimers=20) as allowed, contextlib.ExitStack() as stack:
        allowed.memory = 32 * 1024
        lorises, claimers = ([stack.enter_context(dial()) for _ in range(count)] for count in (180, 20))
        subscriber = stack.enter_context(dial())
        subscriber.send(*([0, number, "SUBSCRIBE_EVENTS", [{}]] for number in range(100)))
        for claimer in claimers:
            claimer.sock.sendall(CLAIM)
        for byte in dial.framed(LAUNCH)[:15]:
            for loris in lorises:
                with contextlib.suppress(BrokenPipeError):  # given up already
                    loris.sock.sendall(bytes([byte]))
            time.sleep(0.8)
            with dial() as newcomer:
                assert newcomer.ask("PING") == [1, 1, None, {}]

        for peer in (*lorises, *claimers):
            assert [message[2]["code"] for message in peer.told()] == ["timeout"]
        ends = ends_of_streams(subscriber)
        assert ends, "nobody lagged"
        assert all(end["lagged"] and end["error"]["code"] == "timeout" for end in ends)
        assert subscriber.ask("EXPLAIN", 778, container_id="slow")[2]["code"] == "not_found"  # and the connection lives on


def ends_of_streams(peer: Any) -> list[Any]:
    """The ends of streams that are on their way to somebody who has not read for long. Up to there nothing is missing."""
    items: dict[int, int] = defaultdict(int)
    ends = []
    peer.send([0, 777, "PING", []])  # its answer comes after all that was queued
    while (message := peer.receive())[:2] != [1, 777]:
        if message[0] == 2:
            (fields,) = message[2]
            assert fields["seq"] == items[fields["stream"]]
            if fields.get("end"):
                ends.append(fields)
            items[fields["stream"]] += 1
    return ends


def test_a_subscriber_that_does_not_read_keeps_nobody_from_launching(siege: Any, dial: Any) -> None:
    pod = {"name": "after", "tasks": [{"name": "t", "command": ["true"]}]}
    with siege(), dial() as silent, dial() as peer:
        silent.send(*([0, number, "SUBSCRIBE_EVENTS", [{}]] for number in range(100)))
        for _ in range(5):
            assert peer.ask("LAUNCH_GROUP", group=pod)[2] is None
            assert peer.ask("WAIT_CONTAINER", container_id="after.t")[3]["exit"] == 0
            assert peer.ask("WAIT_CONTAINER", container_id="after")[2] is None
            assert peer.ask("REMOVE_CONTAINER", container_id="after")[2] is None


def test_a_thousand_requests_of_somebody_who_reads_no_answer_are_not_even_taken(
    siege: Any, dial: Any, rounds: Callable[[int, int], int]
) -> None:
    """In the soak it is waited for that the connection is closed, which takes half a minute."""
    plan = {"name": "big", "tasks": [{"name": f"t{number}", "command": ["true"]} for number in range(10)]}
    request = dial.framed([0, 1, "PLAN_GROUP", [{"group": plan}]])
    with siege() as allowed, dial() as peer:
        allowed.memory = 24 * 1024
        taken = fill(peer.sock, request, 1000)
        assert taken < BUFFERS < 1000 * len(dial.framed(plan)) * 10  # the answers would have been much more
        assert taken < 1000 * len(request)
        if rounds(0, 1):
            assert is_closed(peer.sock, 60)


def test_a_thousand_requests_of_somebody_who_reads_are_all_answered(siege: Any, dial: Any) -> None:
    with siege() as allowed, dial() as peer:
        allowed.memory = 24 * 1024
        peer.send(*([0, number, "PING", []] for number in range(1000)))
        assert [peer.receive()[1] for _ in range(1000)] == list(range(1000))


def fill(sock: socket.socket, request: bytes, count: int) -> int:
    """How many bytes of so many requests are taken, until none is for a second."""
    sock.settimeout(1.0)
    data = request * count
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += sock.send(data[sent : sent + 4096])
    return sent


def is_closed(sock: socket.socket, seconds: float) -> bool:
    """Whether the other side closes the connection before that, though it has said things that nobody read."""
    deadline = time.monotonic() + seconds
    sock.settimeout(1.0)
    while time.monotonic() < deadline:
        try:
            sock.send(b"\0" * 4096)
        except TimeoutError:
            continue
        except OSError:
            return True
    return False
