"""README's "Your own data", command by command, in a folder that is no checkout."""

import csv
import json
import os
import subprocess
import sys

from tests import make
from tests.compiling import xla_flags
from tests.docs.commands import find_commands

# So that it takes seconds: the settings are the recipe's own.
SHORTER = {
    "data_prep.filter": ["--config.num_workers=0"],
    "diht_jax.train": [
        "--config.total_steps=6",
        "--config.compilation_cache=",
        "--config.model.overrides.vision_layers=1",
        "--config.model.overrides.text_layers=1",
    ],
    "diht_jax.evaluate": ["--num_resamples=10", "--batch_size=16"],
    "diht_jax.search": ["--batch_size=16"],
}


def write_pictures(folder, number):
    """A folder of pictures, and the table of their captions."""
    folder.mkdir()
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for index in range(number):
            make.noise(index, size=(40, 30), cell=10).save(folder / f"{index}.png")
            rows.writerow([f"{index}.png", f"the squares of number {index}, in many colours"])


def commands_of_section():
    """Modules and arguments, with the recipes where they are."""
    for command in find_commands():
        words = {word for text in command.arguments for word in text.split("=")}
        if command.page == "README.md" and {"pictures/captions.csv", "runs/own"} & words:
            configs = f"{make.REPOSITORY}/configs/"
            arguments = [text.replace("configs/", configs, 1) for text in command.arguments]
            yield command.module, [*arguments, *SHORTER.get(command.module, [])]


def test_readme_from_pictures_to_results(tmp_path):
    write_pictures(tmp_path / "pictures", 60)
    commands = list(commands_of_section())
    assert [module for module, _ in commands] == [
        "data_prep.filter",
        "diht_jax.train",
        "diht_jax.evaluate",
        "diht_jax.search",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.commands"],
        cwd=tmp_path,
        env={
            **os.environ,
            "XLA_FLAGS": xla_flags(),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(make.REPOSITORY),
        },
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    (result,) = json.loads((tmp_path / "runs/own.json").read_text())["results"]
    assert result["task"] == "validation"
    assert 0 < result["counts"]["images"] < 20
    assert (tmp_path / "runs/search.html").is_file()
