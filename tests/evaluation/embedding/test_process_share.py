"""Processes that embed together, simulated by threads: who reads what, and equal results."""

import collections
import functools

import numpy as np
import pytest

from diht_jax.evaluation.embedding import encoding
from diht_jax.evaluation.embedding.encoding import Batching, UnusablePair, encode_images
from diht_jax.evaluation.embedding.entries import Entries, ProcessRows
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair
from tests.evaluation.embedding.processes import Processes
from tests.make import encoded, plain


class _Model:
    """A mean colour; each process puts its own rows, and all get the whole result."""

    logit_scale, image_size = 1.0, 4

    def __init__(self, processes=None):
        self._processes = processes

    def preprocess(self, image):
        return np.asarray(image.resize((4, 4)))

    def find_rows(self, size):
        """Rows in blocks, one after the other; fewer rows than processes leave some without."""
        each = max(1, size // self._processes.count)
        return np.arange(size) // each == self._processes.own.index

    def encode_image(self, images):
        means = images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)
        if self._processes is None:
            return means
        own = self.find_rows(len(images))
        return self._processes.gather(np.where(own[:, None], means, 0)).sum(axis=0)


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


def _encode(source, model, limit=None, batch_size=128):
    entries = Entries(source.units, limit=limit)
    return encode_images(model, entries, _describe, batching=Batching(batch_size, 1))


def _together(monkeypatch, count, make_source, **options):
    """What each of some processes gets that share what is embedded, and their source."""
    processes = Processes(count)
    monkeypatch.setattr(
        encoding.ProcessRows,
        "of",
        lambda model, batch_size: ProcessRows.create(
            processes.own.index, batch_size, model.find_rows, processes.gather
        ),
    )
    source, model = make_source(processes), _Model(processes)
    return processes.run(lambda: _encode(source, model, **options)), source


def _assert_equal(found, expected):
    np.testing.assert_array_equal(found.image_emb, expected.image_emb)
    for name in ("notes", "positions", "dropped", "dropped_keys", "digest", "orders"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(("count", "batch_size"), [(2, 8), (3, 8), (64, 128), (64, 8)])
def test_each_process_reads_its_share_only(count, batch_size, monkeypatch):
    alone = _Source(128)
    expected = _encode(alone, _Model())
    found, source = _together(
        monkeypatch, count, lambda processes: _Source(128, processes), batch_size=batch_size
    )
    for result in found:
        if isinstance(result, Exception):
            raise result
        _assert_equal(result, expected)
    # Together they read the source once, and each about as much: here 128 units of 2 to 5 entries.
    total = alone.bytes_read.total()
    assert source.bytes_read.total() == total and len(source.bytes_read) == count
    assert max(source.bytes_read.values()) < 1.25 * total / count + 3 * len(_png(1))


def test_a_limit_is_that_of_one_process(monkeypatch):
    expected = _encode(_Source(40), _Model(), limit=31)
    found, source = _together(monkeypatch, 4, lambda processes: _Source(40, processes), limit=31)
    for result in found:
        _assert_equal(result, expected)
    assert source.bytes_read.total() <= 4 * 31 * len(_png(1))
