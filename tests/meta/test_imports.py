"""Who imports whom: the arrows of pyproject.toml, checked by import-linter, and two rules that it cannot say."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("kernel", "plugins") for path in (REPOSITORY / folder).rglob("*.py"))


def imported_by(path: Path) -> Iterator[str]:
    """The names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def those_that_import(name: str) -> set[str]:
    """The files that import a top-level module, as paths in the repository."""
    return {
        str(path.relative_to(REPOSITORY)) for path in SOURCES if any(found.split(".")[0] == name for found in imported_by(path))
    }


def test_the_arrows_between_packages_hold() -> None:
    linter = pytest.importorskip("importlinter", reason="import-linter is not installed (pip install -e .[dev])")
    assert linter
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "contrib" / "import-root")}

    told = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert told.returncode == 0, told.stdout + told.stderr


def test_ctypes_is_imported_only_where_system_calls_live() -> None:
    elsewhere = {path for path in those_that_import("ctypes") if not path.startswith("kernel/linux/")}

    assert elsewhere == set()


def test_the_launcher_process_does_not_need_trio_or_msgspec() -> None:
    """Its size is every container's launch time: what it imports is counted in the process itself."""
    program = "import sys, mesocosm.kernel.launcher.zygote; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "contrib" / "import-root")}

    loaded = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)

    assert loaded.returncode == 0, loaded.stderr
    assert {"trio", "msgspec", "pluggy", "asyncio", "logging"} & set(loaded.stdout.split()) == set()
