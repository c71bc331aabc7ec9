"""The synchronous client against a real server, and against one that breaks off, lies or is silent."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mesocosm.kernel import client as module
from mesocosm.kernel.client import Client, RemoteError, connect, default_socket
from mesocosm.kernel.wire.connection import Connection, Limits


async def in_thread(work: Callable[[], Any]) -> Any:
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


async def test_every_verb_gives_what_the_agent_answers(serving: Any) -> None:
    async with serving() as bench:

        def work() -> None:
            with connect(bench.path) as client:
                client.ping()
                assert client.version() == {"version": "9.9", "protocol": 1, "features": []}
                assert client.plan_group({"name": "web"})["group"] == "web"
                assert client.launch_group({"name": "web", "tasks": []})["state"] == "RUNNING"
                assert [line["type"] for line in client.run_group({"name": "web", "tasks": []})] == ["planned", "end"]
                assert client.launch_nested_group("web", [{"name": "x"}])["containers"] == ["web.x"]
                assert client.launch_container("one", ["true"], env={"A": "1"})["id"] == "one"
                assert client.wait("web")["exit"] == 0
                client.kill("web", "HUP")
                client.kill("web")
                client.remove("web")
                assert client.containers() == [bench.service.line]
                assert client.plugins() == []
                assert list(client.logs("web.db", offset=3)) == [(3, b"hello\n"), (9, b"world\n")]
                client.stop_agent()

        await in_thread(work)
        assert bench.service.finished == ["web", "kill web HUP", "kill web None", "remove web", "stop"]


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[socket.socket]:
    """A listener in front of which one waits already, which is all that it has room for."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "crowded.sock"))
        listener.listen(0)
        first.connect(listener.getsockname())
        yield listener


async def test_where_many_wait_to_be_taken_a_client_waits_its_turn(crowded: socket.socket) -> None:
    served = trio.Event()

    async def dial() -> None:
        await in_thread(lambda: module.dial(crowded.getsockname(), 20.0).close())
        served.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dial)
        await trio.testing.wait_all_tasks_blocked()
        assert not served.is_set()
        (await trio.to_thread.run_sync(crowded.accept))[0].close()
        with trio.fail_after(20):
            await served.wait()


def test_who_is_not_taken_in_time_is_told_so_and_not_that_nobody_is_there(crowded: socket.socket) -> None:
    with pytest.raises(RemoteError) as caught:
        connect(crowded.getsockname(), timeout=0.05)

    assert caught.value.code == "timeout"


async def test_what_is_too_long_for_a_frame_arrives_whole(serving: Any) -> None:
    async with serving() as bench:

        def work() -> None:
            with connect(bench.path) as client:
                assert len(client.containers(all=True)) == 20_000
                assert list(client.logs("big")) == [(0, b"z" * 600_000)]
                client.ping()

        await in_thread(work)


async def test_an_error_keeps_every_field(serving: Any) -> None:
    async with serving() as bench:

        def work() -> None:
            with connect(bench.path) as client:
                with pytest.raises(RemoteError) as caught:
                    client.kill("nobody")
                assert caught.value.error == {"code": "not_found", "message": "no container 'nobody'", "id": "nobody"}
                with pytest.raises(RemoteError) as caught:
                    list(client.logs("nobody"))
                assert caught.value.code == "not_found"
                with pytest.raises(RemoteError) as caught:
                    client.launch_group({"name": "x", "tasks": [{"resources": {"cpus": float("inf")}}]})
                assert caught.value.error["path"] == "$.tasks[0].resources.cpus"
                client.ping()

        await in_thread(work)


async def test_streams_and_calls_share_a_connection(serving: Any) -> None:
    async with serving() as bench:

        def work() -> None:
            with connect(bench.path) as client:
                events = client.events(container_id="web")
                logs = client.logs("web.db")
                client.ping()
                assert next(logs) == (0, b"hello\n")
                assert [next(events)["seq"] for _ in range(3)] == [1, 2, 3]
                with pytest.raises(TimeoutError):
                    events.next(timeout=0.05)
                client.ping()
                assert next(logs) == (6, b"world\n")
                events.close()
                assert list(events) == []
                client.ping()

        await in_thread(work)


async def test_a_wait_may_have_a_deadline_and_the_connection_lives_on(serving: Any, until: Any) -> None:
    async with serving() as bench:

        def work() -> None:
            with connect(bench.path) as client:
                with pytest.raises(RemoteError) as caught:
                    client.wait("web.db", timeout=0.1)
                assert caught.value.code == "timeout"
                client.ping()

        await in_thread(work)
        await until(lambda: bench.service.waiting == 0)


async def test_an_answer_that_does_not_come_is_an_unknown_outcome(serving: Any) -> None:
    async with serving() as bench:

        def work() -> None:
            with connect(bench.path, timeout=0.1) as client, pytest.raises(RemoteError) as caught:
                client.launch_group({"name": "slow", "tasks": []})
            assert caught.value.code == "unknown_outcome"

        await in_thread(work)


async def test_a_request_too_long_for_a_frame_is_refused_here(serving: Any) -> None:
    async with serving() as bench:

        def work() -> None:
            with connect(bench.path) as client:
                with pytest.raises(RemoteError) as caught:
                    client.plan_group({"name": "x" * 300_000})
                assert caught.value.code == "too_large"
                with pytest.raises(RemoteError) as caught:
                    client.plan_group({"name": object()})
                assert caught.value.code == "bad_input"
                client.ping()

        await in_thread(work)


def test_no_agent_is_an_agent_gone_that_names_the_socket(tmp_path: Path) -> None:
    for prepare in (lambda: None, (tmp_path / "s").touch):
        prepare()
        with pytest.raises(RemoteError) as caught:
            connect(tmp_path / "s")
        assert caught.value.code == "agent_gone"
        assert caught.value.error["target"] == str(tmp_path / "s")


def test_a_path_longer_than_an_address_is_no_problem(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 50] * 4)
    deep.mkdir(parents=True)
    directory = os.open(deep, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{directory}/s")
        listener.listen()
        connect(deep / "s").close()
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(1) == b""  # it was we, and we have gone again
    os.close(directory)


def talk(tmp_path: Path, *answers: bytes) -> Client:
    """A client of a server that reads once per answer, says that, and leaves."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as peer:
            for answer in answers:
                peer.recv(65536)
                peer.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return connect(tmp_path / "s", timeout=5, reconnect=0)


def stream_of(framed: Any, *fields: dict[str, Any]) -> bytes:
    return b"".join([framed([1, 1, None, {"stream": 4}]), *(framed([2, "STREAM", [{"stream": 4, **one}]]) for one in fields)])


ITEM = {"seq": 0, "item": "x"}
LENGTH = len(b"\x93\x02\xa6STREAM\x91\x83\xa6stream\x04\xa3seq\x00\xa4item\xa1x")


def test_a_stream_that_ends_as_it_should_is_whole(tmp_path: Path, framed: Any) -> None:
    with talk(tmp_path, stream_of(framed, ITEM, {"seq": 1, "end": True, "bytes": LENGTH})) as client:
        assert list(client.stream("READ_LOGS")) == ["x"]


@pytest.mark.parametrize(
    "fields",
    [
        [ITEM],
        [ITEM, {"seq": 2, "end": True, "bytes": LENGTH}],
        [ITEM, {"seq": 1, "end": True, "bytes": LENGTH + 1}],
        [{"seq": 1, "item": "x"}],
        [ITEM, {"seq": 1, "part": b"\x93"}, {"seq": 2, "end": True, "bytes": LENGTH + 38}],
    ],
)
def test_a_stream_that_was_cut_is_an_error_and_never_an_end(tmp_path: Path, framed: Any, fields: list[dict[str, Any]]) -> None:
    with talk(tmp_path, stream_of(framed, *fields)) as client, pytest.raises(RemoteError) as caught:
        list(client.stream("READ_LOGS"))
    assert caught.value.code == "agent_gone"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "agent_gone"),
        (b"\x00\x00\x00\x09\x94", "agent_gone"),
        (b"\xff\xff\xff\xff", "bad_frame"),
        (b"\x00\x00\x00\x00", "bad_frame"),
        (b"\x00\x00\x00\x01\x07", "bad_frame"),
        (b"\x00\x00\x00\x02\x94\x01", "bad_frame"),
        (b"\x00\x00\x00\x0c\x94\x01\xc0\x81\xa4code\xa1x\xc0", "x"),
    ],
)
def test_what_is_no_answer_is_an_error(tmp_path: Path, answer: bytes, code: str) -> None:
    with talk(tmp_path, answer) as client:
        with pytest.raises(RemoteError) as caught:
            client.ping()
        assert caught.value.code == code
        with pytest.raises(RemoteError):
            client.ping()


async def test_the_reason_of_a_closed_connection_is_told(serving: Any) -> None:
    async with serving(Limits(connections=0)) as bench:

        def work() -> None:
            with connect(bench.path) as client, pytest.raises(RemoteError) as caught:
                client.ping()
            assert caught.value.code == "over_budget"

        await in_thread(work)


async def test_a_bug_in_the_server_ends_one_connection_and_not_the_server(serving: Any, caplog: Any, monkeypatch: Any) -> None:
    async def broken(*_: object) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Connection, "run", broken)
    async with serving() as bench:

        def work() -> None:
            for _ in range(2):
                with connect(bench.path, reconnect=0) as client, pytest.raises(RemoteError) as caught:
                    client.ping()
                assert caught.value.code == "agent_gone"

        await in_thread(work)
    assert "a bug" in caplog.text


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MESOCOSM_SOCKET": "/a/b.sock", "MESOCOSM_RUN_DIR": "/c"}, "/a/b.sock"),
        ({"MESOCOSM_RUN_DIR": "/c"}, "/c/agent.sock"),
    ],
)
def test_the_socket_is_where_the_environment_says(monkeypatch: Any, environment: dict[str, str], expected: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_socket() == expected


def test_the_socket_of_root_and_of_a_user(monkeypatch: Any, tmp_path: Path) -> None:
    for name in ("MESOCOSM_SOCKET", "MESOCOSM_RUN_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    ours = os.geteuid()
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    assert default_socket() == "/run/mesocosm/agent.sock"
    user = ours + 54321
    monkeypatch.setattr(module.os, "geteuid", lambda: user)
    assert default_socket() == f"/tmp/mesocosm-{user}/agent.sock"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # somebody else's
    assert default_socket() == f"/tmp/mesocosm-{user}/agent.sock"
    if ours == 0:
        os.chown(tmp_path, user, -1)
    else:
        monkeypatch.setattr(module.os, "geteuid", lambda: ours)
    assert default_socket() == f"{tmp_path}/mesocosm/agent.sock"


def test_the_files_work_alone_and_load_next_to_nothing(tmp_path: Path) -> None:
    assert module.__file__ is not None
    (tmp_path / "alone").mkdir()
    for name in ("client", "dialling", "exchange", "resuming"):
        shutil.copy(Path(module.__file__).with_name(f"{name}.py"), tmp_path / "alone")
    script = (
        "import sys; before = set(sys.modules); import alone.client; new = set(sys.modules) - before; "
        "assert not new & {'msgpack', 'socket', 'selectors', 'select', 'trio', 'msgspec', 'struct'}, new; "
        "assert not [name for name in new if name.startswith('mesocosm')], new; "
        "from alone.client import connect, RemoteError\n"
        "try: connect('/nowhere/agent.sock')\n"
        "except RemoteError as error: assert error.code == 'agent_gone'"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"]})


async def test_the_trio_client_calls_and_streams_beside_each_other(serving: Any, until: Any) -> None:
    async with serving() as bench, module.open(bench.path) as client:
        results: list[Any] = []

        async def call(method: str, **params: Any) -> None:
            results.append(await client.call(method, **params))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(call, "WAIT_CONTAINER", container_id="web.db"))
            await until(lambda: bench.service.waiting == 1)
            for _ in range(20):
                nursery.start_soon(partial(call, "PING"))
            assert [line["type"] async for line in client.stream("LAUNCH_GROUP", group={"name": "w"}, stream=True)] == [
                "planned",
                "end",
            ]
            bench.service.gate.set()
        assert len(results) == 21
        assert len((await client.call("GET_CONTAINERS", all=True))["containers"]) == 20_000
        assert [item async for item in client.stream("READ_LOGS", container_id="big")] == [{"offset": 0, "data": b"z" * 600_000}]
        with pytest.raises(RemoteError) as caught:
            await client.call("KILL_CONTAINER", container_id="nobody")
        assert caught.value.code == "not_found"
        with pytest.raises(RemoteError) as caught:
            await client.call("PLAN_GROUP", group={"name": "x" * 300_000})
        assert caught.value.code == "too_large"


async def test_leaving_a_stream_or_a_wait_of_the_trio_client_ends_it_at_the_agent(serving: Any, until: Any) -> None:
    async with serving() as bench, module.open(bench.path) as client:
        stream = client.stream("SUBSCRIBE_EVENTS", container_id="web")
        assert (await anext(stream))["seq"] == 1
        assert bench.service.streaming == 1
        await stream.aclose()
        await until(lambda: bench.service.streaming == 0)
        with trio.move_on_after(0.1):
            await client.call("WAIT_CONTAINER", container_id="web.db")
        await until(lambda: bench.service.waiting == 0)
        await client.call("PING")


async def test_the_trio_client_tells_that_the_agent_has_gone(serving: Any, tmp_path: Path) -> None:
    with pytest.raises(RemoteError) as caught:
        async with module.open(tmp_path / "nothing"):
            pass
    assert caught.value.code == "agent_gone"
    async with serving() as bench, module.open(bench.path, reconnect=0) as client:
        events = client.stream("SUBSCRIBE_EVENTS", container_id="web")
        await anext(events)
        bench.server.tasks.cancel_scope.cancel()
        with pytest.raises(RemoteError) as caught, trio.fail_after(5):  # noqa: PT012 - what is buffered comes first
            while True:
                await anext(events)
        assert caught.value.code == "agent_gone"
        with pytest.raises(RemoteError):
            await client.call("PING")
