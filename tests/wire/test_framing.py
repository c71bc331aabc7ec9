"""Frames: what is taken, and that everything else is refused before it is decoded."""

from __future__ import annotations

import struct
import sys
import time
import tracemalloc
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesocosm.kernel.core.errors import FrameError, InternalError, SpecError, TooLargeError
from mesocosm.kernel.wire import framing
from mesocosm.kernel.wire.framing import MAX_DEPTH, MAX_FRAME, MAX_ITEMS, Frames, decode, encode

# A loaded machine is no reason to fail.
calm = settings(suppress_health_check=[HealthCheck.too_slow])
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.binary(max_size=300)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=20) | st.dictionaries(texts, inner, max_size=20), max_leaves=60
)


def nested(depth: int) -> bytes:
    return b"\x91" * (depth - 1) + b"\x90"


@calm
@given(values)
def test_what_was_encoded_is_what_is_decoded(value: Any) -> None:
    assert decode(encode(value)[4:]) == value


@calm
@given(st.lists(values, min_size=1, max_size=4), st.lists(st.integers(0, 5000), max_size=10))
def test_a_stream_may_be_cut_anywhere(messages: list[Any], cuts: list[int]) -> None:
    data = b"".join(encode(message) for message in messages)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    frames, found = Frames(), []
    for start, end in pairwise(edges):
        frames.feed(data[start:end])
        while (body := frames.take()) is not None:
            found.append(decode(body))
    assert found == messages
    assert not frames.partial


def test_one_byte_at_a_time_gives_the_same_frame_and_says_that_it_is_partial() -> None:
    data = encode([0, 1, "PING", [{}]])
    frames = Frames()
    for byte in data[:-1]:
        frames.feed(bytes([byte]))
        assert frames.take() is None
        assert frames.partial
    frames.feed(data[-1:])
    assert frames.take() == data[4:]


@calm
@given(values, st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_mutated_frames_are_decoded_or_refused_and_nothing_else(value: Any, changes: list[tuple[int, int]]) -> None:
    body = bytearray(encode([0, 1, "LAUNCH_GROUP", [{"group": value}]])[4:])
    for at, byte in changes:
        body[at % len(body)] = byte
    judge(bytes(body))


@calm
@given(st.binary(min_size=1, max_size=400))
def test_noise_is_decoded_or_refused_and_nothing_else(body: bytes) -> None:
    judge(body)


def judge(body: bytes) -> None:
    """The walk and the decoder agree: what the walk lets pass decodes, to a value within the limits."""
    try:
        value = decode(body)
    except (FrameError, SpecError):
        return
    assert msgpack.unpackb(body) == value


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\xdd\xff\xff\xff\xff", "claims more"),
        (b"\xdf\xff\xff\xff\xff", "claims more"),
        (b"\xc6\xff\xff\xff\xff", "middle of a value"),
        (b"\xdb\xff\xff\xff\xff", "middle of a value"),
        (b"\xdc\xff", "middle of a value"),
        (b"\xda\xff", "middle of a value"),
        (b"\xcb\x00", "middle of a value"),
        (b"\x92\x01", "claims more"),
        (b"\x92\xcd\x00", "middle of a value"),
        (b"\x91\xc1", "not MessagePack"),
        (b"\x01\x02", "bytes follow"),
        (b"\x81\x01\x02", "key must be text"),
        (b"\x81\x90\x02", "key must be text"),
        (b"\x81\xc4\x01a\x02", "key must be text"),
        (b"\x81\xd4\x01a\x02", "key must be text"),
    ],
)
def test_a_frame_of_no_sound_structure_is_refused_with_the_reason(body: bytes, says: str) -> None:
    with pytest.raises(FrameError, match=says):
        decode(body)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 1024, 1025, 100_000])
def test_deep_nesting_is_refused_without_recursion(depth: int) -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    try:
        with pytest.raises(TooLargeError, match="too deep"):
            decode(nested(depth))
    finally:
        sys.setrecursionlimit(limit)


def test_the_deepest_that_is_allowed_passes() -> None:
    assert decode(nested(MAX_DEPTH)) is not None


def test_claims_of_size_reserve_nothing() -> None:
    body = b"\xdc\xff\xff" * 1000
    tracemalloc.start()
    with pytest.raises(FrameError):
        decode(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_items_are_counted_and_the_count_is_the_limit() -> None:
    decode(b"\xdc" + (MAX_ITEMS - 1).to_bytes(2, "big") + b"\x01" * (MAX_ITEMS - 1))
    with pytest.raises(TooLargeError, match="too many items"):
        decode(b"\xdc" + MAX_ITEMS.to_bytes(2, "big") + b"\x01" * MAX_ITEMS)


def test_the_worst_frame_costs_milliseconds() -> None:
    body = b"\xdd" + (MAX_FRAME - 5).to_bytes(4, "big") + b"\x90" * (MAX_FRAME - 5)
    costs = []
    for _ in range(5):
        start = time.perf_counter()
        with pytest.raises(TooLargeError):
            decode(body)
        costs.append(time.perf_counter() - start)
    assert min(costs) < 0.1  # about 10 ms where this was written; the bound allows for a loaded machine


@pytest.mark.parametrize(
    ("params", "path"),
    [
        (b"\x81\xa1a\xcb" + struct.pack(">d", float("nan")), "$[3][0].a"),
        (b"\x81\xa1a\x92\x01\xca" + struct.pack(">f", float("inf")), "$[3][0].a[1]"),
        (b"\x82\xa1a\x01\xa1a\x02", "$[3][0].a"),
        (b"\x82\xa1a\x01\xd9\x01a\x02", "$[3][0].a"),
        (b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "$[3][0].a"),
        (b"\x81\xa1a\xc7\x01\x05x", "$[3][0].a"),
        (b"\x81\xa1a\x91\xa2\xff\xfe", "$[3][0].a[0]"),
        (b"\x81\xa1a\xa3\xed\xa0\x80", "$[3][0].a"),  # a lone surrogate
    ],
)
def test_a_value_that_no_request_may_hold_is_named_by_its_path(params: bytes, path: str) -> None:
    body = b"\x94\x00\x01\xa4PING\x91" + params
    with pytest.raises(SpecError) as caught:
        decode(body)
    assert caught.value.fields["path"] == path
    assert framing.head(body) == (0, 1, "PING")


def test_integers_of_64_bits_and_negative_zero_pass_unchanged() -> None:
    assert decode(encode([2**64 - 1, -(2**63), -0.0])[4:]) == [2**64 - 1, -(2**63), -0.0]


@pytest.mark.parametrize(
    ("prefix", "error"),
    [
        (b"\x00\x00\x00\x00", FrameError),
        ((MAX_FRAME + 1).to_bytes(4, "big"), TooLargeError),
        (b"\xff\xff\xff\xff", TooLargeError),
        (b"\x80\x00\x00\x00\x00\x00\x00\x00", TooLargeError),
    ],
)
def test_an_illegal_length_is_refused_before_a_body_is_there(prefix: bytes, error: type[FrameError]) -> None:
    frames = Frames()
    frames.feed(prefix)
    for _ in range(2):
        with pytest.raises(error) as caught:
            frames.take()
        assert type(caught.value) is error


def test_a_frame_of_exactly_the_limit_passes() -> None:
    data = encode("x" * (MAX_FRAME - 5))
    assert len(data) == MAX_FRAME + 4
    frames = Frames()
    frames.feed(data)
    body = frames.take()
    assert body is not None
    assert decode(body) == "x" * (MAX_FRAME - 5)
    with pytest.raises(TooLargeError):
        encode("x" * (MAX_FRAME - 4))


@pytest.mark.parametrize("value", [object(), 2**64, {"a": {1, 2}}])
def test_what_cannot_be_sent_is_a_bug_of_ours_and_says_so(value: Any) -> None:
    with pytest.raises(InternalError):
        encode(value)
