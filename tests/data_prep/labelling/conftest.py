"""A filtered and a labelled folder that the tests of the label command share; made once."""

import sys

import numpy as np
import pytest

from data_prep.filter import run_filter
from data_prep.label import run_label
from tests.data_prep.filtering.jobs import job_config, write_table
from tests.data_prep.labelling.pictures import (
    COLORS,
    NAMES,
    NUM_IMAGES,
    TEACHER,
    draw,
    label_config,
)


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """`kept`: 90 pictures in 3 filtered shards, the last picture without a concept; `labelled`."""
    folder = tmp_path_factory.mktemp("label")
    (folder / "quarters.py").write_text(TEACHER)
    rng = np.random.default_rng(0)
    rows, pictures = [], {}
    for i in range(NUM_IMAGES):
        color, name = list(COLORS)[i % 3], NAMES[rng.integers(2)]
        pictures[f"{i}.png"] = draw(color, name, rng)
        caption = "nothing" if i == NUM_IMAGES - 1 else f"a {color} {name} in the rain"
        rows.append({"image": f"{i}.png", "caption": caption, "n": i})
    config = job_config(write_table(folder, rows, pictures), folder / "kept", concepts=True)
    config.source.rows_per_shard = config.examples_per_shard = 32
    assert run_filter(config) == {}
    sys.path.insert(0, str(folder))
    assert run_label(label_config(folder / "kept", folder / "labelled")) == {}
    yield folder
    sys.path.remove(str(folder))
