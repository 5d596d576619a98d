"""Processes that embed together, simulated by threads: who reads what, and equal results."""

import collections
import functools

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Batching, Encoder, UnusablePair
from diht_jax.evaluation.embedding.entries import Entries, Processes
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair
from tests.evaluation.embedding.processes import Processes as Threads
from tests.make import encoded, plain


class _Model:
    """A mean colour."""

    logit_scale = 1.0

    def preprocess(self, image):
        return np.asarray(image.resize((4, 4)))

    def encode_image(self, images):
        return images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)


@functools.cache
def _png(number):
    return encoded(plain((number % 251, number // 251, 7), (5, 5)))


class _Source:
    """Units of 2 to 5 entries, some of them unusable; counts the bytes that each process reads."""

    def __init__(self, num_units, processes=None):
        self.bytes_read = collections.Counter()
        self._processes = processes
        ends = np.cumsum([2 + number * number % 7 % 4 for number in range(num_units)])
        self.units = [
            functools.partial(self._read, range(*ends_of))
            for ends_of in zip([0, *ends], ends, strict=False)
        ]
        self.num_entries = int(ends[-1])

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
    entries = Entries(source.units, limit=limit)
    batching = Batching(batch_size, 1, False, processes or Processes())
    return Encoder(_Model(), entries, batching).images(_describe)


def _together(count, make_source, **options):
    """What each of some processes gets that share what is embedded, and their source."""
    threads = Threads(count)
    source = make_source(threads)

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
    found, source = _together(count, lambda threads: _Source(128, threads), batch_size=batch_size)
    for result in found:
        _assert_equal(result, expected)
    # Together they read the source once, and each about as much: here 128 units of 2 to 5 entries.
    total = alone.bytes_read.total()
    assert source.bytes_read.total() == total and len(source.bytes_read) == count
    assert max(source.bytes_read.values()) < 1.25 * total / count + 3 * len(_png(1))


def test_a_limit_is_that_of_one_process():
    expected = _encode(_Source(40), limit=31)
    found, source = _together(4, lambda threads: _Source(40, threads), limit=31)
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
            Encoder(_Model(), Entries(source.units), batching).images(refuse)
        return str(raised.value)

    there = "process 1 of 3: k: refused"
    assert threads.run(work) == [there, "k: refused", there]
