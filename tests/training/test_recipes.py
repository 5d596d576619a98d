"""Every recipe of `configs/`, in its debug form, trains end to end."""

import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path

from diht_jax.config import load_recipe
from diht_jax.sharding import path_name
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from tests.recipes import RECIPES, REPOSITORY

# Its debug form is that of `diht_vitb16` but for two numbers.
CLEAN = REPOSITORY / "configs" / "diht_vitb16_clean.py"
# Arguments beside `debug`; without them the recipe trains like that of the demo.
ARGUMENTS = {"cifar10_finetune": ",train=probe"}


def test_the_recipe_for_clean_data_differs_in_alpha_and_beta(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    config = load_recipe(CLEAN, "debug=True")
    config.loss.update(alpha=1.0, beta=0.25)
    assert config == load_recipe(CLEAN.with_stem("diht_vitb16"), "debug=True")


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if path != CLEAN], ids=lambda path: path.stem
)
def test_debug_form_trains(path, labelled, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    recipe = load_recipe(path)
    config = load_recipe(path, "debug=True" + ARGUMENTS.get(path.stem, ""))
    assert config.loss == recipe.loss and config.mesh == recipe.mesh
    config.data.train = str(labelled)
    state = train(config, tmp_path)
    assert int(state.step) == 4
    if path.stem in ARGUMENTS:
        trained = {path_name(path) for path, _ in tree_leaves_with_path(state.opt_state)}
        trained = {name.partition("/mu/")[2] for name in trained if "/mu/" in name}
        assert trained == {"vision/projection/kernel"}
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert len(losses) == 4 and np.isfinite(losses).all()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
