"""What the launcher tells unasked: gathered, in order, and never held up for long."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mesocosm.kernel.launcher.news import SOON, News


class Line:
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def send(self, message: list[Any], fds: list[int] | None = None) -> None:
        """As line.Line.send."""
        assert not fds
        assert message[:2] == [0, "news"]
        self.said.append([(kind, body["id"]) for kind, body in message[2]])


class Born:
    """As much of a Birth as news are made of."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.ended = {"id": name}


def birth(name: str) -> Any:
    """One of them."""
    return Born(name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Both clocks, to be set by the test."""
    now = {"monotonic": 100.0, "time": 1e9}
    monkeypatch.setattr(time, "monotonic", lambda: now["monotonic"])
    monkeypatch.setattr(time, "time", lambda: now["time"])
    return now


def test_one_that_ends_at_once_is_told_in_one_message_and_in_order(clock: dict[str, float]) -> None:
    line = Line()
    news = News(line)  # type: ignore[arg-type]
    first = birth("a")
    news.started(first, 1e9)
    news.tell()
    assert line.said == []
    assert news.is_waiting
    news.ended(first)
    news.tell()
    assert line.said == [[("started", "a"), ("ended", "a")]]
    assert not news.is_waiting


def test_started_waits_no_longer_than_soon_whatever_the_wall_clock_does(clock: dict[str, float]) -> None:
    line = Line()
    news = News(line)  # type: ignore[arg-type]
    news.started(birth("a"), 1e9)
    clock["time"] -= 3600
    clock["monotonic"] += SOON
    news.tell()
    assert line.said == [[("started", "a")]]


def test_much_news_comes_in_several_messages(clock: dict[str, float]) -> None:
    line = Line()
    news = News(line)  # type: ignore[arg-type]
    for number in range(250):
        news.ended(birth(f"c{number}"))
    news.tell()
    assert [len(message) for message in line.said] == [100, 100, 50]
    assert [name for message in line.said for _, name in message] == [f"c{number}" for number in range(250)]
