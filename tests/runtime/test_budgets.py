"""Budgets of what containers print, on real files whose every byte tells where it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from mesocosm.kernel.contracts import EffectContext, HostFacts
from mesocosm.kernel.core.containers import ContainerSpec
from mesocosm.kernel.core.errors import LaunchError
from mesocosm.kernel.core.plan import ContainerPlan, Effect
from mesocosm.kernel.core.resources import SMALLEST_LOG
from mesocosm.kernel.linux import holes
from mesocosm.kernel.linux.libc import SyscallError
from mesocosm.kernel.runtime.budgets import Budgets
from mesocosm.kernel.runtime.kinds import LogKind
from mesocosm.kernel.runtime.logs import Piece, read_log
from mesocosm.kernel.runtime.world import Cell, Group

MIB = 2**20
BUDGET = 256 * 1024


@pytest.fixture(autouse=True)
def _has_holes(tmp_path: Path) -> None:
    if not holes.can_punch(str(tmp_path)):
        pytest.skip("this machine cannot punch holes where tests have their files")


def pattern(start: int, count: int) -> bytes:
    """Bytes that are a function of their offset: every eight tell it."""
    first = start // 8
    numbers = b"".join(number.to_bytes(8, "big") for number in range(first, (start + count) // 8 + 1))
    return numbers[start - 8 * first :][:count]


def logging(tmp_path: Path, name: str = "x", budget: int = BUDGET) -> tuple[Cell, Path]:
    """A container that lives and has written nothing yet."""
    (tmp_path / name).mkdir()
    log = tmp_path / name / "stdout"
    log.touch()
    effect = Effect("log", {"path": str(log), "budget": budget}, keep=True)
    return Cell(ContainerSpec(id=name), ContainerPlan(name, {}, (effect,), ()), Group(name, "b", "e")), log


def append(log: Path, count: int) -> None:
    with log.open("ab") as file:
        file.write(pattern(file.tell(), count))


def kept(log: Path) -> int:
    return log.stat().st_blocks * 512


async def pieces(tmp_path: Path, cell: Cell, offset: int = 0) -> list[Piece]:
    found: list[Any] = [piece async for piece in read_log(str(tmp_path / cell.id), cell, "stdout", offset, follow=False)]
    return found


async def test_what_is_over_the_budget_goes_at_the_old_end_and_offsets_stay_true(tmp_path: Path) -> None:
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    budgets.watch(cell)
    for _ in range(3):
        append(log, MIB)
        budgets.look()
        assert kept(log) <= BUDGET
    dropped, *rest = await pieces(tmp_path, cell)
    assert dropped.offset == 0
    assert dropped.dropped == rest[0].offset == budgets.dropped(cell)["stdout"]
    assert b"".join(piece.data for piece in rest) == pattern(dropped.dropped, 3 * MIB - dropped.dropped)
    assert log.stat().st_size == 3 * MIB
    assert 3 * MIB - dropped.dropped > BUDGET // 2


async def test_a_reader_in_the_middle_is_told_how_many_bytes_it_missed_and_they_add_up(tmp_path: Path) -> None:
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    budgets.watch(cell)
    seen = bytearray()
    gaps = 0
    append(log, 100_000)
    async for piece in read_log(str(tmp_path / "x"), cell, "stdout", 0, follow=False):
        assert piece.offset == len(seen) + gaps
        assert piece.data == pattern(piece.offset, len(piece.data))
        seen += piece.data
        gaps += piece.dropped
        if log.stat().st_size < 5 * MIB:
            append(log, MIB)
            budgets.look()
    assert gaps > 0
    assert len(seen) + gaps == log.stat().st_size


async def test_within_its_budget_nothing_is_dropped(tmp_path: Path) -> None:
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    budgets.watch(cell)
    append(log, BUDGET - holes.PAGE)
    budgets.look()
    assert budgets.dropped(cell) == {}
    assert b"".join(piece.data for piece in await pieces(tmp_path, cell)) == pattern(0, BUDGET - holes.PAGE)


async def test_the_next_agent_sees_in_the_file_what_was_dropped(tmp_path: Path) -> None:
    cell, log = logging(tmp_path)
    first, second = Budgets(str(tmp_path)), Budgets(str(tmp_path))
    first.watch(cell)
    append(log, MIB)
    first.look()
    second.watch(cell)
    second.look()
    assert second.dropped(cell) == first.dropped(cell) != {}
    assert second.told(cell)["stdout"] == first.told(cell)["stdout"]


async def test_a_program_that_shortens_fills_or_reserves_its_file_keeps_no_more_and_ends_nothing(tmp_path: Path) -> None:
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    budgets.watch(cell)
    with log.open("r+b", buffering=0) as file:
        append(log, MIB)
        budgets.look()
        os.pwrite(file.fileno(), bytes(BUDGET * 3), 0)  # back into the hole
        budgets.look()
        assert kept(log) <= BUDGET
        os.posix_fallocate(file.fileno(), 0, 2 * MIB)
        budgets.look()
        budgets.look()
        assert kept(log) <= BUDGET
        file.truncate(2**42)  # tells of a terabyte
        budgets.look()
        budgets.look()
        assert kept(log) <= BUDGET
        file.truncate(0)
        budgets.look()
    append(log, 5)
    assert budgets.told(cell)["stdout"]["dropped"] == 0
    assert await pieces(tmp_path, cell) == [(0, pattern(0, 5), 0)]


async def test_all_together_take_no_more_than_half_of_the_room_and_the_largest_give_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [logging(tmp_path, name, 8 * MIB) for name in ("large", "larger", "small")]
    budgets = Budgets(str(tmp_path))
    for cell, _ in made:
        budgets.watch(cell)
    for (_, log), size in zip(made, (3 * MIB, 4 * MIB, BUDGET), strict=True):
        append(log, size)
    monkeypatch.setattr(budgets, "_room", lambda: 0)
    budgets.look()
    assert sum(kept(log) for _, log in made) <= (7 * MIB + BUDGET) // 2
    assert kept(made[2][1]) == BUDGET
    for _ in range(30):
        budgets.look()
    assert all(kept(log) >= SMALLEST_LOG // 2 for _, log in made)  # never nothing, however little room there is


async def test_looks_are_made_while_somebody_lives_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    looks = 0
    look = budgets.look

    def count() -> None:
        nonlocal looks
        looks += 1
        look()

    monkeypatch.setattr(budgets, "look", count)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(budgets.keep)
        await trio.sleep(0.2)
        assert looks == 0
        budgets.watch(cell)
        append(log, MIB)
        with trio.fail_after(10):
            while kept(log) > BUDGET:
                await trio.sleep(0.01)
        cell.dead.set()
        with trio.fail_after(10):
            while budgets._living:
                await trio.sleep(0.01)
        await trio.sleep(0.3)
        before = looks
        await trio.sleep(0.3)
        assert looks == before
        nursery.cancel_scope.cancel()


async def test_the_output_of_one_that_is_started_again_under_its_name_is_counted_once(tmp_path: Path) -> None:
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    budgets.watch(cell)
    for _ in range(5):
        append(log, MIB)
        budgets.look()
        log.unlink()
        append(log, 100_000)
        budgets.watch(cell)  # the next life of the same name, while the log of the last one still grew
        budgets.look()
        assert budgets._total == kept(log)
    log.unlink()
    budgets.look()
    assert budgets._total == 0


async def test_a_file_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    budgets.watch(cell)
    log.unlink()
    budgets.look()
    assert budgets.told(cell) == budgets.dropped(cell) == {}


async def test_where_no_hole_can_be_punched_a_default_budget_is_not_kept_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SyscallError(95, "fallocate")

    monkeypatch.setattr(holes, "punch", refuse)
    cell, log = logging(tmp_path)
    budgets = Budgets(str(tmp_path))
    budgets.watch(cell)
    append(log, MIB)
    budgets.look()
    assert kept(log) >= MIB
    assert budgets.told(cell)["stdout"]["budget"] is None


def test_where_no_hole_can_be_punched_a_budget_that_was_asked_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SyscallError(95, "fallocate")

    monkeypatch.setattr(holes, "punch", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(LaunchError) as caught:
        LogKind().do({"path": str(tmp_path / "stdout"), "budget": BUDGET}, EffectContext(HostFacts(), "x"))
    assert caught.value.fields["syscall"] == "fallocate"
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert not holes.can_punch(str(tmp_path))
