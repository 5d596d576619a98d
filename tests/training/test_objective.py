"""Concept heads, the sigmoid loss and FastCLIP's loss in real runs, on any mesh and resumed.

FastCLIP keeps a mean for each record in the state.
"""

import json
import math

import jax
import numpy as np
import pytest

import diht_jax
from diht_jax.loading import read_model
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.objective import bind_data
from diht_jax.training.workdir.opening import open_data, open_iterator
from diht_jax.training.workdir.saved_run import write_config
from tests import make
from tests.training.conftest import series

LOSSES = ("loss", "contrastive_loss", "object_loss", "attribute_loss")
SIZES = ("loss_4", "loss_8", "loss_16")


@pytest.fixture(scope="module")
def with_heads(make_config, labelled, tmp_path_factory):
    """A run with concept heads and several sizes: its config, work directory and last state."""
    config, run = make_config(), tmp_path_factory.mktemp("with_heads") / "run"
    config.data.train = str(labelled)
    config.total_steps = 8
    config.concepts.update(
        object_weight=1.0, attribute_weight=0.5, num_objects=8, num_attributes=8, chunk_rows=1
    )
    config.matryoshka.update(sizes=(4, 8), weights=(0.5, 2.0))
    return config, run, train(config, run, devices=jax.devices()[:1])


@pytest.fixture
def concept_config(with_heads):
    return with_heads[0].copy_and_resolve_references()


def test_losses_are_the_same_on_any_mesh_and_in_micro_batches(with_heads, concept_config, tmp_path):
    run = with_heads[1]
    concept_config.mesh.update(data=2, fsdp=4)
    concept_config.micro_batch = 8
    concept_config.model.scan_layers = True
    train(concept_config, tmp_path)
    for name in LOSSES + SIZES:
        expected = series(run, name)
        assert len(expected) == 8
        np.testing.assert_allclose(
            series(tmp_path, name), expected, rtol=2e-4, atol=1e-5, err_msg=name
        )
    parts = [series(run, name) for name in LOSSES[1:]]
    np.testing.assert_allclose(series(run, "loss"), parts[0] + parts[1] + 0.5 * parts[2], rtol=1e-5)
    sizes = [series(run, name) for name in SIZES]
    np.testing.assert_allclose(parts[0], 0.5 * sizes[0] + 2 * sizes[1] + sizes[2], rtol=1e-5)
    # Zero heads predict all ids with equal probability.
    np.testing.assert_allclose([parts[1][0], parts[2][0]], math.log(8), rtol=1e-5)
    assert parts[1][-1] < 0.8 * parts[1][0] and parts[2][-1] < 0.8 * parts[2][0]


def test_heads_are_kept_and_not_loaded(with_heads):
    _, run, state = with_heads
    assert state.params["concept_heads"]["objects"]["kernel"].shape == (32, 8)
    heads = read_model(run).heads
    for name, leaves in state.params["concept_heads"].items():
        np.testing.assert_array_equal(heads[f"concept_heads.{name}.weight"].T, leaves["kernel"])
        np.testing.assert_array_equal(heads[f"concept_heads.{name}.bias"], leaves["bias"])
    assert len(heads) == 4
    assert set(diht_jax.load_model(run)._params) == {"vision", "text", "log_logit_scale"}


def test_labels_that_do_not_fit_the_heads_are_refused(
    with_heads, concept_config, squares, write_labelled, tmp_path
):
    other = write_labelled(tmp_path / "other", names=("light", "medium", "dark"))
    concept_config.data.train = str(other)
    with pytest.raises(ValueError, match="another config; changed: concepts.object_hash"):
        train(concept_config, with_heads[1])
    concept_config.concepts.num_objects = 2
    with pytest.raises(ValueError, match="num_objects=2: the data's vocabulary has 3 objects"):
        train(concept_config, tmp_path / "run")
    concept_config.data.train = str(squares)
    with pytest.raises(ValueError, match="carry no concept labels.*data_prep.label"):
        train(concept_config, tmp_path / "run")
    # A vocabulary of two names, although the records use the third.
    concept_config.data.train = str(write_labelled(tmp_path / "two", names=("dark", "medium")))
    bound = bind_data(concept_config)
    with pytest.raises(ValueError, match=r"record 'square_\d+': object_ids .* vocabulary of 2;"):
        next(open_iterator(bound, open_data(bound)))


RECORDS = 20


def saved(folder):
    return json.loads((folder / "checkpoints" / "6" / "checks" / "metadata").read_text())


def run_config(records):
    config = make.tiny_config(total_steps=6, loss__kind="fastclip", loss__gamma_epochs=2.0)
    config.data.train, config.data.batch_size = str(records), 8
    config.log_every_steps = 1
    return config


def test_a_run_goes_on_bit_for_bit_and_is_the_same_on_eight_devices(tmp_path):
    records = make.write_records(tmp_path / "records", RECORDS)
    config, one = run_config(records), jax.devices()[:1]
    state = train(config, tmp_path / "straight", devices=one)
    train(config, tmp_path / "stopped", devices=one, stop_after_steps=3)
    train(config, tmp_path / "stopped", devices=one)
    assert saved(tmp_path / "stopped") == saved(tmp_path / "straight")
    split = train(config, tmp_path / "split")
    shards = split.record_means["log_text_mean"].addressable_shards
    assert len({str(shard.index) for shard in shards}) == 8
    for name, values in state.record_means.items():
        np.testing.assert_allclose(split.record_means[name], values, rtol=1e-4, atol=1e-4)
    losses = [[row["loss"] for row in read_metrics(tmp_path / n)] for n in ("straight", "split")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    # Only records that have been seen have a mean.
    order = open_data(config).sources[0].order
    seen = {order[position] for position in range(6 * 8)}
    known = np.flatnonzero(np.isfinite(state.record_means["log_image_mean"]))
    assert set(known.tolist()) == seen == set(range(RECORDS))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"matryoshka__sizes": (8,)}, "config.matryoshka.sizes=.*: not with config.loss.kind"),
        ({"loss__equal_pairs": "mask"}, "config.loss.equal_pairs='mask': not with"),
        (
            {"data__allow_changed": True},
            "config.data.allow_changed=True: not with config.loss.kind",
        ),
        ({"loss__num_records": 7}, "config.loss.num_records=7: the data have 20 records"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, changes, message):
    config = run_config(make.write_records(tmp_path / "records", RECORDS))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", devices=jax.devices()[:1])


def test_a_run_does_not_go_on_with_another_number_of_records(tmp_path):
    stored = run_config(make.write_records(tmp_path / "before", RECORDS))
    stored.loss.num_records, stored.data.order = RECORDS, "global"
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    write_config(tmp_path / "run", stored)
    config = run_config(make.write_records(tmp_path / "more", RECORDS + 1))
    message = f"more: it has {RECORDS + 1} records, and .*run keeps a mean of each of {RECORDS}"
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", devices=jax.devices()[:1])
