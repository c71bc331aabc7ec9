"""Two clients, one id: whoever is first gets it, the other is told so, and never both, never neither, never half."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

pytestmark = [pytest.mark.system, pytest.mark.one_world]


def pod(name: str, *commands: Any) -> dict[str, Any]:
    return {"name": name, "tasks": [{"name": f"t{number}", "command": command} for number, command in enumerate(commands)]}


ONE = pod("raced", ["sleep", "1000"])
OTHER = pod("raced", ["sleep", "1000"], ["sleep", "1001"])


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each of these answers, begun as near to each other as threads can."""
    answers: list[Any] = [None] * len(works)
    gate = threading.Barrier(len(works))

    def run(index: int) -> None:
        gate.wait()
        answers[index] = works[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return answers


def clear(peer: Any, name: str) -> None:
    peer.ask("KILL_CONTAINER", container_id=name, signal="KILL")
    assert peer.ask("WAIT_CONTAINER", container_id=name)[2] is None
    assert peer.ask("REMOVE_CONTAINER", container_id=name)[2] is None


@pytest.mark.parametrize("pods", [(ONE, ONE), (ONE, OTHER)], ids=["the same pod", "different pods"])
def test_of_two_launches_of_one_name_one_wins_and_the_other_conflicts(
    siege: Any, dial: Any, rounds: Callable[[int, int], int], pods: tuple[Any, Any]
) -> None:
    count = rounds(8, 300)
    with siege(races=count), dial() as left, dial() as right:
        for _ in range(count):
            answers = at_once(
                *(partial(peer.ask, "LAUNCH_GROUP", group=group) for peer, group in zip((left, right), pods, strict=True))
            )
            assert Counter("won" if answer[2] is None else answer[2]["code"] for answer in answers) == {"won": 1, "conflict": 1}
            (won,) = [(answer[3], group) for answer, group in zip(answers, pods, strict=True) if answer[2] is None]
            ids = ["raced", *(f"raced.{task['name']}" for task in won[1]["tasks"])]
            assert won[0]["containers"] == ids
            assert [line["id"] for line in left.ask("GET_CONTAINERS")[3]["containers"] if line["group"] == "raced"] == ids
            clear(left, "raced")


def test_a_launch_that_is_killed_on_its_way_up_is_whole_or_gone(siege: Any, dial: Any, rounds: Callable[[int, int], int]) -> None:
    count = rounds(8, 300)
    ended: Counter[str] = Counter()
    with siege(races=count) as allowed, dial() as left, dial() as right:
        allowed.memory = 24 * 1024
        for _ in range(count):
            launch = partial(left.ask, "LAUNCH_GROUP", group=OTHER)
            launched, killed = at_once(launch, partial(right.ask, "KILL_CONTAINER", container_id="raced", signal="KILL"))
            lines = [line for line in left.ask("GET_CONTAINERS", all=True)[3]["containers"] if line["group"] == "raced"]
            assert len(lines) == 3
            if launched[2] is None:
                ended["launched"] += 1
                clear(left, "raced")
            else:
                ended["rolled back"] += 1
                assert (launched[2]["code"], killed[2]) == ("launch_failed", None)
                assert {line["state"] for line in lines} == {"DEAD"}
                assert {line["wait"]["reason"] for line in lines} == {"rolled_back"}
                assert left.ask("REMOVE_CONTAINER", container_id="raced")[2] is None
        allowed.numbers |= ended


def test_two_removals_of_one_pod_remove_it_once(siege: Any, dial: Any, rounds: Callable[[int, int], int]) -> None:
    with siege(), dial() as left, dial() as right:
        for _ in range(rounds(5, 100)):
            assert left.ask("LAUNCH_GROUP", group=pod("raced", ["true"]))[2] is None
            assert left.ask("WAIT_CONTAINER", container_id="raced")[2] is None
            answers = at_once(*(partial(peer.ask, "REMOVE_CONTAINER", container_id="raced") for peer in (left, right)))
            codes = sorted(str(answer[2] and answer[2]["code"]) for answer in answers)
            assert "None" in codes, codes
            assert set(codes) <= {"None", "not_found", "conflict"}, codes
            assert left.refused("WAIT_CONTAINER", container_id="raced")["code"] == "not_found"


def test_one_request_number_twice_is_one_request_and_a_conflict(siege: Any, dial: Any) -> None:
    with siege(), dial() as peer:
        launch = [0, 7, "LAUNCH_GROUP", [{"group": ONE}]]
        peer.send(launch, launch, [0, 7, "LAUNCH_GROUP", [{"group": pod("another", ["true"])}]])
        answers = [peer.receive() for _ in range(3)]
        assert [answer[1] for answer in answers] == [7, 7, 7]
        assert sorted(str(answer[2] and answer[2]["code"]) for answer in answers) == ["None", "conflict", "conflict"]
        assert peer.refused("EXPLAIN", container_id="another")["code"] == "not_found"
        clear(peer, "raced")
        peer.send(launch)  # answered, so the number is free again
        assert peer.receive()[2] is None
        clear(peer, "raced")
