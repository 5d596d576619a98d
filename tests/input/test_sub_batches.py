"""Sub-batches: they are formed and joined so that nobody can tell it from the batches."""

import grain
import numpy as np
import pytest

from diht_jax.input import sub_batches
from diht_jax.input.pipeline import TrainIterator
from diht_jax.input.sub_batches import rows_of_part


class Draw(grain.transforms.RandomMap):
    """A record's number, and what its generator draws, in arrays of several shapes."""

    example_bytes = 8 + 4 * 6

    def for_source(self, source):
        return self

    def random_map(self, element, rng):
        return {"number": np.int64(element), "drawn": rng.random((2, 3), dtype=np.float32)}

    def plan(self, element, rng, position):
        example = self.random_map(element, rng)
        return lambda: example


def host_batches(first, count, process_index, process_count):
    """The host's batches of 24 rows on all hosts, by grain's own transforms."""
    examples = grain.MapDataset.source(range(50)).seed(7).shuffle().repeat().random_map(Draw())
    batches = examples[first + process_index :: process_count].batch(24 // process_count)
    return [batches[number] for number in range(count)]


@pytest.mark.parametrize("max_rows", [256, 4, 1])
@pytest.mark.parametrize("process_count", [1, 3])
@pytest.mark.parametrize("first", [0, 48, 31])
def test_joined_parts_are_the_batches_of_grain(monkeypatch, max_rows, process_count, first):
    monkeypatch.setattr(sub_batches, "MAX_ROWS", max_rows)
    host = {"process_index": process_count - 1, "process_count": process_count}
    batches = TrainIterator(range(50), Draw(), batch_size=24, seed=7, num_workers=0, **host)
    batches.set_state({"next_example": first})
    for expected in host_batches(first, 5, **host):
        batch = next(batches)
        assert batch.keys() == expected.keys()
        for name in expected:
            assert batch[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(batch[name], expected[name])
    batches.close()


@pytest.mark.parametrize(
    "local, rows", [(1, 1), (96, 96), (256, 256), (257, 1), (320, 160), (8192, 256), (65536, 256)]
)
def test_a_part_has_the_largest_divisor_of_the_batch_up_to_256_rows(local, rows):
    assert rows_of_part(local) == rows
