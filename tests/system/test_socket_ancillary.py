"""What the kernel lets a client put beside its bytes: descriptors, and bytes out of band."""

from __future__ import annotations

import array
import os
import socket
import time
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.one_world]
LAUNCH = [0, 1, "LAUNCH_GROUP", [{"group": {"name": "half", "tasks": [{"name": "t", "command": "sleep 60"}]}}]]
MOST = 253  # SCM_MAX_FD: all that fit into one message


def test_descriptors_sent_along_are_closed_at_once_and_the_connection_too(siege: Any, dial: Any) -> None:
    with siege(descriptors=MOST):
        for count, head, data in (
            (1, b"", dial.framed(LAUNCH)),
            (MOST, b"", dial.framed(LAUNCH)),
            (2, dial.framed(LAUNCH)[:10], b"x"),
        ):
            read, write = os.pipe()
            with dial() as peer:
                peer.sock.sendall(head)
                peer.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write] * count))])
                os.close(write)
                assert os.read(read, 1) == b""  # the end: nobody holds the other end any more
                os.close(read)
                assert [message[2]["code"] for message in peer.told()] == ["bad_frame"]
        with dial() as peer:
            assert peer.refused("EXPLAIN", container_id="half")["code"] == "not_found"


def test_a_byte_out_of_band_neither_keeps_the_agent_busy_nor_is_part_of_a_message(siege: Any, dial: Any, world: Any) -> None:
    """Linux 5.15 and newer have MSG_OOB for these sockets, and a reader that is told of a byte that it then does not find."""
    with siege(), dial() as peer:
        try:
            peer.sock.send(b"!", socket.MSG_OOB)
        except OSError as error:
            pytest.skip(f"this machine cannot send out of band on such a socket: {error}")
        assert peer.ask("PING") == [1, 1, None, {}]
        peer.sock.send(b"!", socket.MSG_OOB)
        agent = world.agent_pid()
        before, started = _cpu_seconds(agent), time.monotonic()
        while time.monotonic() < started + 0.5:
            time.sleep(0.05)
        assert _cpu_seconds(agent) - before < 0.4  # spinning, it would have used all of it but for the canary's share


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
