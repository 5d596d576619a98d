"""Runs of FastCLIP's loss, which keep a mean of each record in their state."""

import json

import jax
import numpy as np
import pytest

from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.workdir.opening import open_data
from diht_jax.training.workdir.saved_run import write_config
from tests import make

RECORDS = 20


def saved(folder):
    return json.loads((folder / "checkpoints" / "6" / "checks" / "metadata").read_text())


def run_config(records):
    config = make.tiny_config(total_steps=6, loss__kind="fastclip", loss__gamma_epochs=2.0)
    config.model.overrides.vocab_size = 700
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
    # A mean for the records that have come, and for no others.
    order = open_data(config).sources[0].order
    seen = {order[position] for position in range(6 * 8)}
    known = np.flatnonzero(np.isfinite(state.record_means["log_image_mean"]))
    assert set(known.tolist()) == seen == set(range(RECORDS))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"matryoshka__sizes": (8,)}, "config.matryoshka.sizes=.*: not with config.loss.kind"),
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
