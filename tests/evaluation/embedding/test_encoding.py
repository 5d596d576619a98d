"""Encoding: every image once, in order, in batches of one shape, by one or several processes."""

import collections
import functools

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Batching, Encoder, UnusablePair
from diht_jax.evaluation.embedding.entries import Processes, Units
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair
from tests import make
from tests.evaluation.embedding.processes import Processes as Threads


class _MeanColor:
    """Embeds an image as its mean colour, which tells the images of these tests apart."""

    logit_scale = 1.0

    def __init__(self):
        self.shapes = []

    def preprocess(self, image):
        return np.asarray(image.resize((4, 4)))

    def encode_image(self, images):
        assert images.dtype == np.uint8
        self.shapes.append(images.shape)
        return images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)


def _pair(number, data=None):
    if data is None:
        data = make.encoded(make.plain((number, 255 - number, 0), (9, 7)))
    return Pair(key=f"k{number}", image=data, caption=f"c{number}")


@pytest.mark.parametrize("count", [7, 9, 16])
def test_each_image_counts_once_and_in_order(count):
    model = _MeanColor()
    pairs = map(_pair, range(count))
    encoded = Encoder(model, pairs, Batching(8, 3)).images(lambda pair: pair.caption)
    expected = [[i, 255 - i, 0] for i in range(count)]
    np.testing.assert_array_equal(encoded.image_emb, expected)
    assert encoded.notes == [f"c{i}" for i in range(count)]
    # One shape, so that a jitted encoder compiles once; no padding if one batch is enough.
    assert set(model.shapes) == {(min(count, 8), 4, 4, 3)}
    assert len(model.shapes) == -(-count // 8)


def test_unusable_pairs_are_counted_with_their_reason():
    def describe(pair):
        if pair.key == "k4":
            raise UnusablePair("no_caption")
        return pair.key

    whole = _pair(0).image
    broken = {1: b"", 2: b"no picture", 5: whole[: len(whole) // 2]}
    pairs = [_pair(i, broken.get(i)) for i in range(7)]
    encoded = Encoder(_MeanColor(), pairs, Batching(2)).images(describe)
    assert encoded.notes == ["k0", "k3", "k6"]
    assert encoded.image_emb[:, 0].tolist() == [0, 3, 6]
    assert encoded.dropped == {"image_empty": 1, "image_unreadable": 2, "no_caption": 1}
    assert encoded.dropped_keys == ["k1", "k2", "k4", "k5"]


def test_a_source_without_any_usable_image_is_refused():
    with pytest.raises(ValueError, match=r"no usable pair.*1 entries.*image_empty"):
        Encoder(_MeanColor(), [_pair(0, b"")], Batching(8)).images(lambda pair: None)
    with pytest.raises(ValueError, match="no usable pair.*0 entries"):
        Encoder(_MeanColor(), [], Batching(8)).images(lambda pair: None)


def test_a_diverged_model_is_refused():
    class Diverged(_MeanColor):
        def encode_image(self, images):
            return super().encode_image(images) * np.nan

    with pytest.raises(ValueError, match="image embeddings: 3 of 3 rows are not finite"):
        Encoder(Diverged(), map(_pair, range(3)), Batching(2)).images(lambda pair: None)


@functools.cache
def _png(number):
    return make.encoded(make.plain((number % 251, number // 251, 7), (5, 5)))


class _Source:
    """Units of 2 to 5 entries, some unusable; counts the bytes that each process reads."""

    def __init__(self, num_units, processes=None):
        self.bytes_read = collections.Counter()
        self._processes = processes
        ends = np.cumsum([2 + number * number % 7 % 4 for number in range(num_units)])
        self.units = [
            functools.partial(self._read, range(*ends_of))
            for ends_of in zip([0, *ends], ends, strict=False)
        ]

    def _read(self, numbers):
        for number in numbers:
            data = b"no picture" if number % 17 == 3 else _png(number)
            process = 0 if self._processes is None else self._processes.own.index
            self.bytes_read[process] += len(data)
            if number % 23 == 5:
                yield Skipped(f"k{number}", "bad_row", "")
            else:
                yield Pair(f"k{number}", data, f"c{number}")


def _describe(pair):
    if int(pair.key[1:]) % 29 == 11:
        raise UnusablePair("no_caption")
    return {"caption": pair.caption}


def _encode(source, limit=None, batch_size=128, processes=None):
    batching = Batching(batch_size, 1, False, processes or Processes())
    units = Units(source.units, lambda: None)
    return Encoder(_MeanColor(), units, batching, limit=limit).images(_describe)


def _together(count, num_units, **options):
    """Returns what each of `count` processes gets when they share the work, and the source."""
    threads = Threads(count)
    source = _Source(num_units, threads)

    def work():
        processes = Processes(threads.own.index, count, threads.exchange)
        return _encode(source, processes=processes, **options)

    return threads.run(work), source


def _assert_equal(found, expected):
    np.testing.assert_array_equal(found.image_emb, expected.image_emb)
    for name in ("notes", "dropped", "dropped_keys", "digest", "orders"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(("count", "batch_size"), [(2, 8), (3, 8), (64, 128), (64, 8)])
def test_each_process_reads_its_share_only(count, batch_size):
    alone = _Source(128)
    expected = _encode(alone)
    found, source = _together(count, 128, batch_size=batch_size)
    for result in found:
        _assert_equal(result, expected)
    # Together they read the source once, in about equal shares: 128 units of 2 to 5 entries.
    total = alone.bytes_read.total()
    assert source.bytes_read.total() == total and len(source.bytes_read) == count
    assert max(source.bytes_read.values()) < 1.25 * total / count + 3 * len(_png(1))


def test_a_limit_is_that_of_one_process():
    expected = _encode(_Source(40), limit=31)
    found, source = _together(4, 40, limit=31)
    for result in found:
        _assert_equal(result, expected)
    assert source.bytes_read.total() <= 4 * 31 * len(_png(1))


def test_an_error_of_one_process_ends_all():
    threads = Threads(3)
    source = _Source(40, threads)
    source.units[7] = lambda: iter([Pair("k", _png(0), "stop")])

    def refuse(pair):
        if pair.caption == "stop":
            raise ValueError("k: refused")

    def work():
        batching = Batching(8, 1, False, Processes(threads.own.index, 3, threads.exchange))
        with pytest.raises(ValueError) as raised:
            Encoder(_MeanColor(), Units(source.units, lambda: None), batching).images(refuse)
        return str(raised.value)

    there = "process 1 of 3: k: refused"
    assert threads.run(work) == [there, "k: refused", there]
