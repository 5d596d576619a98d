"""Resuming with a changed config, and hosts of one job with different configs.

The tests inject the texts that hosts exchange.
"""

import fsspec
import pytest
import tokenizers
from etils import epath

from diht_jax.records.labels.shards import NO_CONCEPTS
from diht_jax.records.vocabulary import ConceptList, Vocabulary
from diht_jax.training import loop, multihost
from diht_jax.training.workdir import opening
from diht_jax.training.workdir.opening import (
    bind_order,
    check_hosts_share_config,
    check_same_run,
    check_same_start,
)
from diht_jax.training.workdir.saved_run import read_config, write_config
from tests import make
from tests.records.labels import write_labels

MIXTURE = {
    "laion": {"path": "gs://bucket/laion", "weight": 0.8},
    "curated": {"path": "/data/curated", "weight": ((0, 0.2), (100, 0.5)), "order": "global"},
}


def changed(config, changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def test_the_keys_that_differ_are_named_on_all_hosts(config, monkeypatch):
    texts, errors = [], []
    configs = [config, config, changed(config, {"optimizer.frozen": ("^vision/",), "seed": 7})]
    own = {"data.train": "/local/1", "checkpoint.staging": "/tmp/1", "data.num_workers": 3}
    configs[1] = changed(config, own)
    monkeypatch.setattr(multihost, "gather_texts", lambda text: texts.append(text) or texts[-1:])
    for one in configs:
        check_hosts_share_config(one)
    monkeypatch.setattr(multihost, "gather_texts", lambda text: texts)
    for one in configs:
        with pytest.raises(ValueError, match="processes 2 have another config") as error:
            check_hosts_share_config(one)
        errors.append(str(error.value))
    assert errors[0].endswith("Different: optimizer.frozen, seed") and len(set(errors)) == 1


@pytest.mark.parametrize("in_store, key", [(False, "--workdir"), (True, "checkpoint.staging")])
def test_hosts_that_do_not_share_the_folder_are_refused(in_store, key, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "gather_texts", lambda text: [text, ""])
    monkeypatch.setattr(opening, "_POLL_SECONDS", 0)
    run = f"memory://{tmp_path.name}/run" if in_store else str(tmp_path / "run")
    with (
        pytest.raises(ValueError, match=f"process 1 does not see .* Set .*{key} to a folder"),
        opening.open_workdir(run, str(tmp_path / "staging")),
    ):
        pass


def begun_run(config, tmp_path):
    """Returns a work directory with a checkpoint of a run with this config."""
    (tmp_path / "checkpoints" / "10").mkdir(parents=True, exist_ok=True)
    write_config(tmp_path, config)
    return epath.Path(tmp_path)


def test_auto_goes_on_in_the_order_of_the_run(config, tmp_path):
    config.data.train = "/data/kept"
    empty = epath.Path(tmp_path)
    assert bind_order(config, empty).data.order == "global"
    assert config.data.order == "auto"
    config.data.train = "gs://bucket/kept"
    # The data has moved in the meantime.
    workdir = begun_run(bind_order(config, empty), tmp_path)
    config.data.train = "/data/kept"
    assert bind_order(config, workdir).data.order == "blocks"
    check_same_run(bind_order(config, workdir), workdir)
    config.data.order = "global"
    with pytest.raises(ValueError, match="another config; changed: data.order"):
        check_same_run(bind_order(config, workdir), workdir)


@pytest.mark.parametrize("is_mixture", [False, True])
def test_labels_on_disk_of_records_in_a_store_are_read_in_the_order_of_the_store(
    is_mixture, config, tmp_path
):
    url, none = f"memory://{tmp_path.name}/kept", [NO_CONCEPTS, NO_CONCEPTS]
    kept = make.write_records(tmp_path / "kept", 3)
    fsspec.filesystem("memory").put(str(kept), f"/{tmp_path.name}/kept", recursive=True)
    vocabulary = Vocabulary(ConceptList("objects", ("o",), (1,)), ConceptList("attributes", (), ()))
    labels = str(write_labels(tmp_path / "labels", url, 3 * [none], vocabulary))
    config.data.train = {"one": {"path": labels, "weight": 1}} if is_mixture else labels
    bound = bind_order(config, epath.Path(tmp_path)).data
    assert (bound.train.one if is_mixture else bound).order == "blocks"
    local = str(write_labels(tmp_path / "local", kept, 3 * [none], vocabulary))
    config.data.train = {"one": {"path": local, "weight": 1}} if is_mixture else local
    bound = bind_order(config, epath.Path(tmp_path)).data
    assert (bound.train.one if is_mixture else bound).order == "global"


def test_a_run_without_a_checkpoint_begins_anew_with_another_config(config, tmp_path):
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp-1").mkdir(parents=True)
    config.data.train = "/data/kept"
    write_config(tmp_path, bind_order(config, epath.Path(tmp_path)))
    config.data.batch_size *= 2
    check_same_run(config, epath.Path(tmp_path))
    config.data.train = "gs://bucket/kept"
    assert bind_order(config, epath.Path(tmp_path)).data.order == "blocks"
    workdir = begun_run(read_config(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="another config; changed: data.batch_size"):
        check_same_run(config, workdir)


def test_the_tokenizer_of_an_attempt_without_a_checkpoint_is_replaced(
    config, tmp_path, monkeypatch
):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(loop, "trusted_program", fail)
    config.data.train = str(make.write_records(tmp_path / "records", 20))
    for name, words in (("one", ["cat", "dog"]), ("other", ["dog", "cat"])):
        ids = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
        (tmp_path / name).mkdir()
        model = tokenizers.models.WordLevel(ids, unk_token="<unk>")
        tokenizers.Tokenizer(model).save(str(tmp_path / name / "tokenizer.json"))
        config.model.tokenizer = str(tmp_path / name)
        with pytest.raises(MemoryError):
            loop.train(config, tmp_path / "run")
        kept, given = (tmp_path / f / "tokenizer.json" for f in ("run/tokenizer", name))
        assert kept.read_bytes() == given.read_bytes()


def test_a_mixture_keeps_its_orders_weights_and_sources_and_may_move(config, tmp_path):
    config.data.train = MIXTURE
    workdir = begun_run(bind_order(config, epath.Path(tmp_path)), tmp_path)
    stored = read_config(workdir).data.train
    assert stored.laion.order == "blocks" and stored.curated.order == "global"
    moved = bind_order(changed(config, {"data.train.laion.path": "/local/laion"}), workdir)
    assert moved.data.train.laion.order == "blocks"  # as at the run's start
    check_same_run(moved, workdir)
    with pytest.raises(ValueError, match="another config; changed: data.train.laion.weight"):
        check_same_run(
            bind_order(changed(config, {"data.train.laion.weight": 0.9}), workdir), workdir
        )
    config.data.train.third = {"path": "/data/third", "weight": 1}
    with pytest.raises(ValueError, match="another config; changed: data.train.third"):
        check_same_run(bind_order(config, workdir), workdir)


def test_another_end_of_a_run_needs_checkpoints_from_before_it(config, tmp_path):
    workdir = epath.Path(tmp_path)
    config.optimizer.update(schedule="wsd", warmup_steps=2, decay_steps=4)
    config.total_steps = 20
    for step in (10, 16, 18, 20):
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    write_config(workdir, config)

    def check(*, remove=None, **changes):
        other = changed(config, changes)
        if remove is not None:
            (workdir / "checkpoints" / remove).rmdir()
        check_same_run(other, workdir)
        check_same_start(other, workdir, num_examples=52)

    check()
    with pytest.raises(ValueError, match=r"only up to step 16 .* steps 18, 20. To go on from step"):
        check(total_steps=None, total_epochs=100.0)
    with pytest.raises(ValueError, match=r"only up to step 10 .* steps 16, 18, 20"):
        check(**{"optimizer.decay_steps": 10})
    check(remove="20")
    with pytest.raises(ValueError, match=r"steps 18\. "):
        check(total_steps=40)
    check(remove="18", total_steps=40)
    with pytest.raises(ValueError, match="only up to step 11 .* steps 16"):
        check(total_steps=15)
    with pytest.raises(ValueError, match="changed: optimizer.schedule, total_steps"):
        check(total_steps=40, **{"optimizer.schedule": "cosine"})
