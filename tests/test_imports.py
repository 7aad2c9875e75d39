"""Imports run one way, and each third-party accelerator is imported in exactly one file."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for package in ("fast_essl", "loaders") for path in (ROOT / package).rglob("*.py"))

# The one file of each optional package; triton's are the kernels, a file each.
ACCELERATORS = {
    "ffcv": ["loaders/ffcv_loader.py"],
    "nvidia": ["loaders/dali_loader.py"],
    "apex": ["fast_essl/nvidia_apex.py"],
    "matplotlib": ["fast_essl/bench/chart.py"],
    "triton": [
        *(path.relative_to(ROOT).as_posix() for path in SOURCES if path.parent.name == "kernels"),
        "loaders/views/cuda.py",
    ],
}
# From the commands down to the parts: a module imports none of the levels above its own.
LEVELS = (
    ("cli",),
    ("demo",),
    ("pretrain",),
    ("methods",),
    ("losses", "heads", "resnet"),
)


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports anywhere, function bodies included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno} is a relative import; write the whole name"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(package: str) -> list[str]:
    return [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name.split(".")[0] == package for name in imported(path))
    ]


def test_the_packages_are_there() -> None:
    assert {path.parent.name for path in SOURCES} >= {"fast_essl", "loaders", "convert", "views"}


def test_loaders_import_nothing_of_fast_essl() -> None:
    assert [path for path in importers("fast_essl") if path.startswith("loaders/")] == []


@pytest.mark.parametrize("package", ACCELERATORS)
def test_an_accelerator_is_imported_where_it_belongs(package: str) -> None:
    assert importers(package) == ACCELERATORS[package]


def test_the_trainer_imports_downwards() -> None:
    for depth, names in enumerate(LEVELS):
        above = {f"fast_essl.{name}" for level in LEVELS[:depth] for name in level}
        for name in names:
            upwards = imported(ROOT / "fast_essl" / f"{name}.py") & above
            assert not upwards, f"fast_essl/{name}.py imports {sorted(upwards)}, which stand above it"


def test_the_format_needs_no_accelerator() -> None:
    """Reading tables, manifests and recipes works where only numpy is wanted: no FFCV, no training."""
    code = "import sys, loaders.beton, loaders.manifest; print(*sorted(set(sys.modules) & {'ffcv', 'cv2'}))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == ""


def test_opening_a_loader_leaves_the_threads_alone(tmp_path: Path) -> None:
    """FFCV, when imported, sets torch and numba to one thread; a trainer that kept that would crawl."""
    code = """
import sys, numba, torch, loaders
from loaders.errors import DataError
from loaders.recipe import Recipe
torch.set_num_threads(2)
before = numba.get_num_threads(), torch.get_num_threads()
try:
    loaders.open_loader("ffcv", sys.argv[1], (Recipe(size=8),), batch_size=2)
except DataError:  # there is no such file; FFCV is imported by then
    assert "ffcv" in sys.modules
    print(before == (numba.get_num_threads(), torch.get_num_threads()))
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "none.beton")]
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "True"


def test_every_package_is_installed() -> None:
    """`pip install .` takes the listed packages only, so the list may not fall behind the folders."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in SOURCES}
    assert sorted(listed) == sorted(folders | {"fast_essl.configs"})


def test_everything_imported_is_declared() -> None:
    """A dependency that only happens to be there, through another package, is missing one day."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    names = {"pillow": "PIL", "scikit-learn": "sklearn"}
    requirements = [r.split(">")[0].split("=")[0] for r in project["dependencies"]]
    declared = {names.get(requirement, requirement) for requirement in requirements}
    used = {name.split(".")[0] for path in SOURCES for name in imported(path)}
    own = {"fast_essl", "loaders", *sys.stdlib_module_names, *ACCELERATORS}
    assert used - own == declared
