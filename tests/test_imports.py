"""Imports point one way, and the core stays free of heavy packages."""

import ast
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# A module may import modules of its own layer and of lower ones; the longest name counts.
LAYERS = {
    "diht_jax.losses": 0,
    "diht_jax.pages": 1,
    "diht_jax.progress": 0,
    "diht_jax.records.escaping": 0,
    "diht_jax.storage": 0,
    "diht_jax.hardware.flops": 0,
    "diht_jax.hardware.chips": 0,
    # A config has the defaults of the terms of the objective, one of which has a decoder.
    "diht_jax.config": 1,
    "diht_jax.records": 1,
    "diht_jax.data.tfrecord": 1,
    "diht_jax.losses.term": 1,
    "diht_jax.extras": 1,
    "diht_jax.training.terms": 1,
    "diht_jax.sharding": 1,
    "diht_jax.models": 1,
    "diht_jax.data": 2,
    "diht_jax.readers": 2,
    "diht_jax.input": 2,
    "diht_jax.weights.inference": 3,
    "diht_jax.weights": 3,
    "diht_jax.evaluation": 4,
    "diht_jax.training": 5,
    "diht_jax.hardware": 6,
    "diht_jax.weights.loading": 6,
    "diht_jax.command_line": 7,
    "diht_jax.distributed": 7,
    "diht_jax.data.index": 8,
    "diht_jax.train": 8,
    "diht_jax.compile": 8,
    "diht_jax.evaluate": 8,
    "diht_jax.average": 8,
    "diht_jax.export": 8,
    "diht_jax.embed": 8,
    "diht_jax.caption": 8,
    "diht_jax.fewshot": 8,
    "diht_jax.search": 8,
    "data_prep.jobs": 10,
    "data_prep.sources": 11,
    "data_prep.captions": 11,
    "data_prep.text_spotting": 11,
    "data_prep.teachers": 11,
    "data_prep.synthetic": 11,
    "data_prep.duplicates.table": 11,
    "data_prep.batches": 12,
    "data_prep.duplicates.image_hashes": 11,
    "data_prep.duplicates.given": 11,
    "data_prep.duplicates.mapped": 11,
    "data_prep.steps": 12,
    "data_prep.reports": 13,
    "data_prep.filtering": 14,
    "data_prep.labelling": 14,
    "data_prep.duplicates": 14,
    "data_prep.filter": 15,
    "data_prep.label": 15,
    "data_prep": 15,
}
# What data_prep may use of diht_jax (and the way commands start).
DATA_PREP_MAY_IMPORT = (
    "diht_jax.config",
    "diht_jax.command_line",
    "diht_jax.data",
    "diht_jax.distributed",
    "diht_jax.input",
    "diht_jax.readers",
    "diht_jax.records",
    "diht_jax.storage",
    "diht_jax.evaluation.bootstrap",
    "diht_jax.pages",
    "diht_jax.weights.loading",
    "diht_jax.models",
    "diht_jax.progress",
    "diht_jax.weights",
)
HEAVY = ("torch", "torchvision", "spacy", "easyocr", "ray", "tensorflow")


def module_name(path: pathlib.Path) -> str:
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer_of(module: str) -> int | None:
    while module:
        if module in LAYERS:
            return LAYERS[module]
        module = module.rpartition(".")[0]
    return None


def imports_of(path: pathlib.Path) -> set[str]:
    """Full names of the modules that a file imports, at any depth of its syntax tree."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if is_module(name) else node.module for name in names)
    return found


def is_module(name: str) -> bool:
    path = REPOSITORY / pathlib.Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


SOURCES = sorted([*REPOSITORY.glob("diht_jax/**/*.py"), *REPOSITORY.glob("data_prep/**/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path):
    module = module_name(path)
    if module == "diht_jax":
        return  # the front door; its imports are lazy and only go down
    own = layer_of(module)
    assert own is not None, f"{module} belongs to no layer; add it to LAYERS"
    for imported in imports_of(path):
        if not imported.startswith(("diht_jax", "data_prep")):
            continue
        assert layer_of(imported) is not None, f"{module} imports {imported}, of no layer"
        assert layer_of(imported) <= own, f"{module} imports {imported}, a higher layer"
        if module.startswith("data_prep") and imported.startswith("diht_jax"):
            assert imported.startswith(DATA_PREP_MAY_IMPORT), f"{module} imports {imported}"


@pytest.mark.parametrize("command", ["filter", "label", "duplicates.__main__"])
def test_workers_of_data_prep_start_without_jax(command):
    # A spawned worker imports the main module of its command before it can do anything.
    code = f"import sys, data_prep.{command}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=120).returncode == 0


def test_layer_check_sees_a_wrong_arrow(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("def f():\n    from diht_jax.training import loop\n")
    assert layer_of(imports_of(path).pop()) > LAYERS["diht_jax.models"]


def test_core_imports_without_heavy_packages():
    modules = [
        module_name(path) for path in SOURCES if path.is_relative_to(REPOSITORY / "diht_jax")
    ]
    lines = [
        "import importlib, sys",
        "import diht_jax",
        "diht_jax.load_model",
        f"for name in {modules!r}: importlib.import_module(name)",
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


def test_a_config_is_validated_without_jax():
    """Workers of data_prep validate configs and must start fast."""
    code = "import sys, diht_jax.config; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)
