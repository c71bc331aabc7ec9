"""Clients whose agent dies under them: what goes on over the next one, what is found out, and what is said to be unknown."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from mesocosm.kernel import client as module
from mesocosm.kernel.client import RemoteError, connect

NOT_FOUND = {"code": "not_found", "message": "nobody"}
REMEMBERED = {"id": "x", "state": "DEAD", "life": 2, "lives": 2}  # what the history has of one that is gone
Call = Callable[[str, dict[str, Any]], Any]


class Lives:
    """Agents on one socket, one after the other. The life of each is a list of answers, and then it is cut off.

    An answer is a result, an error ({"code": …}), None for silence until the end, or a list: a stream of these items, which
    has no end unless it is "end".
    """

    def __init__(self, path: Path, lives: Sequence[Sequence[Any]]) -> None:
        self.asked: list[list[tuple[str, dict[str, Any]]]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._lives = lives
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answers in self._lives:
            try:
                peer = self._listener.accept()[0]
            except OSError:
                return  # nobody came for this life
            self.asked.append([])
            with peer, peer.makefile("rb") as file:
                for answer in answers:
                    if not (length := file.read(4)):
                        break
                    _, number, method, [params] = msgpack.unpackb(file.read(int.from_bytes(length, "big")))
                    self.asked[-1].append((method, params))
                    for message in self._messages(number, answer):
                        body = msgpack.packb(message)
                        peer.sendall(len(body).to_bytes(4, "big") + body)
        self._listener.close()

    def close(self) -> None:
        """Ends what is left of it."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()

    @staticmethod
    def _messages(number: int, answer: Any) -> Iterator[Any]:
        if isinstance(answer, list):
            yield [1, number, None, {"stream": number}]
            total = 0
            for seq, item in enumerate(answer):
                fields = {"end": True, "bytes": total} if item == "end" else {"item": item}
                message = [2, "STREAM", [{"stream": number, "seq": seq, **fields}]]
                total += len(msgpack.packb(message))
                yield message
        elif isinstance(answer, dict) and "code" in answer:
            yield [1, number, answer, None]
        elif answer is not None:
            yield [1, number, None, answer]


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Callable[..., Lives]]:
    """``lives([{}], [None])``: the second takes one request and dies without an answer."""
    made: list[Lives] = []

    def make(*each: Sequence[Any]) -> Lives:
        made.append(Lives(tmp_path / "s", each))
        return made[0]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=["sync", "trio"])
def calling(request: pytest.FixtureRequest, tmp_path: Path) -> Call:
    """A call, or all items of a stream, by each of the two clients."""
    streams = ("SUBSCRIBE_EVENTS", "READ_LOGS")

    def by_sync(method: str, params: dict[str, Any]) -> Any:
        with connect(tmp_path / "s", timeout=10, reconnect=10) as client:
            client.ping()
            return list(client.stream(method, **params)) if method in streams else client.call(method, **params)

    async def by_trio(method: str, params: dict[str, Any]) -> Any:
        with trio.fail_after(20):
            async with module.open(tmp_path / "s", reconnect=10) as client:
                await client.call("PING")
                if method in streams:
                    return [item async for item in client.stream(method, **params)]
                return await client.call(method, **params)

    return by_sync if request.param == "sync" else lambda method, params: trio.run(by_trio, method, params)


def test_a_log_goes_on_at_the_byte_after_the_last_and_after_what_was_dropped(lives: Any, calling: Call) -> None:
    first = [{"offset": 5, "data": b"", "dropped": 7}, {"offset": 12, "data": b"abc"}]
    agents = lives([{}, first], [[]], [[{"offset": 15, "data": b"d"}, "end"]])
    seen = calling("READ_LOGS", {"container_id": "x", "offset": 5, "follow": True})
    assert seen == [*first, {"offset": 15, "data": b"d"}]
    assert [asked[-1][1]["offset"] for asked in agents.asked] == [5, 15, 15]


def test_events_go_on_after_the_last_number(lives: Any, calling: Call) -> None:
    agents = lives([{}, [{"seq": 4}, {"seq": 5}]], [[{"seq": 6}, "end"]])
    assert [item["seq"] for item in calling("SUBSCRIBE_EVENTS", {"since": 3})] == [4, 5, 6]
    assert agents.asked[1] == [("SUBSCRIBE_EVENTS", {"since": 5})]


@pytest.mark.parametrize("method", ["WAIT_CONTAINER", "EXPLAIN", "AUDIT"])
def test_what_only_looks_is_asked_again(lives: Any, calling: Call, method: str) -> None:
    agents = lives([{}, None], [None], [{"id": "x"}])
    assert calling(method, {"container_id": "x"}) == {"id": "x"}
    assert agents.asked[1:] == [[(method, {"container_id": "x"})]] * 2


@pytest.mark.parametrize(
    ("method", "known", "is_repeated"),
    [
        ("KILL_CONTAINER", {"state": "RUNNING", "reason": None}, True),
        ("KILL_CONTAINER", {"state": "RUNNING", "reason": "killed"}, False),
        ("KILL_CONTAINER", {"state": "DEAD"}, False),
        ("KILL_CONTAINER", NOT_FOUND, False),
        ("REMOVE_CONTAINER", {"state": "DEAD"}, True),
        ("REMOVE_CONTAINER", NOT_FOUND, False),
        ("REMOVE_CONTAINER", REMEMBERED, False),
        ("KILL_CONTAINER", REMEMBERED, False),
    ],
)
def test_an_end_or_a_removal_is_asked_for_again_only_if_it_was_not_begun(
    lives: Any, calling: Call, method: str, known: Any, *, is_repeated: bool
) -> None:
    agents = lives([{}, None], [known, {}])
    assert calling(method, {"container_id": "x"}) == {}
    again = [(method, {"container_id": "x"})] if is_repeated else []
    assert agents.asked[1] == [("EXPLAIN", {"container_id": "x"}), *again]


def test_a_removal_that_came_to_its_end_between_the_two_questions_has_worked(lives: Any, calling: Call) -> None:
    agents = lives([{}, None], [{"state": "DEAD"}, NOT_FOUND])
    assert calling("REMOVE_CONTAINER", {"container_id": "x"}) == {}
    assert [method for method, _ in agents.asked[1]] == ["EXPLAIN", "REMOVE_CONTAINER"]


def test_a_long_answer_that_was_cut_is_asked_for_again_as_a_whole(lives: Any, calling: Call) -> None:
    agents = lives([{}, {"$stream": 2}], [{"id": "x"}])  # what is announced does not come
    assert calling("EXPLAIN", {"container_id": "x"}) == {"id": "x"}
    assert [asked[-1][0] for asked in agents.asked] == ["EXPLAIN", "EXPLAIN"]


@pytest.mark.parametrize(
    ("method", "params", "answers", "code"),
    [
        ("LAUNCH_GROUP", {"group": {"name": "x"}}, [{"state": "RUNNING"}], "unknown_outcome"),
        ("LAUNCH_GROUP", {"group": {"name": "x"}}, [NOT_FOUND], "agent_gone"),
        ("LAUNCH_GROUP", {"group": {"name": "x"}}, [REMEMBERED], "agent_gone"),
        ("LAUNCH_NESTED_GROUP", {"container_id": "x", "tasks": []}, [], "unknown_outcome"),
        ("KILL_CONTAINER", {"container_id": "x", "signal": "USR1"}, [], "unknown_outcome"),
        ("AUDIT", {"repair": True}, [], "unknown_outcome"),  # what it has undone is told nobody any more
    ],
)
def test_what_may_have_happened_is_never_asked_for_twice(
    lives: Any, calling: Call, method: str, params: dict[str, Any], answers: list[Any], code: str
) -> None:
    agents = lives([{}, None], answers, [])
    with pytest.raises(RemoteError) as caught:
        calling(method, params)
    assert caught.value.code == code
    assert [asked for life in agents.asked for asked, _ in life].count(method) == 1


def test_patience_ends(tmp_path: Path, lives: Any) -> None:
    lives([{}, None])
    with connect(tmp_path / "s", reconnect=0.2) as client:
        client.ping()
        with pytest.raises(RemoteError) as caught:
            client.ping()
    assert caught.value.code == "agent_gone"
    assert "0.2 s" in caught.value.error["message"]


def test_a_closed_client_stays_closed(tmp_path: Path, lives: Any) -> None:
    lives([{}], [{}])
    client = connect(tmp_path / "s")
    client.ping()
    client.close()
    with pytest.raises(RemoteError, match="closed"):
        client.ping()


def test_an_agent_that_is_silent_is_told_of_once_and_waited_for(tmp_path: Path) -> None:
    said = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with connect(tmp_path / "s", timeout=30, reconnect=0) as client:
            peer = listener.accept()[0]

            def tell() -> None:
                said.append("silent")
                body = msgpack.packb([1, 1, None, {"state": "RUNNING"}])
                peer.sendall(len(body).to_bytes(4, "big") + body)

            client.on_silence = tell
            assert client.explain("x") == {"state": "RUNNING"}
            peer.close()
    assert said == ["silent"]
