"""Peers that lie, dawdle, flood or fall silent. Each test ends with somebody else being served."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from mesocosm.kernel.wire.authority import Principal
from mesocosm.kernel.wire.connection import Limits
from mesocosm.kernel.wire.framing import MAX_FRAME

QUICK = Limits(frame_seconds=0.3, write_seconds=0.3, lag_seconds=0.2, queue_bytes=32 * 1024)


@asynccontextmanager
async def others_are_served(bench: Any) -> AsyncIterator[None]:
    """A second client pings all through the block and is answered each time, and so is one that comes afterwards."""
    rounds = 0

    async def canary() -> None:
        nonlocal rounds
        async with bench.peer() as peer:
            while True:
                with trio.fail_after(5):
                    assert await peer.ask("PING", rounds) == [1, rounds, None, {}]
                rounds += 1
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(canary)
        yield
        while rounds < 2:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    async with bench.peer() as peer:
        assert await peer.ask("PING") == [1, 1, None, {}]


async def closed(peer: Any) -> list[Any]:
    """What a peer is told until it is closed."""
    told = []
    with trio.fail_after(10):
        while (message := await peer.receive()) is not None:
            told.append(message)
    return told


def raw(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x00\x00\x00\x00", "bad_frame"),
        ((MAX_FRAME + 1).to_bytes(4, "big"), "too_large"),
        (b"\xff\xff\xff\xff", "too_large"),
        (b"GET / HTTP/1.1\r\n\r\n", "too_large"),
        (raw(b"\x91" * 1025), "too_large"),
        (raw(b"\x91" * 100_000), "too_large"),
        (raw(b"\xdd\xff\xff\xff\xff"), "bad_frame"),
        (raw(b"\xdb\xff\xff\xff\xff"), "bad_frame"),
        (raw(b"\xdd\x00\x03\xff\x00" + b"\x90" * 0x3FF00), "too_large"),
        (raw(b"\xc1"), "bad_frame"),
        (raw(b"\x01"), "bad_frame"),
        (raw(b"\x94\x00\x01\xa4PING\x91\x81\x01\x01"), "bad_frame"),
        (raw(b"\x94\x00\xcb" + struct.pack(">d", float("nan")) + b"\xa4PING\x91\x80"), "bad_frame"),
        (raw(b"\x94\x01\x01\xc0\x80"), "bad_frame"),
    ],
)
async def test_bytes_that_are_no_message_are_refused_with_a_code_and_closed(serving: Any, data: bytes, code: str) -> None:
    async with serving() as bench, others_are_served(bench), bench.peer() as peer:
        await peer.stream.send_all(data)
        [refusal] = await closed(peer)
        assert (refusal[0], refusal[1], refusal[2]["code"], refusal[3]) == (1, None, code, None)


async def test_a_frame_of_exactly_the_limit_is_looked_at(serving: Any, framed: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        message = [0, 1, "PING", [{"padding": ""}]]
        message[3][0]["padding"] = "x" * (MAX_FRAME + 4 - len(framed(message)) - 4)  # type: ignore[index]
        data = framed(message)
        assert len(data) == MAX_FRAME + 4
        await peer.stream.send_all(data)
        assert (await peer.receive())[2]["path"] == "$.padding"


@pytest.mark.parametrize("method", ["PING", "KILL_CONTAINER", "X"])
async def test_a_refusal_quotes_no_more_than_fits_into_a_frame(serving: Any, framed: Any, method: str) -> None:
    async with serving() as bench, bench.peer() as peer:
        await peer.send([0, 1, method, [{"k" * (MAX_FRAME - 40): 1}]])
        answer = await peer.receive()
        assert (answer[1], answer[2]["code"]) == (1, "unsupported" if method == "X" else "bad_input")
        assert len(framed(answer)) < MAX_FRAME
        assert await peer.ask("PING", 2) == [1, 2, None, {}]


@pytest.mark.parametrize("number", [[], {}, None, "1", 1.0, True, -1, 2**64 - 1])
async def test_a_cancel_of_what_is_no_number_cancels_nothing(serving: Any, until: Any, number: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        await peer.send([0, 1, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
        await peer.send([2, "CANCEL", [{"id": number}]])
        assert await peer.ask("PING", 2) == [1, 2, None, {}]
        assert bench.service.waiting == 1


async def test_a_frame_that_comes_byte_by_byte_is_given_up_and_two_hundred_of_them_too(
    serving: Any, framed: Any, until: Any
) -> None:
    async with serving(QUICK) as bench, others_are_served(bench), contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(bench.peer()) for _ in range(200)]
        data = framed([0, 1, "PING", [{}]])
        for byte in data[:5]:
            for peer in peers:
                with contextlib.suppress(trio.BrokenResourceError):
                    await peer.stream.send_all(bytes([byte]))
            await trio.sleep(0.1)
        for peer in peers:
            [refusal] = await closed(peer)
            assert refusal[2]["code"] == "timeout"
        await until(lambda: bench.server.connections <= 1)


async def test_silence_between_frames_is_fine(serving: Any) -> None:
    async with serving(QUICK) as bench, bench.peer() as peer:
        assert await peer.ask("PING", 1) == [1, 1, None, {}]
        await trio.sleep(0.6)
        assert await peer.ask("PING", 2) == [1, 2, None, {}]


@pytest.mark.parametrize("end", ["close", "shut down", "reset"])
async def test_half_a_frame_does_nothing_and_leaves_nothing(serving: Any, framed: Any, until: Any, end: str) -> None:
    async with serving() as bench, others_are_served(bench):
        async with bench.peer() as peer:
            data = framed([0, 1, "LAUNCH_GROUP", [{"group": {"name": "web", "tasks": []}}]])
            await peer.stream.send_all(data[: len(data) // 2])
            if end == "shut down":
                await peer.stream.send_eof()
                assert (await closed(peer))[0][2]["code"] == "bad_frame"
            elif end == "reset":
                peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await until(lambda: bench.server.connections <= 1)
        assert bench.service.begun == []


async def test_pipelining_without_reading_is_slowed_down_then_closed(serving: Any, framed: Any, until: Any) -> None:
    async with serving(QUICK) as bench, others_are_served(bench), bench.peer() as peer:
        request = framed([0, 1, "PLAN_GROUP", [{"group": {"name": "x" * 20_000}}]])
        sent = 0
        with trio.move_on_after(5), contextlib.suppress(trio.BrokenResourceError):
            for _ in range(1000):
                await peer.stream.send_all(request)
                sent += 1
        assert sent < 200  # the sockets' own buffers and the queue; the rest was never read
        await until(lambda: bench.server.connections == 1)


async def test_more_calls_than_the_bound_wait_their_turn_and_all_are_answered(serving: Any, until: Any) -> None:
    async with serving(Limits(calls=4)) as bench, bench.peer() as peer:
        for number in range(10):
            await peer.send([0, number, "LAUNCH_GROUP", [{"group": {"name": "slow", "tasks": []}}]])
        await until(lambda: len(bench.service.begun) == 4)
        await trio.sleep(0.05)
        assert len(bench.service.begun) == 4
        bench.service.gate.set()
        assert {(await peer.receive())[1] for _ in range(10)} == set(range(10))


async def test_more_waits_than_the_bound_are_refused_and_a_kill_still_gets_through(serving: Any) -> None:
    async with serving(Limits(lasting=3)) as bench, bench.peer() as peer:
        for number in range(4):
            await peer.send([0, number, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
        refusal = await peer.receive()
        assert (refusal[1], refusal[2]["code"]) == (3, "over_budget")
        assert (await peer.ask("KILL_CONTAINER", 9, container_id="web")) == [1, 9, None, {}]


async def test_a_subscriber_that_stops_reading_is_told_that_it_lagged_and_the_source_is_let_go(serving: Any, until: Any) -> None:
    async with serving(Limits(lag_seconds=0.2, queue_bytes=32 * 1024)) as bench, others_are_served(bench), bench.peer() as peer:
        assert (await peer.ask("SUBSCRIBE_EVENTS", 1, container_id="flood"))[3] == {"stream": 1}
        await until(lambda: bench.service.streaming == 1)
        await until(lambda: bench.service.streaming == 0)
        seen = 0
        while not (fields := (await peer.receive())[2][0]).get("end"):
            assert fields["seq"] == seen
            seen += 1
        assert fields["lagged"]
        assert fields["error"]["code"] == "timeout"
        assert await peer.ask("PING", 2) == [1, 2, None, {}]  # the connection itself lives on


async def test_a_reader_of_logs_may_pause_for_as_long_as_it_likes(serving: Any) -> None:
    async with serving(QUICK) as bench, bench.peer() as peer:
        await peer.ask("READ_LOGS", 1, container_id="big")
        await trio.sleep(1)
        received = 0
        while not (fields := (await peer.receive())[2][0]).get("end"):
            received += len(fields["part"])
        assert received > 600_000
        assert "error" not in fields


async def test_descriptors_sent_along_are_closed_by_the_kernel_and_so_is_the_connection(
    serving: Any, framed: Any, open_fds: Callable[[], int]
) -> None:
    async with serving() as bench, others_are_served(bench):
        before = open_fds()
        for count in (1, 253):
            read, write = os.pipe()
            async with bench.peer() as peer:
                fds = struct.pack(f"{count}i", *[write] * count)
                sock = peer.stream.socket
                await sock.sendmsg([framed([0, 1, "PING", [{}]])], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
                [refusal] = await closed(peer)
                assert refusal[2]["code"] == "bad_frame"
            os.close(write)
            with trio.fail_after(5):
                await trio.lowlevel.wait_readable(read)
            assert os.read(read, 1) == b""  # end of file: nobody holds the other end any more
            os.close(read)
        await trio.sleep(0.05)
        assert open_fds() <= before + 2


async def test_the_last_connection_too_many_is_told_so(serving: Any, until: Any) -> None:
    async with serving(Limits(connections=2)) as bench:
        async with bench.peer() as one, bench.peer() as two:
            await one.ask("PING")
            await two.ask("PING")
            async with bench.peer() as three:
                assert [message[2]["code"] for message in await closed(three)] == ["over_budget"]
            assert (await one.ask("PING", 5))[1] == 5
        await until(lambda: bench.server.connections == 0)
        async with bench.peer() as again:
            assert await again.ask("PING") == [1, 1, None, {}]


async def test_peers_that_may_do_nothing_cannot_keep_others_out(serving: Any, until: Any) -> None:
    asked = iter(["container"] * 6 + ["host"] * 3)

    def identify(*_: Any) -> Principal:
        return Principal(next(asked), os.geteuid(), 0, 1, "web.db")  # type: ignore[arg-type]

    async with serving(Limits(connections=2, strangers=4), identify=identify) as bench, contextlib.AsyncExitStack() as stack:
        hogs = [await stack.enter_async_context(bench.peer()) for _ in range(6)]
        for hog in hogs[4:]:
            assert [message[2]["code"] for message in await closed(hog)] == ["over_budget"]
        assert (await hogs[0].ask("PING"))[2]["code"] == "denied"
        for number in range(2):
            assert await (await stack.enter_async_context(bench.peer())).ask("PING", number) == [1, number, None, {}]
        assert [message[2]["code"] for message in await closed(await stack.enter_async_context(bench.peer()))] == ["over_budget"]
        for hog in hogs:
            await hog.stream.aclose()
        await until(lambda: bench.server.connections == 2)


async def test_whoever_cannot_be_identified_because_of_a_bug_may_do_nothing(serving: Any, caplog: Any) -> None:
    def identify(*_: Any) -> Principal:
        raise ZeroDivisionError("a bug")

    async with serving(identify=identify) as bench:
        for _ in range(2):  # the second shows that the server is still there
            async with bench.peer() as peer:
                assert (await peer.ask("PING"))[2]["code"] == "denied"
    assert "a bug" in caplog.text


async def test_connections_that_come_and_go_leave_no_descriptor(serving: Any, until: Any, open_fds: Callable[[], int]) -> None:
    async with serving() as bench:
        before = open_fds()
        for _ in range(100):
            async with bench.peer() as peer:
                await peer.ask("PING")
        await until(lambda: bench.server.connections == 0)
        assert open_fds() == before


async def test_a_bad_frame_hurts_only_its_own_connection(serving: Any, until: Any) -> None:
    async with serving() as bench, bench.peer() as good, bench.peer() as bad:
        await good.send([0, 1, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
        await bad.send([0, 1, "LAUNCH_GROUP", [{"group": {"name": "slow", "tasks": []}}]])
        await until(lambda: bench.service.waiting == 1 and bench.service.begun)
        await bad.stream.send_all(b"\xff\xff\xff\xff")
        await closed(bad)
        bench.service.gate.set()
        assert (await good.receive())[1:3] == [1, None]
        await until(lambda: bench.service.finished == ["slow"])
