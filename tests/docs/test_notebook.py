"""The notebook runs in an empty folder without a network, and matches its .py file."""

import json

import pytest

from tests.compiling import xla_flags
from tests.docs.pages import REPOSITORY

SOURCE = REPOSITORY / "docs/notebooks/first_steps.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


def test_notebook_is_that_of_the_python_file():
    jupytext = pytest.importorskip("jupytext")
    expected, found = (
        [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
        for path in (SOURCE, NOTEBOOK)
    )
    assert found == expected  # to fix: jupytext --update --to ipynb docs/notebooks/first_steps.py
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text())["cells"])


# The students of the recipe's debug form, made smaller.
SMALLER = """
from diht_jax import config as _config

_load = _config.load_recipe

def _load_smaller(name):
    if name != "demo":
        return _load(name)
    config = _load(name, "debug=True")
    config.data.batch_size = 16
    config.model.overrides.update(vision_layers=1, text_layers=1, vocab_size=700)
    return config

_config.load_recipe = _load_smaller
"""


def test_notebook_runs_without_a_network(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("spacy")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    monkeypatch.setenv("FIRST_STEPS_PAIRS", "60")
    monkeypatch.setenv("FIRST_STEPS_STEPS", "1")
    for scheme in ("http", "https", "all"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")  # no server listens there
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMALLER))
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
    ).execute()
    shown = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 3  # matches, graphs, the student's matches
    for name in ("raw", "kept"):
        rows = (tmp_path / "first_steps" / f"student_{name}" / "metrics.jsonl").read_text()
        assert json.loads(rows.splitlines()[-1])["step"] == 1
