"""Several streams over one connection: nothing that was read is left lying while somebody waits for more."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import msgpack

from mesocosm.kernel import client as clients
from mesocosm.kernel.cli.multiplex import Item, Multiplexer

STREAMS = ("stdout", "stderr")
PATIENCE = 20.0  # seconds


def frame(message: Any) -> bytes:
    body: bytes = msgpack.packb(message)
    return len(body).to_bytes(4, "big") + body


def ended(number: int) -> bytes:
    return frame([2, "STREAM", [{"stream": number, "seq": 0, "end": True, "bytes": 0}]])


def serve(listener: socket.socket) -> None:
    """An agent that dies with two open streams, and one that ends both of them in the breath in which it opens the second."""
    for is_last in (False, True):
        peer = listener.accept()[0]
        with peer, peer.makefile("rb") as file:
            numbers: list[int] = []
            for _ in STREAMS:
                _, number, _, _ = msgpack.unpackb(file.read(int.from_bytes(file.read(4), "big")))
                numbers.append(number)
                more = b"".join(map(ended, numbers)) if is_last and len(numbers) == len(STREAMS) else b""
                peer.sendall(frame([1, number, None, {"stream": number}]) + more)
            if is_last:
                file.read()  # until the client leaves: nothing that it waits for comes after that


def test_what_is_read_while_another_stream_is_opened_again_with_the_next_agent_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        agents = threading.Thread(target=serve, args=(listener,), daemon=True)
        agents.start()
        client = clients.connect(tmp_path / "s", timeout=PATIENCE, reconnect=PATIENCE)
        streams: Multiplexer[str] = Multiplexer(lambda: client, client)
        for name in STREAMS:
            streams.open(name, "READ_LOGS", container_id="x", stream=name, offset=0, follow=True)
        taken: list[Item[str]] = []
        for _ in range(4):
            taken += streams.take()
            if not len(streams):
                break
            began = time.monotonic()
            streams.wait(PATIENCE)
            assert time.monotonic() < began + PATIENCE
        streams.close()
        agents.join(PATIENCE)

    assert {(item.tag, item.ended, item.error) for item in taken} == {(name, True, None) for name in STREAMS}
