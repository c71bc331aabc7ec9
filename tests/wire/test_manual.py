"""The manual's page on the socket: every byte of it is true."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trio

from mesocosm.kernel.wire import framing
from mesocosm.kernel.wire.messages import METHODS

PAGE = (Path(__file__).parents[2] / "contrib" / "manual" / "wire.md").read_text()
EXAMPLES = re.findall(r"^```wire\n(.*?)^```", PAGE, re.M | re.S)


def parse(example: str) -> list[tuple[str, Any, bytes]]:
    """The (arrow, message, frame) of one block."""
    found = []
    for arrow, text, digits in re.findall(r"^([→←]) (.*)\n((?:  [0-9a-f ]+\n)+)", example, re.M):
        found.append((arrow, with_bytes(json.loads(text)), bytes.fromhex(digits)))
    assert len(found) == example.count("→") + example.count("←")
    return found


def with_bytes(value: Any) -> Any:
    match value:
        case {"$bytes": str(text)}:
            return text.encode()
        case dict():
            return {key: with_bytes(inner) for key, inner in value.items()}
        case list():
            return [with_bytes(inner) for inner in value]
    return value


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 6


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_message_is_the_frame_below_it(example: str) -> None:
    for _, message, frame in parse(example):
        assert framing.encode(message) == frame
        assert framing.decode(frame[4:]) == message


@pytest.mark.parametrize("example", EXAMPLES)
async def test_each_example_happens_like_that(serving: Any, example: str) -> None:
    async with serving() as bench, bench.peer() as peer:
        for arrow, _, frame in parse(example):
            if arrow == "→":
                await peer.stream.send_all(frame)
                continue
            received = b""
            with trio.fail_after(5):
                while len(received) < len(frame):
                    received += await peer.stream.receive_some(len(frame) - len(received))
            assert received == frame


def test_the_table_of_methods_is_whole_and_right() -> None:
    rows = re.findall(r"^\| (`[A-Z_` ]+`) \| .* \| (read|write) \|$", PAGE, re.M)
    told = {name: right for names, right in rows for name in re.findall(r"[A-Z_]+", names)}
    assert told == {name: method.right for name, method in METHODS.items()}


@pytest.mark.parametrize("limit", [framing.MAX_FRAME, framing.MAX_ITEMS, framing.MAX_DEPTH])
def test_the_limits_are_those_of_the_code(limit: int) -> None:
    assert re.search(rf"\| {limit:,}(;.*)? \|", PAGE)
