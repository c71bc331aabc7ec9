"""A launcher that says what no launcher says is a launcher that is gone: told once, and whoever waits for it is answered."""

from __future__ import annotations

import os
import socket
from typing import Any

import msgpack
import pytest
import trio
import trio.testing

from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.launcher.client import LauncherClient
from mesocosm.kernel.launcher.contract import LauncherGone
from mesocosm.kernel.launcher.passing import send

ENDED = {"id": "web", "status": 0, "user_us": 0, "system_us": 0, "max_rss_kib": 0, "time": 0.0}


@pytest.mark.parametrize(
    "said",
    [
        b"\xc1",
        b"not MessagePack",
        msgpack.packb(None),
        msgpack.packb([1]),
        msgpack.packb([1, "ok", None]),
        msgpack.packb([0, "notices", 5]),
        msgpack.packb([0, "notices", [["ended", {}]]]),
        msgpack.packb([0, "notices", [["ended", {**ENDED, "status": "x"}]]]),
        msgpack.packb([0, "notices", [["started", {"id": "web"}]]]),
        msgpack.packb([1, "ok", {}]) + b"more",
    ],
    ids=repr,
)
async def test_nonsense_means_that_it_is_gone(said: bytes, capsys: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open("/dev/null", os.O_RDONLY)
    client = LauncherClient(ours, "/nowhere")
    errors = []

    async def ask() -> None:
        with pytest.raises(LaunchError) as caught:
            await client.abort("barrier")
        errors.append(caught.value)

    with theirs, trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.listen)
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            send(theirs, said, [null])

        assert isinstance(client.notices.receive_nowait(), LauncherGone)
        assert "the launcher is gone" in errors[0].message
        with pytest.raises(LaunchError):
            await client.abort("barrier")
    client.close()
    os.close(null)
    assert capsys.readouterr().err, "the agent's log says what it was"
