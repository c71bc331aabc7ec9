"""The event log with readers slower than what happens: no gap that nobody is told of, no end that is waited for in vain."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from mesocosm.kernel.core.errors import LaggedError
from mesocosm.kernel.runtime import events
from mesocosm.kernel.runtime.events import Journal
from mesocosm.kernel.runtime.ledger import Ledger


def told(journal: Journal, ledger: Ledger, container_id: str, times: int) -> None:
    for _ in range(times):
        journal.add(container_id, "said")
    ledger.flush()


async def test_a_reader_of_everything_whose_next_lines_have_been_forgotten_is_told_so(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"))
    journal = Journal(ledger)
    told(journal, ledger, "busy", 10)
    async with contextlib.aclosing(journal.follow(0)) as lines:
        seen = [(await anext(lines))["seq"]]
        told(journal, ledger, "busy", 90)
        journal.prune(20)

        seen += [(await anext(lines))["seq"] for _ in range(9)]  # what it has been given already

        with pytest.raises(LaggedError) as caught:
            await anext(lines)

    assert seen == list(range(1, 11))
    assert caught.value.fields["have"] == "90 lines behind"


async def test_a_reader_that_begins_after_something_was_forgotten_gets_what_is_kept(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"))
    journal = Journal(ledger)
    told(journal, ledger, "busy", 100)
    journal.prune(20)

    async with contextlib.aclosing(journal.follow(0)) as lines:
        seen = [(await anext(lines))["seq"] for _ in range(20)]

    assert seen == list(range(81, 101))


async def test_the_lines_of_a_pod_that_somebody_follows_are_kept_for_them_and_no_longer(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"))
    journal = Journal(ledger)
    told(journal, ledger, "pod", 1)
    async with contextlib.aclosing(journal.follow(0, "pod")) as lines:
        seen = [(await anext(lines))["seq"]]
        told(journal, ledger, "pod.task", 1)
        told(journal, ledger, "busy", 300)
        told(journal, ledger, "pod", 1)
        told(journal, ledger, "busy", 300)
        journal.prune(20)
        seen += [(await anext(lines))["seq"] for _ in range(2)]

    assert seen == [1, 2, 303]
    journal.prune(20)
    assert {row.id for _, row in ledger.events_after(0, 1000)} == {"busy"}


async def test_agents_that_live_shortly_forget_as_much_as_one_that_lives_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(events, "_PRUNE_EVERY", 50)
    monkeypatch.setattr(events, "HISTORY", 20)

    async def tidy() -> None:
        await trio.lowlevel.checkpoint()

    kept = []
    for _ in range(20):
        ledger = Ledger(str(tmp_path / "ledger.db"))
        journal = Journal(ledger)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.keep_writing, tidy)
            for _ in range(30):
                journal.add("busy", "said")
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        kept.append(len(list(ledger.events_after(0, 10_000))))
        ledger.close()

    assert max(kept) <= 20 + 50 + 30
