"""Which checkpoints are kept, and how damaged ones and a full disk are handled."""

import shutil

import jax
import numpy as np
import pytest

from diht_jax import load_model, sharding
from diht_jax.training.monitoring.metrics import MetricWriter, read_metrics
from diht_jax.training.step import TrainState
from diht_jax.training.workdir.checkpoint import BestStep, Checkpointer, SaveError
from diht_jax.training.workdir.saved_run import tree_checksums, write_config
from tests import make
from tests.training.conftest import saved_steps
from tests.waiting import wait_until


def position(next_example):
    return {"next_example": next_example}


def state_of(step, value=0.0, size=64):
    replicated = sharding.replicated(sharding.create_mesh(8, 1))
    rng = np.random.default_rng(step)
    tree = TrainState(
        step=np.int32(step),
        params={"w": value + rng.standard_normal((size, 64)).astype(np.float32)},
        opt_state={"mu": np.zeros(3, np.float32)},
        key_data=np.array([1, 2], np.uint32),
    )
    return jax.tree.map(lambda leaf: jax.device_put(leaf, replicated), tree)


def restore(workdir):
    checkpointer = Checkpointer(workdir, keep_last=5)
    state, found, _ = checkpointer.restore(state_of(0))
    return checkpointer, state, found


@pytest.mark.parametrize(
    "keep_last, lower_is_better, scores, kept",
    [
        (2, False, {1: 0.1, 2: 0.9, 3: 0.3, 4: None, 5: 0.2, 6: None}, [2, 5, 6]),
        (1, False, {1: 0.3, 2: 0.1, 3: float("nan"), 4: 0.9}, [4]),
        (1, True, {1: 7, 2: 9, 3: -np.inf, 4: 2}, [4]),
    ],
)
def test_the_last_ones_and_the_best_one_stay(tmp_path, keep_last, lower_is_better, scores, kept):
    best = BestStep(lower_is_better)
    checkpointer = Checkpointer(tmp_path, keep_last=keep_last, best=best)
    for step, score in scores.items():
        checkpointer.save(state_of(step), position(step * 10))
        if score is not None:
            best.values[step] = score
    checkpointer.close()
    assert saved_steps(tmp_path) == kept


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_steps")
    checkpointer = Checkpointer(folder, keep_last=5)
    for step in (1, 2):
        checkpointer.save(state_of(step), position(step * 10))
    checkpointer.close()
    return folder


def array_file(checkpoint):
    """Returns the largest array file, with `w`: random numbers do not compress."""
    return max(checkpoint.glob("state/**/d/*"), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "find, damage, cause",
    [
        (array_file, truncate, '"params.w'),
        # Orbax itself reads it without an error.
        (array_file, flip_a_bit, "values differ from what was saved in params/w"),
        (
            lambda folder: folder / "data" / "metadata",
            lambda path: path.write_text('{"next_example":90}'),
            "2/data: its contents are not what was saved",
        ),
        (lambda folder: folder / "checks" / "metadata", flip_a_bit, "2/checks"),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    two_steps, tmp_path, caplog, find, damage, cause
):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    damage(find(tmp_path / "checkpoints" / "2"))
    checkpointer, state, found = restore(tmp_path)
    assert int(state.step) == 1 and found == position(10)
    assert "the checkpoint of step 2 is damaged" in caplog.text and cause in caplog.text
    assert saved_steps(tmp_path) == [1] and (tmp_path / "corrupt_checkpoints" / "2-0").is_dir()
    checkpointer.save(state_of(2), position(20))
    checkpointer.close()
    checkpointer, state, _ = restore(tmp_path)
    checkpointer.close()
    assert int(state.step) == 2


def test_without_any_whole_checkpoint_the_error_says_why_for_each(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        truncate(tmp_path / "checkpoints" / str(step) / "data" / "metadata")
    with pytest.raises(ValueError, match=r"no checkpoint can be read \(step 2: .*step 1: "):
        restore(tmp_path)
    assert saved_steps(tmp_path) == [1, 2]


def mixed(bits):
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    return bits ^ bits >> 16


def test_checksums_are_those_of_the_definition_on_any_mesh():
    values = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
    bits = values.view(np.uint32).ravel().tolist()
    expected = sum(mixed((value + i * 0x9E3779B9) % 2**32) for i, value in enumerate(bits))
    for data, fsdp in ((8, 1), (2, 4)):
        mesh = sharding.create_mesh(data, fsdp)
        array = jax.device_put(values, sharding.batch_sharding(mesh))
        assert tree_checksums({"a": {"b": array}}) == {"a/b": expected % 2**32}
    assert tree_checksums({"n": np.int32(-1)}) == {"n": mixed(2**32 - 1)}
    flipped = values.copy()
    flipped.view(np.uint32)[3, 2] ^= 1 << 31
    assert tree_checksums([flipped]) != tree_checksums([values])
    flipped.view(np.uint32)[7, 1] ^= 1 << 31
    assert tree_checksums([flipped]) != tree_checksums([values])
    assert tree_checksums([values[::-1].copy()]) != tree_checksums([values])


def test_on_a_full_disk_the_earlier_checkpoint_stays_and_the_run_goes_on(mount_tmpfs, caplog):
    small_disk = mount_tmpfs("size=2m")
    size = 2000  # 0.5 MB per state
    checkpointer = Checkpointer(small_disk / "run", keep_last=1)
    checkpointer.save(state_of(1, size=size), position(10))
    checkpointer._finish_saving()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_200_000))
    writer = MetricWriter(small_disk / "run", 0, make.tiny_config())
    checkpointer.save(state_of(2, size=size), position(20))
    checkpointer.save(state_of(3, size=size), position(30))
    assert "the checkpoint of step 2 could not be written, that of step 1 is intact" in caplog.text
    assert "No space left" in caplog.text or "RESOURCE_EXHAUSTED" in caplog.text
    with pytest.raises(SaveError, match="step 3 could not be written, that of step 1 is"):
        checkpointer.close()
    checkpointer = Checkpointer(small_disk / "run", keep_last=1)
    restored, found, _ = checkpointer.restore(state_of(0, size=size))
    assert int(restored.step) == 1 and found == position(10)

    # Temporary folders are removed in the background.
    wait_until(lambda: not list((small_disk / "run" / "checkpoints").glob("*tmp*")))
    with open(small_disk / "rest", "wb", buffering=0) as rest:
        while True:
            try:
                rest.write(bytes(4096))
            except OSError:
                break
    writer.write(1, {f"name_{i}": i for i in range(1000)})
    assert "a line is kept for later" in caplog.text and read_metrics(small_disk / "run") == []
    ballast.unlink()
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert [row["step"] for row in read_metrics(small_disk / "run")] == [1, 2]
    checkpointer.save(state_of(4, size=size), position(40))
    checkpointer.close()
    assert saved_steps(small_disk / "run") == [4]


def test_load_model_says_what_is_missing(config, tmp_path):
    for name, message in (("nothing", "no such work directory"), ("", "config.json is missing")):
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / name)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match="config.json: expected a JSON object"):
        load_model(tmp_path)
    write_config(tmp_path, config)
    with pytest.raises(ValueError, match="kept no moving average"):
        load_model(tmp_path, ema=True)
