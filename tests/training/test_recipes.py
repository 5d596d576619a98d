"""The debug form of every recipe in `configs/` trains end to end, unless another test covers it."""

import jax
import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path

from diht_jax.config import load_recipe
from diht_jax.sharding import path_name
from diht_jax.training.loop import train
from diht_jax.training.workdir.opening import open_data, open_iterator
from tests.make import RECIPES, REPOSITORY
from tests.training.conftest import saved_steps, series

# Debug forms that differ from another recipe's only in numbers.
ALIKE = ("clip_vitb16", "datacomp", "diht_vitb16_clean", "diht_vitb32", "diht_vitl14_336")

# Covered by test_processes.py and tests/docs/test_readme.py.
TRAINED_BY_ITS_COMMAND = ("demo", "emoji", "own_data")

# Covered by test_stages.py, which also explains what it leaves out.
TRAINED_IN_STAGES = ("diht_vitb16", "diht_vitl14", "diht_vitb16_stages", "diht_vitl14_stages")

# The package includes its model: tests/weights/test_clipart_tiny.py.
TRAINED_IN_FULL = ("clipart_tiny",)

# Compiled in full by tests/hardware/test_compile.py; most tests here run the same step.
COMPILED = ("clip_vitb32",)

# Arguments in addition to `debug`; without them the recipe trains like the demo's.
ARGUMENTS = {"cifar10_finetune": ",train=probe"}


NOT_HERE = (*ALIKE, *TRAINED_BY_ITS_COMMAND, *TRAINED_IN_STAGES, *TRAINED_IN_FULL, *COMPILED)


@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path.stem not in NOT_HERE],
    ids=lambda path: path.stem,
)
def test_debug_form_trains(path, labelled, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    config = load_recipe(path, "debug=True" + ARGUMENTS.get(path.stem, ""))
    config.data.train = str(labelled)
    # Compiling and the vocabulary would take most of the time.
    config.model.overrides.update(vision_layers=1, text_layers=1, vocab_size=700)
    state = train(config, tmp_path, devices=jax.devices()[:1])
    assert int(state.step) == 4
    if path.stem in ARGUMENTS:
        trained = {path_name(path) for path, _ in tree_leaves_with_path(state.opt_state)}
        trained = {name.partition("/mu/")[2] for name in trained if "/mu/" in name}
        assert trained == {"vision/projection/kernel"}
    losses = series(tmp_path, "loss")
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert saved_steps(tmp_path) == [2, 4]


def test_recipe_for_clean_data_has_the_step_of_web_data():
    web, clean = (
        load_recipe(f"diht_vitb16{name}").to_dict(preserve_field_references=False)
        for name in ("", "_clean")
    )
    clean |= {"total_examples": web["total_examples"]}
    clean["loss"] |= {"alpha": web["loss"]["alpha"], "beta": web["loss"]["beta"]}
    assert clean == web


def test_a_run_with_a_small_vocabulary_reads_ids_of_it(config, squares):
    batch = next(open_iterator(config, open_data(config)))
    assert set(batch["tokens"][:, 0]) == {698} and batch["tokens"].max() == 699
    config.model.overrides.vocab_size = 64
    with pytest.raises(ValueError, match="config.model.overrides.vocab_size: expected at least"):
        open_data(config)
