"""Command lines: what is understood, what is suggested, and what help teaches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mesocosm.kernel.cli import parser
from mesocosm.kernel.cli.verbs import NOT_BUILT, VERBS
from mesocosm.kernel.core.errors import SpecError


@pytest.mark.parametrize("words", [["--json", "ps"], ["ps", "--json"], ["--set", "x", "ps", "--json"]])
def test_common_options_stand_before_or_after_the_verb(words: list[str]) -> None:
    arguments = parser.parse(words)
    assert arguments.verb == "ps"
    assert arguments.json


def test_everything_after_two_dashes_is_the_command() -> None:
    arguments = parser.parse(["run", "--cpus", "2", "--", "sh", "-c", "echo --json", "--"])
    assert arguments.command == ["sh", "-c", "echo --json", "--"]
    assert not arguments.json


def test_a_misspelt_verb_is_refused_with_a_suggestion(meso: Any) -> None:
    said = meso("expalin", "x")
    assert said.code == 2
    assert "did you mean 'meso explain'?" in said.err


@pytest.mark.parametrize("verb", NOT_BUILT)
def test_a_verb_that_is_not_built_says_so_in_one_sentence(verb: str, meso: Any) -> None:
    said = meso(verb, "x", "--json")
    assert said.code == 2
    assert json.loads(said.out)["error"]["code"] == "unsupported"
    assert f"meso {verb} is not built yet" in said.err


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_and_its_exit_codes(verb: str, meso: Any) -> None:
    said = meso(verb, "--help")
    assert said.code == 0
    assert said.err == ""
    assert VERBS[verb].summary.split()[0] in said.out
    assert "example:\n  meso " + verb in said.out
    assert "exit codes:\n  0    done" in said.out


def test_help_of_all_lists_every_verb_and_fits_an_ordinary_terminal(meso: Any) -> None:
    said = meso("--help")
    assert said.code == 0
    assert all(f"\n  {verb} " in said.out for verb in VERBS)
    assert max(map(len, said.out.splitlines())) <= 110


def test_no_verb_at_all_is_bad_input_and_teaches(meso: Any) -> None:
    said = meso()
    assert said.code == 2
    assert "usage: meso VERB" in said.err


def test_an_unknown_option_is_an_error_object_with_json(meso: Any) -> None:
    said = meso("ps", "--bogus", "--json")
    assert said.code == 2
    assert json.loads(said.out)["error"]["hint"] == "meso ps --help"


def test_only_run_and_plan_take_a_command() -> None:
    with pytest.raises(SpecError, match="takes no command"):
        parser.parse(["ps", "--", "ls"])


def test_version_is_said(meso: Any) -> None:
    said = meso("--version")
    assert said.code == 0
    assert said.out.startswith("mesocosm ")
