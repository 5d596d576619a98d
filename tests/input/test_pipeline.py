"""The training input: grain's order on any number of hosts and workers, and exact resume."""

import dataclasses
import os
import signal

import grain
import numpy as np
import pytest
from absl import logging

from diht_jax.input import examples, sub_batches, transforms
from diht_jax.input.examples import DecodeExample
from diht_jax.input.order import BlockOrder
from diht_jax.records.schema import Record, decode_record, encode_record
from tests.make import InMemory, encoded, noise, one_source, plain, take_batches, train_iterator


def numbered(size=23):
    """Records whose images are one grey level, the record's number."""
    images = [encoded(plain((number,) * 3, (9, 7))) for number in range(size)]
    return InMemory(
        encode_record(Record(key=str(number), image=image, caption=f"number {number}"))
        for number, image in enumerate(images)
    )


def textured():
    """Nine JPEG records of noise, so that a crop shows where it was taken."""
    images = [encoded(noise(number, (100, 80), cell=10), "JPEG") for number in range(9)]
    return InMemory(
        encode_record(Record(key=str(number), image=image, caption="noise"))
        for number, image in enumerate(images)
    )


DECODE = DecodeExample(8, 16, (0.9, 1.0), "the {caption}")


def test_the_global_order_and_its_crops_are_those_of_grains_own_graph():
    """Existing runs used this order, and any of them may be resumed."""
    source = textured()
    graph = grain.MapDataset.source(source).seed(17).shuffle().repeat()
    graph = graph.random_map(lambda data, rng: DECODE.plan(decode_record(data), rng)())
    batches = train_iterator(one_source(source, DECODE, 17), batch_size=4, seed=17, num_workers=0)
    for step, batch in enumerate(take_batches(batches, 6)):
        expected = [graph[4 * step + row] for row in range(4)]
        for name, dtype in (("images", np.uint8), ("tokens", np.int32)):
            np.testing.assert_array_equal(batch[name], [e[name] for e in expected])
            assert batch[name].dtype == dtype


def in_blocks(size, streams=4):
    """An order in blocks of three records; the remainder forms a shorter block."""
    starts = np.array([*range(0, size, 3), size])
    return BlockOrder(starts, 0, num_streams=streams, window_blocks=2)


@pytest.mark.parametrize("process_count", [1, 4, 64])
def test_any_number_of_hosts_reads_the_same_rows_and_resumes_them(process_count, monkeypatch):
    def batches(process_index, process_count):
        return train_iterator(
            one_source(textured(), DECODE, order=in_blocks(9, streams=64)),
            batch_size=64,
            seed=2,
            num_workers=0,
            process_index=process_index,
            process_count=process_count,
        )

    whole, keys = take_batches(batches(0, 1), 2), batches(0, 1).keys(first_example=64)
    monkeypatch.setattr(sub_batches, "MAX_ROWS", 5)  # several parts per batch
    state = {"next_example": 64}
    for process in range(0, process_count, max(1, process_count // 4)):
        part = batches(process, process_count)
        assert part.keys(first_example=64) == keys[process::process_count]
        part.set_state(state)
        (found,) = take_batches(part, 1)
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[1][name][process::process_count])
        assert part.get_state() == {"next_example": 128}


def test_a_batch_that_is_joined_ahead_is_not_taken_yet(monkeypatch):
    def batches(max_rows):
        monkeypatch.setattr(sub_batches, "MAX_ROWS", max_rows)
        return train_iterator(one_source(textured(), DECODE), batch_size=4, seed=0, num_workers=0)

    whole, joined = take_batches(batches(256), 6), batches(1)
    for number in (0, 1, 2):
        np.testing.assert_array_equal(next(joined)["images"], whole[number]["images"])
    state = joined.get_state()
    assert state == {"next_example": 12}
    joined.set_state({"next_example": 4})
    np.testing.assert_array_equal(next(joined)["images"], whole[1]["images"])
    joined.set_state(state)
    for number in (3, 4, 5):
        np.testing.assert_array_equal(next(joined)["images"], whole[number]["images"])
    joined.close()


@pytest.mark.parametrize("fast_decode", [True, False])
def test_fast_decoding_can_be_switched_off(fast_decode):
    """The same crop of the same image, with Pillow's exact pixels if it is off."""
    decode = DecodeExample(48, 16, (0.3, 0.9), "{caption}", fast_decode=fast_decode)
    record = decode_record(textured()[0])
    rngs = [np.random.default_rng(3) for _ in range(3)]
    exact = transforms.train_transform(transforms.decode_rgb(record.image), 48, rngs[0], (0.3, 0.9))
    fast = examples.plan_random_crop(record.image, 48, rngs[1], (0.3, 0.9))()
    assert (fast != exact).any()
    found = decode.plan(record, rngs[2])()["images"]
    np.testing.assert_array_equal(found, fast if fast_decode else exact)


class Deadly(DecodeExample):
    """Kills its own process at image 5, as long as there are files to remove."""

    def __init__(self, lives):
        super().__init__(8, 8, (1.0, 1.0), "{caption}", fast_decode=False)
        self._lives = str(lives)

    def plan(self, record, *args):
        if record.key == "5" and os.listdir(self._lives):
            os.unlink(os.path.join(self._lives, os.listdir(self._lives)[0]))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().plan(record, *args)


def read(decode, num_workers, count, **options):
    """Returns the images of some batches, and the number of bad records."""
    batches = train_iterator(
        one_source(numbered(), decode, 3),
        batch_size=4,
        seed=3,
        num_workers=num_workers,
        prefetch_batches=1,
        **options,
    )
    taken = take_batches(batches, count)
    return [batch["images"] for batch in taken], batches.skipped_records


def test_a_worker_that_dies_costs_no_example(tmp_path, monkeypatch):
    undisturbed, _ = read(Deadly(tmp_path), 0, 6)
    monkeypatch.setattr(sub_batches, "MAX_ROWS", 2)
    for number in range(2):
        (tmp_path / str(number)).touch()
    disturbed, _ = read(Deadly(tmp_path), 1, 6)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(disturbed, undisturbed)


class Crashing(DecodeExample):
    """Image 5 crashes the codec."""

    def plan(self, record, *args):
        if record.key == "5":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().plan(record, *args)


class Unreadable(DecodeExample):
    """Image 5 is a bad record."""

    def plan(self, record, *args):
        if record.key == "5":
            raise ValueError("record '5': bad")
        return super().plan(record, *args)


def test_a_picture_that_crashes_its_decoder_is_skipped_as_a_bad_one(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))

    count = 2 * -(-len(numbered()) // 4)  # two epochs: the second one already knows the record
    arguments = (8, 8, (1.0, 1.0), "{caption}")
    expected, num_bad = read(Unreadable(*arguments), 0, count, on_bad_record="skip")
    monkeypatch.setattr(sub_batches, "MAX_ROWS", 2)
    said.clear()
    found, num_skipped = read(Crashing(*arguments), 1, count, on_bad_record="skip")
    np.testing.assert_array_equal(found, expected)
    assert num_skipped == num_bad >= 2
    assert sum("record '5': its picture crashes its decoder" in text for text in said) == num_bad
    assert sum("the workers are started again" in text for text in said) == 1


def test_by_default_it_is_an_error_that_names_the_record():
    with pytest.raises(ValueError, match="record '5': its picture crashes its decoder"):
        read(Crashing(8, 8, (1.0, 1.0), "{caption}"), 1, 6)


def test_concepts_are_cut_to_k_renormalised_and_padded():
    record = Record(
        key="a",
        image=decode_record(numbered()[0]).image,
        caption="a cat",
        object_ids=np.int32([7, 3, 5]),
        object_probs=np.float32([0.5, 0.25, 0.25]),
    )
    bare = dataclasses.replace(record, object_ids=None, object_probs=None)

    def example(record, num_concepts):
        decode = DecodeExample(8, 8, (1.0, 1.0), "{caption}", num_concepts=num_concepts)
        return decode.plan(record, np.random.default_rng(0))()

    two, five = example(record, 2), example(record, 5)
    np.testing.assert_array_equal(two["object_ids"], [7, 3])
    np.testing.assert_allclose(two["object_probs"], [2 / 3, 1 / 3], rtol=1e-3)
    np.testing.assert_array_equal(five["object_ids"], [7, 3, 5, 0, 0])
    np.testing.assert_allclose(five["object_probs"], [0.5, 0.25, 0.25, 0, 0], rtol=1e-3)
    assert not five["attribute_probs"].any() and not example(bare, 5)["object_probs"].any()
    assert five["object_ids"].dtype == np.int32 and five["object_probs"].dtype == np.float32
    assert example(record, 0).keys() == {"images", "tokens"}
