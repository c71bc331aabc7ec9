"""What every file of the repository keeps: an opening docstring, one concept's length, no vague names, no strangers' paths."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MODULES = sorted(path for folder in ("kernel", "plugins") for path in (REPOSITORY / folder).rglob("*.py"))
PYTHON = sorted([*MODULES, *(path for folder in ("tests", "contrib") for path in (REPOSITORY / folder).rglob("*.py"))])
VAGUE = re.compile(r"manager|handler|helper|utils?$|misc$|common$", re.IGNORECASE)
# Paths that exist only where somebody happened to work; a repository does not know them.
STRANGE = re.compile(r"/" + r"work/|/" + r"root/\.pyenv|/" + r"tmp/dev/")
LONGEST = 400


def name_of(path: Path) -> str:
    """A file as the report calls it."""
    return str(path.relative_to(REPOSITORY))


def is_ours(path: Path) -> bool:
    """Not part of the symlinked view, of a build or of an environment."""
    return not {"import-root", "build", "dist", ".venv", "__pycache__"} & set(path.relative_to(REPOSITORY).parts)


@pytest.mark.parametrize("path", [path for path in PYTHON if is_ours(path)], ids=name_of)
def test_a_module_opens_with_what_it_is_for(path: Path) -> None:
    text = path.read_text()

    docstring = ast.get_docstring(ast.parse(text))

    assert docstring or not text.strip(), f"{name_of(path)} has no docstring"
    assert not docstring or docstring.splitlines()[0].rstrip().endswith((".", ":", ",")) or len(docstring.splitlines()) > 1


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_has_one_concept_and_its_length(path: Path) -> None:
    lines = len(path.read_text().splitlines())

    assert lines < LONGEST


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_has_a_name_that_says_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text())
    defined = [path.stem] + [
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]

    assert [name for name in defined if VAGUE.search(name)] == []


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    argv = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this machine cannot list the repository's files: not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = REPOSITORY / name
        if path.is_file() and not path.is_symlink() and STRANGE.search(path.read_bytes().decode("utf-8", "ignore")):
            found.append(name)

    assert found == []
