"""The benchmark's clients, against a server that keeps count: every container is launched, waited for and removed, once."""

from __future__ import annotations

import runpy
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

BENCH = Path(__file__).resolve().parents[2] / "contrib" / "bench"
TASK = {"name": "t0", "command": ["/usr/bin/true"]}


@pytest.fixture
def run() -> Any:
    """The function under test."""
    return runpy.run_path(str(BENCH / "load.py"))["run"]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], tuple[str, list[tuple[str, str]]]]]:
    """A server of the wire on a thread of its own: its socket, and what it has been asked. `ends` is what WAIT answers."""
    listeners: list[socket.socket] = []

    def start(ends: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
        listener = socket.socket(socket.AF_UNIX)
        listeners.append(listener)
        path = str(tmp_path / "agent.sock")
        listener.bind(path)
        listener.listen(8)
        asked: list[tuple[str, str]] = []

        def talk(peer: socket.socket) -> None:
            with peer, peer.makefile("rwb") as file:
                while size := file.read(4):
                    _, number, method, [params] = msgpack.unpackb(file.read(int.from_bytes(size, "big")))
                    asked.append((method, params.get("container_id") or params["group"]["name"]))
                    body = msgpack.packb([1, number, None, ends if method == "WAIT_CONTAINER" else {}])
                    file.write(len(body).to_bytes(4, "big"))
                    file.flush()
                    file.write(body)  # a frame may come in pieces
                    file.flush()

        def accept() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(peer,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        return path, asked

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize(("count", "clients"), [(7, 3), (2, 5), (0, 2)])
def test_every_container_is_launched_waited_for_and_removed_once_in_that_order(
    run: Any, serve: Any, count: int, clients: int
) -> None:
    path, asked = serve({"exit": 0})

    taken = run(path, TASK, iter([f"c{number}" for number in range(count)]), clients)

    assert taken >= 0
    for number in range(count):
        methods = [method for method, name in asked if name == f"c{number}"]
        assert methods == ["LAUNCH_GROUP", "WAIT_CONTAINER", "REMOVE_CONTAINER"]
    assert len(asked) == 3 * count


def test_a_container_that_ends_badly_ends_the_benchmark(run: Any, serve: Any) -> None:
    path, _ = serve({"exit": 1})
    with pytest.raises(SystemExit, match="WAIT_CONTAINER"):
        run(path, TASK, iter(["c"]), 1)
