"""Errors as values: what is in them can always be stored, sent and printed."""

from __future__ import annotations

import os

import msgpack

from mesocosm.kernel.core.errors import LaunchError, from_object


def test_a_file_name_that_is_no_text_is_written_with_escapes() -> None:
    """A container can give its files any name; an error about one must not be the next error."""
    name = os.fsdecode(b"/bin/\xff")

    error = LaunchError(f"{name} is missing", target=name, hint=f"make {name}").as_object()

    assert error["message"] == "/bin/\\udcff is missing"
    assert error["target"] == "/bin/\\udcff"
    assert from_object(msgpack.unpackb(msgpack.packb(error))).as_object() == error


def test_text_in_other_alphabets_stays_as_it_is() -> None:
    assert LaunchError("für α", target="/ü").as_object() == {"code": "launch_failed", "message": "für α", "target": "/ü"}
