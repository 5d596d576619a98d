"""Import layers: imports point down, form no cycles, and keep the core light."""

import subprocess
import sys

import grimp
import numpy as np
from importlinter.application.use_cases import lint_imports
from importlinter.configuration import configure
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tests.make import REPOSITORY

PACKAGES = ("diht_jax", "data_prep")
HEAVY = (
    "torch",
    "torchvision",
    "spacy",
    "easyocr",
    "ray",
    "tensorflow",
    "duckdb",
    "jinja2",
    "sentencepiece",
)


def test_the_contracts_of_pyproject_hold(capsys):
    """Checks `[tool.importlinter]`, lazy imports included; a new package must be added there."""
    configure()
    kept = lint_imports(config_filename=str(REPOSITORY / "pyproject.toml"), cache_dir=None)
    assert kept, capsys.readouterr().out


def test_no_circle_of_imports():
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    names = sorted(graph.modules)
    numbers = {name: number for number, name in enumerate(names)}
    edges = [
        (numbers[name], numbers[imported])
        for name in names
        for imported in graph.find_modules_directly_imported_by(name)
    ]
    matrix = coo_array((np.ones(len(edges)), np.transpose(edges)), shape=(len(names),) * 2)
    _, circle_of = connected_components(matrix, connection="strong")
    sizes = np.bincount(circle_of)
    assert [name for name, circle in zip(names, circle_of, strict=True) if sizes[circle] > 1] == []


def test_only_storage_opens_stores_locks_and_retries():
    graph = grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)
    packages = {"fsspec", "fcntl", "filelock", "tenacity", "backoff", "s3fs", "gcsfs"}
    importers = {
        name
        for package in packages & graph.modules
        for name in graph.find_modules_that_directly_import(package)
    }
    assert {name for name in importers if not name.startswith("diht_jax.storage.")} == set()
    assert importers


def test_workers_of_data_prep_start_without_jax():
    # A spawned worker imports the main module of its command first.
    modules = ", ".join(f"data_prep.{name}" for name in ("filter", "label", "duplicates.__main__"))
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=120).returncode == 0


def test_core_imports_without_heavy_packages():
    paths = sorted(REPOSITORY.glob("diht_jax/**/*.py"))
    modules = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    lines = [
        "import importlib, sys",
        "import diht_jax",
        "diht_jax.load_model",
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))",
        f"found = [name for name in {HEAVY!r} if name in sys.modules]",
        "sys.exit(f'imported: {found}' if found else 0)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
