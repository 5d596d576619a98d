"""Stages of a recipe: each continues from the end of the previous one, also after a stop.

The recipe is `diht_vitl14_stages` in its debug form; `diht_vitb16_stages` and the recipes of one
stage only differ from it in numbers.
"""

import functools
import json
import signal
import types

import jax
import numpy as np
import pytest
from absl import flags

from diht_jax.config import load_recipe
from diht_jax.data.tokenizer import tokenize
from diht_jax.input.pipeline import TrainIterator
from diht_jax.models.parameters import resize_positions, stretch_positions
from diht_jax.train import load_stages, train_stages
from diht_jax.training import initial_parameters
from diht_jax.training.loop import Run, train
from diht_jax.training.multihost import Stopped
from diht_jax.training.recipe import duration_in_steps
from diht_jax.training.workdir.opening import open_data
from diht_jax.training.workdir.saved_run import write_config
from tests.docs.commands import parse_command
from tests.training.conftest import labelled_square

BATCH, STEPS = 16, 2
LENGTHS = (32, 77, 77)  # tokens per text, by stage
STAGES = (1, 2, 3)


def load(number, data):
    config = load_recipe("diht_vitl14_stages", f"debug=True,stage={number}")
    config.data.train, config.total_steps, config.optimizer.warmup_steps = str(data), STEPS, 1
    # Compiling and the vocabularies would take most of the time.
    config.model.overrides.update(vision_layers=1, text_layers=1, vocab_size=700)
    config.concepts.update(num_objects=3, num_attributes=2)
    return config


def run_stages(data, workdir):
    stages = [load(number, data) for number in STAGES]
    train_stages(functools.partial(train, devices=jax.devices()[:1]), stages, str(workdir))


def final_checks(workdir):
    """Returns checksums of all arrays, and the position in the data, at the end of each stage."""
    found = {}
    for stage in STAGES:
        folder = workdir / f"stage_{stage}" / "checkpoints" / str(STEPS)
        for item in ("checks", "data"):
            found[stage, item] = json.loads((folder / item / "metadata").read_text())
    return found


@pytest.fixture(scope="module")
def straight(labelled, tmp_path_factory):
    """Uninterrupted stages: their folder, their first and last states, their texts."""
    workdir, runs = tmp_path_factory.mktemp("straight"), []
    first_state, loop, take = Run.first_state, Run.loop, TrainIterator.__next__

    def spy_first(run):
        state = first_state(run)
        runs.append({"first": jax.tree.map(np.array, state), "tokens": []})
        return state

    def spy_batch(iterator):
        batch = take(iterator)
        runs[-1]["tokens"].append(np.array(batch["tokens"]))
        return batch

    def spy_last(run, *args):
        state = loop(run, *args)
        runs[-1]["last"] = jax.tree.map(np.array, state)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "first_state", spy_first)
        patch.setattr(Run, "loop", spy_last)
        patch.setattr(TrainIterator, "__next__", spy_batch)
        run_stages(labelled, workdir)
    return workdir, runs


def test_a_stage_begins_with_the_parameters_that_the_one_before_has_ended_with(straight):
    _, (before, after, _) = straight
    expected, found = before["last"].params, after["first"].params
    fitted = {
        "vision": resize_positions(expected["vision"]["positional_embedding"], 16),
        "text": stretch_positions(expected["text"]["positional_embedding"], LENGTHS[1]),
    }
    for tower, positions in fitted.items():
        assert positions.shape != expected[tower]["positional_embedding"].shape
        expected[tower]["positional_embedding"] = np.asarray(positions)
    assert "concept_heads" in expected
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert after["first"].step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after["first"].opt_state))


def test_a_stage_goes_on_in_the_data_where_the_one_before_has_stopped(straight, labelled):
    _, runs = straight
    order = open_data(load(1, labelled)).sources[0].order
    for stage, (length, run) in enumerate(zip(LENGTHS, runs, strict=True)):
        positions = range(stage * STEPS * BATCH, (stage + 1) * STEPS * BATCH)
        captions = [labelled_square(order[position]).caption for position in positions]
        seen = np.concatenate(run["tokens"][:STEPS])
        np.testing.assert_array_equal(seen, tokenize(captions, length, 700))


def test_stops_at_the_borders_of_stages_change_nothing(straight, labelled, tmp_path, monkeypatch):
    """After the last step of the first stage, and after the first step of the last stage."""
    take, steps = Run.next_batch, []

    def one_step(run, stop_request):
        steps.append(run.config.stage.number)
        if len(steps) in (STEPS, 2 * STEPS + 1):
            signal.raise_signal(signal.SIGTERM)
        return take(run, stop_request)

    monkeypatch.setattr(Run, "next_batch", one_step)
    for _ in range(2):
        with pytest.raises(Stopped):
            run_stages(labelled, tmp_path)
    run_stages(labelled, tmp_path)
    assert steps == [number for number in STAGES for _ in range(STEPS)]
    assert final_checks(tmp_path) == final_checks(straight[0])


def test_the_command_gives_its_keys_to_all_stages():
    found = []
    given = ["--config=diht_vitb16_stages:debug=True", "--workdir=x", "--config.data.train=DATA"]
    more = ["--config.optimizer.weight_decay=0.3", "--config.data.num_workers=None"]
    parse_command(
        "diht_jax.train",
        [*given, *more, "--config.total_examples=64"],
        lambda options: found.extend(load_stages(flags.FLAGS.config)),
    )
    assert len(found) == 2
    for number, config in enumerate(found, 1):
        expected = load_recipe("diht_vitb16_stages", f"debug=True,stage={number}")
        expected.data.update(train="DATA", num_workers=None)
        expected.optimizer.weight_decay = 0.3
        expected.update(total_steps=None, total_examples=64)
        assert config.to_dict() == expected.to_dict()


def test_a_stage_alone_takes_the_one_before_from_the_same_work_directory():
    trained = []
    config = load_recipe("diht_vitl14_stages", "stage=2")
    train_stages(lambda *arguments: trained.append(arguments), load_stages(config), "RUN")
    assert trained == [(config, "RUN/stage_2")]
    assert config.stage.previous == "RUN/stage_1"
    config.stage.number = None  # all stages would start from the same model
    with pytest.raises(ValueError, match="config.stage.previous=RUN/stage_1: all stages would"):
        load_stages(config)


@pytest.mark.parametrize(
    "previous, changes, message",
    [
        (None, {"stage.number": None}, "config.stage.count=3: the stages are runs of their own"),
        (None, {}, "config.stage.number=2: it would start from nothing"),
        ("finished", {"data.batch_size": 24}, "32 examples, which are no multiple"),
        ("finished", {"model.overrides.text_width": 64}, "its parameter text/blocks"),
        ("unfinished", {}, "reached step 2 of 5"),
        ("finished", {"data.validation_share": 0.2}, "on some of the records that 0.2 and 0 hold"),
    ],
)
def test_a_stage_that_cannot_begin_is_refused(
    straight, labelled, tmp_path, previous, changes, message
):
    folder, config = straight[0] / "stage_1", load(2, labelled)
    if previous == "unfinished":
        (tmp_path / "unfinished").mkdir()
        (tmp_path / "unfinished" / "checkpoints").symlink_to(folder / "checkpoints")
        folder, longer = tmp_path / "unfinished", load(1, labelled)
        longer.total_steps = 5
        write_config(folder, longer)
    config.stage.previous = previous and str(folder)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", devices=jax.devices()[:1])


def test_the_epochs_of_a_stage_are_those_of_the_records_that_it_was_trained_on(
    labelled, monkeypatch
):
    """A later stage may hold out fewer records, or none."""
    first, config = load(1, labelled), load(2, labelled)
    first.data.validation_share, first.total_steps, first.total_epochs = 0.5, None, 2.0
    steps = duration_in_steps(first, "total", num_examples=open_data(first).num_records)
    before = types.SimpleNamespace(config=first, step=steps)

    def read_position(folder):
        raise ValueError("it is finished")

    monkeypatch.setattr(initial_parameters, "restore_model", lambda folder, mesh: before)
    monkeypatch.setattr(initial_parameters, "read_position", read_position)
    config.stage.previous = "RUN"
    for change, message in (
        (0, "it is finished"),
        (-1, f"has reached step {steps - 1} of {steps}"),
    ):
        before.step = steps + change
        with pytest.raises(ValueError, match=message):
            initial_parameters.end_of_stage(config, None, None, {}, mixture=open_data(config))
