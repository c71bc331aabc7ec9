"""Frames: a 4-byte big-endian length and that many bytes of MessagePack. Sans-IO: bytes in, values out.

What lives here: the limits, the check of raw bytes, encoding, cutting a byte stream into frames. What must not:
sockets, clocks, the meaning of a message.

Theory: a decoder believes what it reads. Three kilobytes that claim nested arrays of 65,535 elements make it
reserve 50 MB; a megabyte of empty arrays keeps it, and everybody behind it, busy for half a second; a thousand
levels decode well and then break whoever walks the result. So a frame is *walked* first: one loop over its bytes,
without recursion and without building anything, which knows the limits and stops at the first excess. Only
what passed is decoded.

Two kinds of refusal come out of the walk. A frame over a limit, or one that is not MessagePack, is a `FrameError`:
its sender is not a client of ours. A frame of sound structure with a value that no request may hold (NaN, an
extension type, a key twice, text that is not UTF-8) is a `SpecError` with the path of that value: its sender is
a user with a mistake in a pod file, and the connection lives on.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgpack

from mesocosm.kernel.core.errors import FrameError, InternalError, SpecError, TooLargeError

MAX_FRAME = 256 * 1024  # bytes after the length
MAX_DEPTH = 32  # arrays and maps inside one another, the message's own array included
MAX_ITEMS = 20_000  # values in a frame: arrays, maps, keys and scalars alike; walking as many takes a few milliseconds
PREFIX = 4

# How the first byte of a value goes on, for those from 0xc0 to 0xdf: (bytes of a length field, bytes of the body).
# A length field counts bytes of text and binary data, elements of arrays, pairs of maps.
_SCALARS = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}


class _Level:
    """One open array or map during the walk; `keys` (maps only) holds the raw keys seen."""

    __slots__ = ("key", "keys", "left", "total")

    def __init__(self, total: int, keys: set[bytes] | None) -> None:
        self.total = total
        self.left = total  # values still to come; a map's keys and values count separately
        self.keys = keys
        self.key = b""


def check(body: bytes, *, texts: bool = False) -> None:
    """Walks one frame's bytes. With `texts`, also decodes every text (slow: only to find out which one was wrong).

    Raises TooLargeError or another FrameError for the structure, SpecError with a path (``$[3][0].group.name``)
    for a value that no message of ours may hold.
    """
    size = len(body)
    if size > MAX_FRAME:
        raise TooLargeError("the frame is too long", have=str(size), need=f"≤ {MAX_FRAME} bytes")
    flaw: SpecError | None = None
    here = _Level(1, None)
    stack: list[_Level] = []
    at = items = 0
    while True:
        while not here.left:
            if not stack:
                if at != size:
                    raise FrameError("bytes follow the message", have=f"{size - at} bytes after byte {at}")
                if flaw is not None:
                    raise flaw
                return
            here = stack.pop()
        if at >= size:
            raise FrameError("the frame ends in the middle of a value", have=f"{size} bytes")
        items += 1
        if items > MAX_ITEMS:
            raise TooLargeError("the frame has too many items", have=f"> {MAX_ITEMS}", need=f"≤ {MAX_ITEMS}")
        kind = body[at]
        is_key = here.keys is not None and not here.left & 1
        here.left -= 1
        if kind < 0x80 or kind >= 0xE0:  # a small integer
            if is_key:
                raise FrameError("a key must be text", have=f"type 0x{kind:02x} at byte {at}")
            at += 1
            continue
        length = 0
        if 0xA0 <= kind < 0xC0:
            start, length = at + 1, kind & 0x1F
        elif kind in _BYTES:
            width = _BYTES[kind]
            start, length = at + 1 + width, int.from_bytes(body[at + 1 : at + 1 + width], "big")
        elif kind < 0xA0 or kind in _CONTAINERS:
            if is_key:
                raise FrameError("a key must be text", have=f"type 0x{kind:02x} at byte {at}")
            width = 0 if kind < 0xA0 else _CONTAINERS[kind]
            if at + 1 + width > size:
                raise FrameError("the frame ends in the middle of a value", have=f"{size} bytes")
            count = int.from_bytes(body[at + 1 : at + 1 + width], "big") if width else kind & 0x0F
            is_map = kind < 0x90 or kind in (0xDE, 0xDF)
            at += 1 + width
            count *= 2 if is_map else 1
            if count > size - at:  # every value takes a byte at least: this claim cannot be true
                raise FrameError("an array or map claims more than there is", have=f"{size - at} bytes", need=f"{count} values")
            if len(stack) + 1 > MAX_DEPTH:
                raise TooLargeError("the message is nested too deep", have=f"> {MAX_DEPTH}", need=f"≤ {MAX_DEPTH} levels")
            stack.append(here)
            here = _Level(count, set() if is_map else None)
            continue
        elif kind in _SCALARS:
            start, length = at + 1, _SCALARS[kind]
            if kind in (0xCA, 0xCB) and start + length <= size:
                (number,) = struct.unpack(">f" if kind == 0xCA else ">d", body[start : start + length])
                if not math.isfinite(number) and flaw is None:
                    flaw = SpecError(f"{number} is not a number one can count with", path=_path(stack, here))
        elif kind in _FIXED_EXTENSIONS or kind in _EXTENSIONS:
            width = _EXTENSIONS.get(kind, 0)
            start = at + 2 + width
            length = int.from_bytes(body[at + 1 : at + 1 + width], "big") if width else _FIXED_EXTENSIONS[kind]
            flaw = flaw or SpecError("MessagePack's extension types (timestamps too) are not used", path=_path(stack, here))
        else:  # 0xc1, which MessagePack never uses
            raise FrameError("not MessagePack", have=f"type 0x{kind:02x} at byte {at}")
        end = start + length
        if end > size:
            raise FrameError("the frame ends in the middle of a value", have=f"{size} bytes", need=f"{end} bytes")
        is_text = 0xA0 <= kind < 0xC0 or kind >= 0xD9
        if is_key:
            if not is_text:
                raise FrameError("a key must be text", have=f"type 0x{kind:02x} at byte {at}")
            here.key = body[start:end]
            assert here.keys is not None
            if here.key in here.keys and flaw is None:
                flaw = SpecError("the same key twice", path=_path(stack, here))
            here.keys.add(here.key)
        if texts and is_text and flaw is None:
            try:
                body[start:end].decode()
            except UnicodeDecodeError:
                flaw = SpecError("the text is not UTF-8", path=_path(stack, here))
        at = end


def _path(stack: list[_Level], here: _Level) -> str:
    """Where the value last begun stands, as a JSON path."""
    parts = []
    for level in [*stack[1:], here]:  # the outermost level is the frame itself
        if level.keys is None:
            parts.append(f"[{level.total - level.left - 1}]")
        else:
            parts.append("." + level.key[:80].decode(errors="replace"))
    return "$" + "".join(parts)


def decode(body: bytes) -> Any:
    """The message in a frame of a peer that is not trusted. FrameError, TooLargeError or SpecError as `check` says."""
    check(body)
    try:
        return msgpack.unpackb(body)
    except UnicodeDecodeError:
        check(body, texts=True)
        raise FrameError("a text is not UTF-8") from None
    except (ValueError, msgpack.UnpackException) as error:  # the walk and the decoder disagree: a bug, answered all the same
        raise FrameError(f"not a message: {error}") from None


def head(body: bytes) -> tuple[Any, Any, Any] | None:
    """(type, id, method) of a frame whose structure passed but whose values did not; None if it has no such start."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(body)
    try:
        if unpacker.read_array_header() < 3:
            return None
        return unpacker.unpack(), unpacker.unpack(), unpacker.unpack()
    except (ValueError, msgpack.UnpackException):
        return None


def encode(message: Any, *, limit: int = MAX_FRAME) -> bytes:
    """The frame, length included, of one message. TooLargeError beyond `limit`; InternalError for what cannot be sent."""
    body = pack(message)
    if len(body) > limit:
        raise TooLargeError("the message is too long for a frame", have=str(len(body)), need=f"≤ {limit} bytes")
    return len(body).to_bytes(PREFIX, "big") + body


def pack(value: Any) -> bytes:
    """`value` as MessagePack without a length. InternalError if it holds what MessagePack has no form for."""
    try:
        packed: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InternalError(f"an answer cannot be sent: {type(error).__name__}: {error}") from None
    return packed


class Frames:
    """Cuts a stream of bytes into frames. Feed what came; take frames until there is none.

    Holds at most one unfinished frame beside what was fed last. An illegal length raises on `take`, and again
    on every later one: nobody knows where the next frame would start.
    """

    def __init__(self, limit: int = MAX_FRAME) -> None:
        self.limit = limit
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds bytes as they came, however they were cut."""
        self._bytes += data

    @property
    def partial(self) -> bool:
        """Whether the first bytes of a frame are here (after `take` returned None: and its last are not)."""
        return bool(self._bytes)

    def take(self) -> bytes | None:
        """The body of the next whole frame; None if it is not whole yet. FrameError or TooLargeError for its length."""
        held = self._bytes
        if len(held) < PREFIX:
            return None
        length = int.from_bytes(held[:PREFIX], "big")
        if length > self.limit:
            raise TooLargeError("the frame is too long", have=str(length), need=f"≤ {self.limit} bytes")
        if not length:
            raise FrameError("a frame without a message", have="length 0")
        end = PREFIX + length
        if len(held) < end:
            return None
        body = bytes(held[PREFIX:end])
        del held[:end]
        return body
