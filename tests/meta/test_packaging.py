"""What is shipped: the wheel and the sdist have everything, and what is installed from the sdist works without a checkout.

A build that follows the symlinks of contrib/import-root first gives empty archives without a word of complaint; that is
what these tests are for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".toml", ".S", ".bin", ".typed"}

pytestmark = pytest.mark.slow


def shipped_files() -> set[str]:
    """Every file of the kernel and the plug-ins that a running mesocosm may need, as paths in the repository."""
    return {
        str(path.relative_to(REPOSITORY))
        for folder in ("kernel", "plugins")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it (not from the checkout), by their kind."""
    pytest.importorskip("build", reason="build is not installed (pip install -e .[dev])")
    pytest.importorskip("hatchling", reason="hatchling is not installed (pip install -e .[dev])")
    out = tmp_path_factory.mktemp("dist")
    told = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(REPOSITORY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def test_the_wheel_has_every_file_of_the_kernel_and_the_plug_ins(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = set(wheel.namelist())

    assert {f"mesocosm/{name}" for name in shipped_files()} <= names
    assert not [name for name in names if not name.startswith(("mesocosm/kernel/", "mesocosm/plugins/", "mesocosm-"))]


def test_the_sdist_has_the_tests_the_examples_and_the_licence_and_not_the_symlinked_view(archives: dict[str, Path]) -> None:
    with tarfile.open(archives["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}

    assert shipped_files() <= names
    assert {"LICENSE", "README.md", "Makefile", "tests/conftest.py", "contrib/examples/hello/pod.toml"} <= names
    assert not [name for name in names if name.startswith("contrib/import-root")]


def test_an_install_from_the_sdist_has_a_working_command(archives: dict[str, Path], tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, str(archives["sdist"])], check=True, env=environment, cwd=tmp_path)

    program = "from mesocosm.kernel import hookimpl, Plan, Effect, Step, Fact; print(hookimpl.project_name)"
    imported, helped = (
        subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        for argv in ([str(python), "-I", "-c", program], [str(venv / "bin" / "meso"), "--help"])
    )

    assert imported.stdout == "mesocosm\n", imported.stderr
    assert helped.returncode == 0, helped.stderr
    assert "run" in helped.stdout


def test_every_entry_point_names_a_module_that_is_shipped() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    modules = [module for group in project["entry-points"].values() for module in group.values()]

    absent = [
        module
        for module in modules
        if not {f"{(path := module.removeprefix('mesocosm.').replace('.', '/'))}.py", f"{path}/__init__.py"} & shipped_files()
    ]

    assert absent == []
