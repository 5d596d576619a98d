"""Concept heads and the sigmoid loss in real runs: on any mesh, in micro-batches, when resumed."""

import math

import jax
import numpy as np
import pytest

import diht_jax
from diht_jax.loading import read_model
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics

LOSSES = ("loss", "contrastive_loss", "object_loss", "attribute_loss")
SIZES = ("loss_4", "loss_8", "loss_16")


@pytest.fixture
def concept_config(config, labelled):
    config.data.train = str(labelled)
    config.total_steps = 8
    config.concepts.update(
        object_weight=1.0, attribute_weight=0.5, num_objects=8, num_attributes=8, chunk_rows=1
    )
    return config


def series(workdir, name):
    return np.array([row[name] for row in read_metrics(workdir) if name in row])


def test_losses_are_the_same_on_any_mesh_and_in_micro_batches(concept_config, tmp_path):
    concept_config.matryoshka.update(sizes=(4, 8), weights=(0.5, 2.0))
    train(concept_config, tmp_path / "one", devices=jax.devices()[:1])
    concept_config.mesh.update(data=2, fsdp=4)
    concept_config.micro_batch = 8
    concept_config.model.scan_layers = True
    train(concept_config, tmp_path / "eight")
    for name in LOSSES + SIZES:
        expected = series(tmp_path / "one", name)
        assert len(expected) == 8
        np.testing.assert_allclose(
            series(tmp_path / "eight", name), expected, rtol=2e-4, atol=1e-5, err_msg=name
        )
    parts = [series(tmp_path / "one", name) for name in LOSSES[1:]]
    np.testing.assert_allclose(
        series(tmp_path / "one", "loss"), parts[0] + parts[1] + 0.5 * parts[2], rtol=1e-5
    )
    sizes = [series(tmp_path / "one", name) for name in SIZES]
    np.testing.assert_allclose(parts[0], 0.5 * sizes[0] + 2 * sizes[1] + sizes[2], rtol=1e-5)
    # Zero heads predict all ids of the head alike.
    np.testing.assert_allclose([parts[1][0], parts[2][0]], math.log(8), rtol=1e-5)
    assert parts[1][-1] < 0.8 * parts[1][0] and parts[2][-1] < 0.8 * parts[2][0]


def test_heads_are_kept_and_not_loaded(concept_config, tmp_path):
    state = train(concept_config, tmp_path / "run", devices=jax.devices()[:1], stop_after_steps=5)
    assert state.params["concept_heads"]["objects"]["kernel"].shape == (32, 8)
    assert np.asarray(state.params["concept_heads"]["objects"]["kernel"]).any()
    heads = read_model(tmp_path / "run").heads
    for name, leaves in state.params["concept_heads"].items():
        np.testing.assert_array_equal(heads[f"concept_heads.{name}.weight"].T, leaves["kernel"])
        np.testing.assert_array_equal(heads[f"concept_heads.{name}.bias"], leaves["bias"])
    assert len(heads) == 4
    model = diht_jax.load_model(str(tmp_path / "run"))
    assert model.encode_text(["a square"]).shape == (1, 16)


def test_data_without_labels_is_refused(config, tmp_path):
    config.concepts.object_weight = 1.0
    with pytest.raises(ValueError, match="carry no concept labels.*data_prep.label"):
        train(config, tmp_path)


def test_vocabularies_without_room_or_with_other_meanings_are_refused(
    concept_config, write_labelled, tmp_path
):
    device = jax.devices()[:1]
    train(concept_config, tmp_path / "run", devices=device, stop_after_steps=1)
    other = write_labelled(tmp_path / "other", names=("light", "medium", "dark"))
    concept_config.data.train = str(other)
    with pytest.raises(ValueError, match="another config; changed: concepts.object_hash"):
        train(concept_config, tmp_path / "run", devices=device)
    concept_config.concepts.num_objects = 2
    with pytest.raises(ValueError, match="num_objects=2: the data's vocabulary has 3 objects"):
        train(concept_config, tmp_path / "fresh")


def test_labels_beyond_the_vocabulary_are_refused_though_the_head_has_room(
    concept_config, write_labelled, tmp_path
):
    concept_config.data.train = str(write_labelled(tmp_path / "two", names=("dark", "medium")))
    with pytest.raises(ValueError, match=r"record 'square_\d+': object_ids .* vocabulary of 2;"):
        train(concept_config, tmp_path / "run", devices=jax.devices()[:1])
