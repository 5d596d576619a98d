"""The commands in the documentation: all are parsed by their own parsers, and some run."""

import re

import pytest
from absl import flags

from data_prep.duplicates import config as duplicates_config
from data_prep.example_data.registry import EXAMPLES
from data_prep.filtering import config as filter_config
from data_prep.labelling import config as label_config
from diht_jax.config.checks import validate_config
from diht_jax.config.keys import check_ranges
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.evaluation.tasks import VALIDATION
from diht_jax.fewshot import task_text
from diht_jax.training.recipe import all_keys
from tests.docs.commands import Command, find_commands, parse_command, run_in_one_process
from tests.docs.pages import REPOSITORY

# In order: page, start of the command, and flags that are appended to it or replaced in it.
_NO_SPOTTER = "--config.text_spotting=False"
_PREP, _EVALUATE = "docs/guides/prepare/", "docs/guides/evaluate/"
RUN = (
    (_PREP + "records.md", "data_prep.synthetic", "--num_pairs=32 --num_retrieval=16"),
    (_PREP + "records.md", "data_prep.filter --config prep/convert", ""),
    (_PREP + "filter.md", "data_prep.filter --config prep/cat --config.input='runs", _NO_SPOTTER),
    (_PREP + "filter.md", "data_prep.filter --explain", ""),
    (_PREP + "decisions.md", "data_prep.filter --config prep/cat --config.min", _NO_SPOTTER),
    (_PREP + "decisions.md", "data_prep.filter --replay", ""),
    (_PREP + "decisions.md", "data_prep.reports --input=/data/kept_a", ""),
    ("docs/guides/train/train.md", "diht_jax.train --config demo:debug=True", ""),
    (_EVALUATE + "evaluate.md", "diht_jax.evaluate --model runs/try", "--num_resamples=0"),
    (_EVALUATE + "evaluate.md", "diht_jax.evaluate --compare", ""),
    (_EVALUATE + "weights.md", "diht_jax.export --model runs/try", ""),
    (_EVALUATE + "weights.md", "diht_jax.embed --model runs/try", ""),
)
# Additional flags for every run of a module: they keep the run small and inside its folder.
SMALLER = {
    "data_prep.synthetic": "--num_classification=13 --num_workers=1",
    "data_prep.filter": "--config.num_workers=0",
    "diht_jax.train": "--config.model.overrides.vision_layers=1 "
    "--config.model.overrides.text_layers=1 --config.model.overrides.vocab_size=700",
}
REPLACED = (("/data/kept_a,/data/kept_b", "runs/kept,runs/records"), ("/data/both", "runs/both"))
COMMANDS = find_commands()
BY_HAND = {"captions_web.txt"}  # docs/guides/example_data.md names its origin
# Default recipes for commands inside a sentence, which may omit them.
RECIPES = {
    "diht_jax.train": "configs/demo.py",
    "diht_jax.compile": "configs/demo.py",
    "data_prep.filter": "configs/prep/convert.py",
    "data_prep.label": "configs/prep/concepts.py",
}
CHECKS = {
    "data_prep.filter": filter_config.check_config,
    "data_prep.label": label_config.check_config,
    "data_prep.duplicates": duplicates_config.check_config,
}


def own_commands():
    """Returns the distinct command lines of this project's modules on all pages."""
    found = {(c.module, *c.arguments): c for c in COMMANDS if has_parser(c.module)}
    return list(found.values())


def has_parser(module):
    """Returns whether a module of ours defines flags; one without flags would start to work."""
    path = REPOSITORY.joinpath(*module.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    return file.is_file() and re.search(r"(?m)^    (command_line|app)\.run\(", file.read_text())


def parse(command: Command) -> None:
    """Raises SystemExit or ValueError for invalid flags, keys, values or tasks."""
    arguments = [re.sub(r"\$\w+", "0", text) for text in command.arguments]
    is_part = command.is_inline or command.is_for_cluster or "..." in arguments
    arguments = [text for text in arguments if text != "..."]
    # The recipe would count the records of a folder that does not exist here.
    arguments = [re.sub(r"\bown_data:data=[\w/]+", "own_data:pairs=1000", a) for a in arguments]
    has_recipe = any(text.startswith("--config=") or text == "--config" for text in arguments)
    if is_part and command.module in RECIPES and not has_recipe:
        arguments = ["--config", RECIPES[command.module], *arguments]
    if is_part and command.module == "diht_jax.train":
        arguments = ["--workdir=x", *arguments]

    def check(options):
        given = flags.FLAGS
        if options.get("config_defaults") and given.config is not None:
            defaults = options["config_defaults"]()
            validate_config(given.config, defaults)
            if command.module in CHECKS:
                CHECKS[command.module](given.config)
            else:
                check_ranges(given.config, all_keys())
            if command.module == "diht_jax.train" and given.config.concepts.object_weight:
                data = f"{given.config.data.train} {given.config.data.labels}"
                assert re.search("label|DATA", data), "the recipe learns labels that these lack"
        texts = given.tasks if command.module == "diht_jax.evaluate" else []
        if command.module == "diht_jax.fewshot":
            texts = [task_text(given.task, given.train), task_text(given.task, given.test)]
        for text in texts:
            if text == VALIDATION:  # data of the run, which does not exist here
                continue
            # Parsing these would read the data; tests/evaluation/sources/test_downloads.py does so.
            if not re.search(
                "clip_benchmark:|datacomp:|=list:|=open_images:|=objectnet:|class_names=", text
            ):
                parse_tasks(text)

    parse_command(command.module, arguments, check)


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY))


@pytest.mark.parametrize("command", own_commands(), ids=lambda c: f"{c.page}:{c.text[10:60]}")
def test_command_is_parsed(command):
    parse(command)
    # No command reads a file next to the checkout, which only our machines have.
    files = {name for example in EXAMPLES.values() for name in example.files} | {"pictures"}
    missing = set(re.findall(r"runs/data/([\w./]+)", command.text)) - files - BY_HAND
    assert not missing and "../" not in command.text
    if not command.is_inline:  # runs leave a clone clean: outputs are outside or git-ignored
        outputs = re.findall(r"\b(?:output|workdir|index|lists)[= ]['\"]?([^\s']+)", command.text)
        assert all(re.match(r"runs/|/|\w+://|[A-Z$]", path) for path in outputs)


def small_workspace(folder):
    """Creates a checkout with recipes and with the models that the pages name."""
    checkout = folder / "checkout"
    for name in ("demo_output", "runs"):
        (checkout / name).mkdir(parents=True)
    for link, target in (
        ("configs", REPOSITORY / "configs"),
        *(("demo_output/filtered_concepts", "../runs/try"), ("demo_output/web", "../runs/web")),
        *(("runs/raw.json", "try.json"), ("runs/filtered.json", "try.json")),
    ):
        (checkout / link).symlink_to(target)
    return checkout


def test_commands_run(tmp_path):
    checkout, argv = small_workspace(tmp_path), []
    for page, beginning, behind in RUN:
        (command,) = [
            command
            for command in COMMANDS
            if command.page == page
            and " ".join(command.text.split()).startswith(f"python -m {beginning}")
        ]
        arguments = [text.replace(*REPLACED[0]).replace(*REPLACED[1]) for text in command.arguments]
        has_config = "--config" in arguments or command.module != "data_prep.filter"
        extra = "" if not has_config else SMALLER.get(command.module, "")
        argv.append((command.module, [*arguments, *behind.split(), *extra.split()]))
    run_in_one_process(argv, checkout)
    written = "web/val_retrieval.tar kept/report.html both/report.html lists/dropped.tsv "
    written += "try/metrics.jsonl try.html exported/open_clip_config.json filtered.compared.png"
    missing = [name for name in written.split() if not (checkout / "runs" / name).is_file()]
    assert not missing, sorted(map(str, checkout.rglob("*")))[:80]
    assert list((checkout / "runs/embedded").glob("*.npz"))
