"""Runs README and quickstart, command by command, in a folder without the repository.

A server in this process replaces the downloads by small packages.
"""

import json
import os
import re
import subprocess

from tests.data_prep.example_data import small_packages as small
from tests.docs.commands import find_commands, run_commands, run_in_one_process
from tests.docs.pages import REPOSITORY, python_blocks
from tests.serving import FileServer

QUICKSTART = "docs/quickstart.md"
# Paths that the commands for emoji and for own pictures read and write.
FOLLOWED = re.compile(r"\bruns/(data|emoji|pictures|index|own|pairs)\b")
# Shortens the runs to seconds; all other settings are the recipes' own.
SHORTER = {
    "data_prep.filter": ["--config.num_workers=0"],
    "diht_jax.train": [
        "--config.total_steps=6",
        "--config.data.batch_size=12",
        "--config.model.overrides.vision_layers=1",
        "--config.model.overrides.text_layers=1",
        "--config.model.overrides.vocab_size=700",
    ],
    "diht_jax.evaluate": ["--num_resamples=10", "--batch_size=16"],
    "diht_jax.search": ["--batch_size=16"],
}


def commands_of(page):
    """Yields modules and arguments, without the servers that never exit."""
    for command in find_commands():
        is_followed = any(FOLLOWED.search(text) for text in command.arguments)
        if command.page == page and is_followed and "--serve" not in command.arguments:
            yield command.module, [*command.arguments, *SHORTER.get(command.module, [])]


def download_examples(commands, monkeypatch, folder):
    """Runs the commands that make examples in this process, with small packages."""
    files = small.replace_packages(monkeypatch, small.small_packages())
    with FileServer(files) as server:
        flags = [f"--mirror={server.url}", f"--packages={folder}"]
        run_commands([(module, [*arguments, *flags]) for module, arguments in commands])


def test_readme_and_quickstart_from_nothing_to_results(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    commands = [*commands_of("README.md"), *commands_of(QUICKSTART)]
    downloads = [command for command in commands if command[0] == "data_prep.examples"]
    download_examples(downloads, monkeypatch, tmp_path / "packages")
    page = (REPOSITORY / QUICKSTART).read_text("utf-8")
    for line in re.findall(r"(?m)^    (mkdir .* tar -xf .*)$", page):  # unpacks pictures
        subprocess.run(line, shell=True, check=True)
    pages = (REPOSITORY / "README.md", REPOSITORY / QUICKSTART)
    blocks = [("-c", [block]) for path in pages for block in python_blocks(path)]
    rest = [each for n, each in enumerate(commands) if each not in [*downloads, *commands[:n]]]
    assert {module for module, _ in rest} == set(SHORTER)
    printed = run_in_one_process([*rest, *blocks], work)
    (own,) = json.loads((work / "runs/own.json").read_text())["results"]
    (emoji,) = json.loads((work / "runs/emoji.json").read_text())["results"]
    assert own["task"] == "validation" and 0 < own["counts"]["images"] < 20
    assert emoji["counts"]["images"] == len(small.EMOJI)
    assert (work / "runs/search.html").is_file() and os.listdir(work) == ["runs"]
    assert re.search(r"\d  red heart\n", printed)
