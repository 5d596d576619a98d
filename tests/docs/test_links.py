"""What the pages name exists: links, anchors, files, modules, Python names and config keys."""

import functools
import importlib
import pathlib
import re

import ml_collections
import pytest

from data_prep.duplicates.config import default_config as duplicates_config
from data_prep.filtering.config import default_config as filter_config
from data_prep.labelling.config import default_config as label_config
from diht_jax.config import default_config as train_config
from tests.docs.pages import PAGES, REPOSITORY, page_name, without_code

TOP_LEVEL = ("diht_jax", "data_prep", "configs", "tests", "benchmarks", "docs", ".ci")
COMMAND_CONFIGS = {
    "diht_jax.train": train_config,
    "diht_jax.compile": train_config,
    "data_prep.filter": filter_config,
    "data_prep.label": label_config,
    "data_prep.duplicates": duplicates_config,
}

# Flags of other programs: pip, pytest, XLA, open_clip, Slurm, gcloud, uv, docker, aws, hf.
OTHER_FLAGS = {
    *("upgrade", "no-deps", "collect-only", "xla_force_host_platform_device_count"),
    *("local-loss", "gather-with-grad", "nodes", "ntasks-per-node", "cpus-per-task"),
    *("gpus-per-node", "signal", "requeue", "open-mode", "kill-on-bad-exit"),
    *("recurse", "zone", "user", "python", "seed", "allow-existing"),
    *("target", "tag", "gpus", "volume", "privileged", "net"),
    *("no-sign-request", "repo-type", "local-dir", "logdir", "help"),
    *("shm-size",),
}

every_page = pytest.mark.parametrize("path", PAGES, ids=page_name)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?ms)^```.*?^```", "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def known_keys(config: ml_collections.ConfigDict, prefix: str = "") -> set[str]:
    """Dotted names of all keys and sections."""
    found = set()
    for key in config:
        found.add(f"{prefix}{key}")
        if isinstance(config[key], ml_collections.ConfigDict):
            found |= known_keys(config[key], f"{prefix}{key}.")
    return found


KEYS = {command: known_keys(make()) for command, make in COMMAND_CONFIGS.items()}
ALL_KEYS = set().union(*KEYS.values())
SECTIONS = {key.partition(".")[0] for key in ALL_KEYS if "." in key}
# Of a loaded model, and file names.
NOT_KEYS = {"model.logit_scale", "model.pt", "model.ckpt", "model.safetensors"}


def is_key(name: str, keys: set[str]) -> bool:
    """A key or a section; users name their tasks and sources. A final full stop does not count."""
    name = name.removesuffix(".")
    return name in keys | NOT_KEYS or name.startswith(("evaluation.tasks.", "data.train."))


def text_of(path: pathlib.Path) -> str:
    """A page; of CONTRIBUTING without the worked examples, which have keys of their own."""
    return path.read_text("utf-8").partition("\n## Add a ")[0]


@functools.cache
def source_text() -> str:
    """All Python files together."""
    folders = ("diht_jax", "data_prep", "benchmarks", "tests")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    return "\n".join(path.read_text("utf-8") for path in files)


def commands(text: str) -> list[str]:
    """Command lines with `python -m`, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in joined.splitlines() if "-m " in line]


@every_page
def test_relative_links_and_anchors_resolve(path):
    text = path.read_text("utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
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
    for name in re.findall(pattern, path.read_text("utf-8")):
        if not re.search(r"[A-Z]{3}", name):  # NAME.py stands for any
            assert (REPOSITORY / name).exists(), name


@every_page
def test_modules_of_commands_exist(path):
    own = ("diht_jax", "data_prep", "benchmarks", "tests", "configs")
    for module in re.findall(r"-m ([\w.]+)", path.read_text("utf-8")):
        if module.startswith(own):
            file = REPOSITORY.joinpath(*module.split("."))
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


@every_page
def test_config_keys_exist(path):
    text = text_of(path)
    for line in commands(text):
        module = re.search(r"-m ([\w.]+)", line).group(1)
        for key in re.findall(r"--config\.([\w.]+)", line):
            assert is_key(key, KEYS.get(module, ALL_KEYS)), f"{module}: --config.{key}"
    for key in re.findall(r"(?<![\w.])config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?![\w(])", text):
        if key not in ("py", "json") and not re.match(r"\w+\.(py|json)$", key):
            assert is_key(key, ALL_KEYS), f"config.{key}"


@every_page
def test_flags_exist(path):
    """Each occurs as a string in the source, where it is defined."""
    for flag in re.findall(r"(?<![\w-])--([a-z][a-z_0-9-]*)", path.read_text("utf-8")):
        if flag != "config" and flag not in OTHER_FLAGS:
            assert any(f'"{prefix}{flag}"' in source_text() for prefix in ("", "--")), f"--{flag}"


@every_page
def test_keys_in_backticks_exist(path):
    """Such as `loss.alpha`, with or without a value."""
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text_of(path)):
        is_file = name.endswith((".py", ".md", ".json", ".jsonl", ".npz", ".png", ".html", ".lock"))
        if name.partition(".")[0] in SECTIONS and not is_file:
            assert is_key(name, ALL_KEYS), name


@every_page
def test_python_names_exist(path):
    """Such as `diht_jax.input.pipeline.TrainIterator`: a module, or an attribute of one."""
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


def test_checks_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "[a](nothing.md) `configs/nothing.py` `diht_jax.data.nothing` `loss.gamma`\n\n"
        "    python -m diht_jax.nothing\n"
        "    python -m diht_jax.train --config.loss.gamma=1 --no_such_flag\n"
    )
    checks = (
        test_relative_links_and_anchors_resolve,
        test_files_exist,
        test_modules_of_commands_exist,
        test_config_keys_exist,
        test_flags_exist,
        test_keys_in_backticks_exist,
        test_python_names_exist,
    )
    for check in checks:
        with pytest.raises(AssertionError):
            check(page)
