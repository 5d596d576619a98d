"""The three walks of CONTRIBUTING.md: commands enter the named files in the given order."""

import json
import re

import pytest

from tests import make
from tests.contributing.blocks import GUIDE

CAPTIONS = [f"a brown dog is chasing a small cat in garden {i}" for i in range(16)]


def named_files(title):
    """Returns the file that each numbered step of a walk names."""
    text = GUIDE.read_text("utf-8").partition(f"### {title}\n")[2].partition("\n##")[0]
    return re.findall(r"(?m)^\d+\. `([\w/]+\.py)`", text)


def enter(commands):
    """Returns the files that each of the commands enters."""
    done = make.run_command("tests.contributing.walk", *" + ".join(commands).split())
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Maps the title of each walk to the files that its command enters."""
    folder = tmp_path_factory.mktemp("walks")
    pairs = make.write_pair_tar(folder / "pairs.tar", CAPTIONS)
    commands = {
        "Filter": f"data_prep.filter --config=configs/prep/cat.py --config.input={pairs} "
        f"--config.output={folder}/kept --config.num_workers=0 --config.text_spotting=False",
        "Train": "diht_jax.train --config=configs/emoji.py:debug=True "
        f"--config.data.train={folder}/kept --workdir={folder}/run "
        "--config.total_epochs=None --config.total_steps=2 --config.data.batch_size=16 "
        "--config.data.num_workers=0 --config.model.overrides.vision_layers=1 "
        "--config.model.overrides.text_layers=1 --config.model.overrides.vocab_size=700",
        "Evaluate": f"diht_jax.evaluate --model={folder}/run --output={folder}/result.json "
        f"--tasks=retrieval:{pairs}?caption_template={{caption}}",
    }
    return dict(zip(commands, enter(commands.values()), strict=True))


@pytest.mark.parametrize("title", ["Filter", "Train", "Evaluate"])
def test_commands_enter_the_named_files_in_that_order(walks, title):
    named = named_files(title)
    assert len(named) >= 6
    assert [name for name in walks[title] if name in named] == named
