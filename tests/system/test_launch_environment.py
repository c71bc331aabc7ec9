"""The launch under attack: variables and arguments. Nothing of the agent's gets in, nothing of a container's out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.system

GIVEN = {"PATH", "HOME", "HOSTNAME", "TERM", "MESOCOSM_ID", "MESOCOSM_SANDBOX"}
HOSTILE = {
    "LD_PRELOAD": "/sandbox/evil.so", "LD_LIBRARY_PATH": "/sandbox", "PYTHONHOME": "/sandbox", "PYTHONPATH": "/sandbox",
    "PYTHONSTARTUP": "/sandbox/evil.py", "MESOCOSM_RUN_DIR": "/sandbox", "MESOCOSM_SOCKET": "/sandbox/agent.sock", "IFS": "/",
}  # fmt: skip


def test_nothing_of_the_agents_environment_gets_in(attacks: Any) -> None:
    """The agent of these worlds has variables that would show: its directories, and where its modules are."""
    assert {"PYTHONPATH", "MESOCOSM_RUN_DIR", "LANG"} <= attacks.world.environment.keys()
    parent = attacks.start("sleep 60", env=HOSTILE)

    alone, nested = attacks.run(["/usr/bin/env", "-0"]), attacks.run(["/usr/bin/env", "-0"], parent=parent)

    attacks.kill(parent)
    for outcome in (alone, nested):
        assert {entry.partition("=")[0] for entry in outcome.out.split("\0") if entry} == GIVEN


def test_a_variable_that_was_asked_for_is_seen(attacks: Any) -> None:
    """The positive control: the same look sees what is there."""
    outcome = attacks.run(["/usr/bin/env", "-0"], env={"SECRET": "x"})

    assert "SECRET=x" in outcome.out.split("\0")


def test_a_containers_variables_are_its_own_programs_alone(attacks: Any) -> None:
    """Not the launcher's, which makes it, and not its child's."""
    name = attacks.start("echo started; sleep 60", env={name: value for name, value in HOSTILE.items() if name != "LD_PRELOAD"})

    child = attacks.run("echo $PYTHONHOME$MESOCOSM_SOCKET", parent=name)

    assert child.out == "\n"
    assert attacks.world.ps()[name]["state"] == "RUNNING"
    attacks.kill(name)


@pytest.mark.needs_root
def test_the_launcher_has_no_variable_of_anybodys(attacks: Any) -> None:
    variables = Path(f"/proc/{attacks.world.launcher_pid()}/environ").read_bytes().split(b"\0")

    assert {entry.partition(b"=")[0] for entry in variables if entry} == {b"PATH", b"LANG"}


@pytest.mark.parametrize("many", [1, 3], ids=["one too long", "too long together"])
def test_more_than_execve_takes_is_refused_before_anything_is_made(attacks: Any, many: int) -> None:
    """A small stack limit makes that as little as 128 KiB."""
    size = 131_072 if many == 1 else 60_000

    outcome = attacks.run(["/bin/echo", *["x" * size] * many], limits={"stack": 256 * 1024})

    assert outcome.error["code"] == "bad_input"
    assert outcome.error["path"] == "$.command"
    assert {"have", "need"} <= outcome.error.keys()


@pytest.mark.parametrize("where", ["arguments", "environment"])
def test_as_much_as_execve_takes_arrives_whole(attacks: Any, where: str) -> None:
    """The positive control, a few bytes below what the test above is refused for."""
    texts = ["x" * 60_000, "y" * 60_000]
    limits = {"stack": 256 * 1024}

    if where == "arguments":
        outcome = attacks.run(["/bin/sh", "-c", 'echo "${#1} ${#2}"', "sh", *texts], limits=limits)
    else:
        outcome = attacks.run("echo ${#A} ${#B}", env=dict(zip("AB", texts, strict=True)), limits=limits)

    assert (outcome.code, outcome.out) == (0, "60000 60000\n")
