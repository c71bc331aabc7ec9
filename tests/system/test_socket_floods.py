"""Very many of what one of costs little: connections, waits, streams, up to the limits and over them, and back again."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.one_world]
CONNECTIONS = 256  # that the agent takes
LASTING = 1024  # waits and streams of one connection


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_more_connections_than_the_limit_are_told_so_and_room_is_made_again(siege: Any, dial: Any, world: Any) -> None:
    agent = world.agent_pid()
    with siege(connections=CONNECTIONS + 44):
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(dial()) for _ in range(CONNECTIONS + 44)]
            refused = 0
            for peer in peers:
                with contextlib.suppress(OSError):
                    peer.send([0, 1, "PING", []])
                message = peer.receive()
                if message[1] is None:
                    assert message[2]["code"] == "over_budget"
                    assert peer.told() == []
                    refused += 1
                else:
                    assert message == [1, 1, None, {}]
            assert refused == 45  # one of those that were taken is the canary connection
        until(lambda: open_files(agent) < CONNECTIONS // 2, "connections that have ended are still open")
        with dial() as peer:
            assert peer.ask("PING") == [1, 1, None, {}]


def test_connections_that_come_and_go_leave_nothing(siege: Any, dial: Any, rounds: Callable[[int, int], int]) -> None:
    count = rounds(500, 10_000)
    with siege(connections=count) as allowed:
        allowed.memory = 4 * 1024
        for number in range(count):
            with dial() as peer:
                if number % 3:
                    peer.send([0, 1, "PING", []])
                if number % 2:
                    peer.receive() if number % 3 else None


def test_without_descriptors_newcomers_are_turned_away_and_what_is_there_goes_on(siege: Any, dial: Any, world: Any) -> None:
    agent = world.agent_pid()
    usual = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    with siege(), dial() as old:
        assert old.ask("PING", 1) == [1, 1, None, {}]
        used = max(int(fd) for fd in os.listdir(f"/proc/{agent}/fd")) + 1
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (used + 8, usual[1]))
        try:
            with contextlib.ExitStack() as stack:
                flood = [stack.enter_context(dial()) for _ in range(100)]  # the rest waits in the socket's queue
                turned_away = sum(is_turned_away(peer) for peer in flood[:60])
                assert turned_away
                assert old.ask("PING", 2) == [1, 2, None, {}]
        finally:
            resource.prlimit(agent, resource.RLIMIT_NOFILE, usual)
        with dial() as peer:
            assert peer.ask("PING") == [1, 1, None, {}]


def is_turned_away(peer: Any) -> bool:
    """Whether this connection is closed without a word; one that waits to be taken is neither."""
    peer.sock.settimeout(0.05)
    try:
        peer.send([0, 1, "PING", []])
        return peer.receive() is None
    except TimeoutError:
        return False
    except OSError:
        return True


def test_waits_and_streams_of_one_connection_have_a_limit_and_end_with_it(siege: Any, dial: Any) -> None:
    with siege(waits=LASTING) as allowed, dial() as peer:
        allowed.memory = 48 * 1024
        peer.send(*([0, number, "WAIT_CONTAINER", [{"container_id": "canary"}]] for number in range(LASTING + 10)))
        refused = [peer.receive() for _ in range(10)]
        assert {(message[1] >= LASTING, message[2]["code"]) for message in refused} == {(True, "over_budget")}
        assert peer.ask("PING", 9999) == [1, 9999, None, {}]
        peer.send(*([2, "CANCEL", [{"id": number}]] for number in range(10)))
        assert {peer.receive()[2]["code"] for _ in range(10)} == {"conflict"}
        peer.send([0, 5000, "WAIT_CONTAINER", [{"container_id": "canary"}]])
        assert peer.ask("PING", 9999) == [1, 9999, None, {}]  # and nothing about 5000: there is room again
