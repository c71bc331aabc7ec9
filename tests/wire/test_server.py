"""The server with well-behaved clients: what each method is answered, and what goes on when its caller goes away."""

from __future__ import annotations

import os
from typing import Any

import msgpack
import trio

from mesocosm.kernel.wire.authority import Access, Principal
from mesocosm.kernel.wire.connection import Limits


async def test_every_call_reaches_the_service_and_its_answer_the_caller(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert await peer.ask("PING") == [1, 1, None, {}]
        assert await peer.ask("GET_VERSION", 2) == [1, 2, None, {"version": "9.9", "protocol": 1, "features": []}]
        assert (await peer.ask("PLAN_GROUP", 3, group={"name": "web"}))[3]["group"] == "web"
        assert (await peer.ask("LAUNCH_GROUP", 4, group={"name": "web", "tasks": []}))[3]["containers"] == ["web", "web.db"]
        assert (await peer.ask("LAUNCH_NESTED_GROUP", 5, container_id="web", tasks=[{"name": "x"}]))[3]["containers"] == ["web.x"]
        answer = await peer.ask("LAUNCH_CONTAINER", 6, container_id="one", command=["true"], env={"A": "1"})
        assert answer == [1, 6, None, {"id": "one", "command": ["true"]}]
        assert (await peer.ask("WAIT_CONTAINER", 7, container_id="web"))[3]["exit"] == 0
        assert await peer.ask("KILL_CONTAINER", 8, container_id="web", signal="HUP") == [1, 8, None, {}]
        assert await peer.ask("REMOVE_NESTED_CONTAINER", 9, container_id="web.x") == [1, 9, None, {}]
        assert (await peer.ask("GET_CONTAINERS", 10))[3]["containers"] == [bench.service.line]
        assert await peer.ask("GET_PLUGINS", 11) == [1, 11, None, {"plugins": []}]
        assert bench.service.finished == ["web", "kill web HUP", "remove web.x"]


async def test_an_error_says_what_the_service_said_and_hurts_no_other_request(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert await peer.ask("KILL_CONTAINER", 1, container_id="nobody") == [
            1, 1, {"code": "not_found", "message": "no container 'nobody'", "id": "nobody"}, None,
        ]  # fmt: skip
        assert (await peer.ask("LAUNCH_GROUP", 2, group={"name": "x"}))[2]["path"] == "$.tasks"
        assert (await peer.ask("FORMAT_DISK", 3))[2]["code"] == "unsupported"
        assert (await peer.ask("KILL_CONTAINER", 4, container_id=["web"]))[2]["path"] == "$.container_id"
        memory = {"memory": float("nan")}
        answer = await peer.ask("LAUNCH_GROUP", 5, group={"name": "x", "tasks": [{"resources": memory}]})
        assert (answer[1], answer[2]["code"], answer[2]["path"]) == (5, "bad_input", "$.tasks[0].resources.memory")
        assert await peer.ask("PING", 6) == [1, 6, None, {}]


async def test_a_bug_of_the_service_is_an_internal_error_of_one_request(serving: Any, caplog: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert (await peer.ask("KILL_CONTAINER", 1, container_id="bug"))[2]["code"] == "internal"
        assert "a bug" in caplog.text
        assert (await peer.ask("EXPLAIN", 2, container_id="web"))[2]["code"] == "internal"
        assert (await peer.ask("KILL_CONTAINER", 3, container_id="group"))[2]["code"] == "not_found"
        assert await peer.ask("PING", 4) == [1, 4, None, {}]


async def test_requests_of_one_connection_do_not_wait_for_each_other(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        await peer.send([0, 1, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
        await peer.send([0, 2, "LAUNCH_GROUP", [{"group": {"name": "slow", "tasks": []}}]])
        assert await peer.ask("PING", 3) == [1, 3, None, {}]
        bench.service.gate.set()
        assert {(await peer.receive())[1], (await peer.receive())[1]} == {1, 2}


async def test_a_number_in_flight_is_not_taken_twice(serving: Any, until: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        await peer.send([0, 1, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
        assert (await peer.ask("WAIT_CONTAINER", 1, container_id="web"))[2]["code"] == "conflict"
        await until(lambda: bench.service.waiting == 1)


async def test_a_launch_goes_on_when_its_caller_goes_away_and_a_wait_does_not(serving: Any, until: Any) -> None:
    async with serving() as bench:
        async with bench.peer() as peer:
            await peer.send([0, 1, "LAUNCH_GROUP", [{"group": {"name": "slow", "tasks": []}}]])
            await peer.send([0, 2, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
            await peer.send([0, 3, "SUBSCRIBE_EVENTS", [{"container_id": "web"}]])
            await until(lambda: bench.service.begun and bench.service.waiting and bench.service.streaming)
        await until(lambda: bench.service.waiting == bench.service.streaming == bench.server.connections == 0)
        assert bench.service.finished == []
        bench.service.gate.set()
        await until(lambda: bench.service.finished == ["slow"])


async def test_a_stream_is_numbered_and_ends_with_its_byte_count(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert await peer.ask("READ_LOGS", 1, container_id="web.db", offset=5) == [1, 1, None, {"stream": 1}]
        first, second, end = [await peer.receive() for _ in range(3)]
        assert first == [2, "STREAM", [{"stream": 1, "seq": 0, "item": {"offset": 5, "data": b"hello\n"}}]]
        assert second[2][0]["seq"] == 1
        assert end == [
            2,
            "STREAM",
            [{"stream": 1, "seq": 2, "end": True, "bytes": sum(len(msgpack.packb(x)) for x in (first, second))}],
        ]


async def test_an_item_too_long_for_a_frame_comes_in_parts(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert await peer.ask("READ_LOGS", 1, container_id="big") == [1, 1, None, {"stream": 1}]
        parts = []
        while not (fields := (await peer.receive())[2][0]).get("end"):
            assert fields["seq"] == len(parts)
            parts.append(fields["part"])
        assert msgpack.unpackb(b"".join(parts)) == {"offset": 0, "data": b"z" * 600_000}


async def test_an_answer_too_long_for_a_frame_comes_as_a_stream_of_one_item(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert await peer.ask("GET_CONTAINERS", 1, all=True) == [1, 1, None, {"$stream": 1}]
        packed = b""
        while not (fields := (await peer.receive())[2][0]).get("end"):
            packed += fields["part"]
        assert len(msgpack.unpackb(packed)["containers"]) == 20_000
    async with serving(Limits(answer_bytes=500_000)) as bench, bench.peer() as peer:
        assert (await peer.ask("GET_CONTAINERS", 1, all=True))[2]["code"] == "too_large"


async def test_a_stream_that_fails_says_why_in_its_end(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert await peer.ask("READ_LOGS", 1, container_id="nobody") == [1, 1, None, {"stream": 1}]
        end = (await peer.receive())[2][0]
        assert (end["end"], end["bytes"], end["error"]["code"]) == (True, 0, "not_found")


async def test_a_wait_and_a_stream_can_be_cancelled(serving: Any, until: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        await peer.send([0, 1, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
        await until(lambda: bench.service.waiting == 1)
        await peer.send([2, "CANCEL", [{"id": 1}]], [2, "CANCEL", [{"id": 77}]], [2, "CANCEL", []], [2, "HELLO", [{}]])
        assert (await peer.receive())[:2] == [1, 1]
        assert bench.service.waiting == 0
        assert await peer.ask("READ_LOGS", 2, container_id="web", follow=True) == [1, 2, None, {"stream": 1}]
        await peer.send([2, "CANCEL", [{"id": 2}]])
        while not (fields := (await peer.receive())[2][0]).get("end"):
            pass
        assert fields["error"]["code"] == "conflict"


async def test_a_run_is_a_launch_whose_answer_is_a_stream_of_lines(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        answer = await peer.ask("LAUNCH_GROUP", 1, group={"name": "web", "tasks": []}, stream=True)
        assert answer == [1, 1, None, {"stream": 1}]
        assert [(await peer.receive())[2][0]["item"]["type"] for _ in range(2)] == ["planned", "end"]
        assert (await peer.receive())[2][0]["end"]


async def test_a_stop_is_answered_before_the_agent_hears_that_it_may_go(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        assert not bench.server.stopped.is_set()
        assert await peer.ask("STOP_AGENT", 1) == [1, 1, None, {}]
        with trio.fail_after(5):
            await bench.server.stopped.wait()
        assert bench.service.finished == ["stop"]


async def test_a_server_says_since_when_nobody_uses_it(serving: Any, until: Any) -> None:
    async with serving() as bench:
        since = bench.server.idle_since
        assert since is not None
        async with bench.peer() as peer:
            await peer.ask("PING")
            assert bench.server.idle_since is None
        await until(lambda: bench.server.idle_since is not None)
        assert bench.server.idle_since > since


async def test_a_peer_without_rights_is_denied_everything_and_logged_once(serving: Any, caplog: Any) -> None:
    container = Principal("container", 0, 0, 42, "web.db")
    async with serving(identify=lambda *_: container) as bench, bench.peer() as peer:
        for number, method in enumerate(["PING", "GET_VERSION", "LAUNCH_GROUP", "NO_SUCH_METHOD", "SUBSCRIBE_EVENTS"]):
            assert (await peer.ask(method, number, nonsense=1))[2]["code"] == "denied"
        assert bench.service.begun == []
    assert caplog.text.count("container web.db (uid 0, pid 42)") == 1


async def test_who_may_look_may_not_touch(serving: Any) -> None:
    async with serving(identify=lambda *_: Principal("host", 3000, 3000, 1)) as bench:
        bench.server.access = Access(agent=os.geteuid(), read=frozenset({3000}))
        async with bench.peer() as peer:
            assert (await peer.ask("PING"))[2] is None
            assert (await peer.ask("KILL_CONTAINER", container_id="web"))[2]["code"] == "denied"
            assert (await peer.ask("LAUNCH_GROUP", group={"name": "x"}, stream=True))[2]["code"] == "denied"


async def test_what_needs_no_waiting_is_answered_before_the_next_frame_is_looked_at(serving: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        await peer.send([0, 1, "WAIT_CONTAINER", [{"container_id": "web.db"}]])
        await peer.send([0, 2, "WAIT_CONTAINER", [{"container_id": "ended"}]])
        await peer.send([0, 3, "REMOVE_CONTAINER", [{"container_id": "ended"}]])
        await peer.send([0, 4, "REMOVE_CONTAINER", [{"container_id": "alive"}]])
        await peer.send([0, 5, "REMOVE_CONTAINER", [{"container_id": "busy"}]])
        answers = [await peer.receive() for _ in range(4)]
        assert answers[:2] == [[1, 2, None, {"id": "ended", "exit": 0}], [1, 3, None, {}]]
        assert (answers[2][1], answers[2][2]["code"]) == (4, "conflict")
        assert answers[3] == [1, 5, None, {}]
        assert bench.service.finished == ["remove ended at once", "remove busy"]


async def test_a_read_that_is_full_to_the_last_byte_is_answered_and_what_comes_later_too(serving: Any, framed: Any) -> None:
    async with serving() as bench, bench.peer() as peer:
        pings = [framed([0, number, "PING", []]) for number in range(100, 200)]
        rest = 64 * 1024 - sum(map(len, pings))
        name = "X" * (rest - len(framed([0, 200, "X" * 40_000, []])) + 40_000)
        last = framed([0, 200, name, []])
        assert sum(map(len, pings)) + len(last) == 64 * 1024
        await peer.stream.send_all(b"".join([*pings, last]))
        answers = [await peer.receive() for _ in range(101)]
        assert [answer[1] for answer in answers] == list(range(100, 201))
        assert answers[-1][2]["code"] == "unsupported"
        assert await peer.ask("PING", 1) == [1, 1, None, {}]
