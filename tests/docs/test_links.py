"""The pages refer only to existing links, anchors, files, Python names, keys and commands."""

import importlib
import json
import re

import ml_collections
import pytest

from data_prep.duplicates.config import default_config as duplicates_config
from data_prep.filtering.config import default_config as filter_config
from data_prep.labelling.config import default_config as label_config
from diht_jax.config import default_config as train_config
from tests.docs.pages import PAGES, REPOSITORY, page_name, without_code

TOP_LEVEL = ("diht_jax", "data_prep", "configs", "tests", "benchmarks", "docs", "launch", ".ci")
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))
# Attributes of a loaded model, and file names.
NOT_KEYS = {"help", "model.logit_scale", "model.pt", "model.ckpt", "model.safetensors"}

every_page = pytest.mark.parametrize("path", PAGES, ids=page_name)


def anchors(text):
    """Returns the anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def known_keys(config, prefix=""):
    """Returns the dotted names of all keys and sections."""
    found = set()
    for key in config:
        found.add(f"{prefix}{key}")
        if isinstance(config[key], ml_collections.ConfigDict):
            found |= known_keys(config[key], f"{prefix}{key}.")
    return found


CONFIGS = {
    "train": train_config,
    "filter": filter_config,
    "label": label_config,
    "duplicates": duplicates_config,
}
KEYS = set().union(*(known_keys(make()) for make in CONFIGS.values()))
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}

FILES = (".py", ".md", ".json", ".jsonl", ".npz", ".onnx", ".png", ".html", ".lock", ".stablehlo")


def is_key(name):
    """Returns whether a name, minus a final full stop, is a key, section, user task or source."""
    name = name.removesuffix(".")
    return name in KEYS | NOT_KEYS or name.startswith(("evaluation.tasks.", "data.train."))


@every_page
def test_relative_links_and_anchors_resolve(path):
    text = path.read_text("utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", without_code(text))
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(page.read_text("utf-8")), f"{target}: no such heading"


@every_page
def test_files_exist(path):
    names = "|".join(map(re.escape, TOP_LEVEL))
    pattern = rf"(?<![\w/.])(?:{names})/[\w./-]*\w\.(?:py|json|md|toml|gz|sh|png|svg)\b"
    text = re.sub(r"\]\([^)]*\)", "]", path.read_text("utf-8"))  # links have another test
    for name in re.findall(pattern, text):
        if not re.search(r"[A-Z]{3}", name):  # NAME.py is a placeholder
            assert (REPOSITORY / name).exists(), name


@every_page
def test_config_keys_exist(path):
    """Checks `loss.alpha`, with or without a value, and config.loss.alpha inside a sentence.

    The worked examples of CONTRIBUTING define other keys and are exempt.
    """
    text = path.read_text("utf-8").partition("\n## Add a ")[0]
    for name in re.findall(r"(?<![\w.])config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?![\w(])", text):
        assert name in ("py", "json") or re.search(r"\.(py|json)$", name) or is_key(name), name
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text):
        is_file = name.endswith(FILES)
        if name.partition(".")[0] in SECTIONS and not is_file:
            assert is_key(name), name


@every_page
def test_python_names_exist(path):
    """Checks names like `diht_jax.input.pipeline.TrainIterator`: modules and their attributes."""
    text = path.read_text("utf-8")
    for name in set(re.findall(r"`((?:diht_jax|data_prep)(?:\.\w+)+)(?:\([^`]*\))?`", text)):
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            folder = REPOSITORY.joinpath(*parts[:length])
            if folder.with_suffix(".py").exists() or (folder / "__init__.py").exists():
                break
        rest = parts[length:]
        target = importlib.import_module(".".join(parts[:length])) if rest else None
        for attribute in rest:
            assert hasattr(target, attribute), name
            target = getattr(target, attribute)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_benchmarks_pages_name_the_command_of_every_result(path):
    pages = (REPOSITORY / "docs" / "benchmarks").glob("*.md")
    text = "\n".join(page.read_text("utf-8") for page in pages)
    result = json.loads(path.read_text("utf-8"))
    module = re.search(r"-m (\S+)", result["command"]).group(1)
    assert path.name in text and f"python -m {module}" in text
    assert result["date_utc"] and result["machine"]["cores"] and result["machine"]["cpu"]
