"""Shares of sources in a run: exact in every window, and each source's own positions used once."""

import collections
from fractions import Fraction

import numpy as np
import pytest

from diht_jax.input.mixture_weights import MAX_CYCLE, MixtureWeights, exact_shares, make_cycle


def fractions(*values):
    return [Fraction(value) for value in values]


def windows(values, source, length):
    """How many entries of every window of a length are of a source."""
    before = np.cumsum([0, *(np.asarray(values) == source)])
    return before[length:] - before[:-length]


@pytest.mark.parametrize(
    "weights",
    [
        ("0.8", "0.2"),
        ("1/2", "1/4", "1/4"),
        ("2/3", "1/3"),
    ],
)
@pytest.mark.parametrize("num_streams", [1, 3 * 7 * 11])
def test_every_window_of_one_by_the_weight_has_its_example(weights, num_streams):
    """With a number of streams that has no factor in common with the length of the cycle."""
    weights = fractions(*weights)
    if num_streams > 1 and make_cycle(weights).size % 3 == 0:
        num_streams //= 3
    shares = MixtureWeights([(0, weights)], num_streams=num_streams, batch_size=4 * num_streams)
    sources = [shares.find(position)[0] for position in range(2000)]
    for source, weight in enumerate(weights):
        if weight.numerator == 1:
            assert set(windows(sources, source, weight.denominator)) == {1}
        for length in range(1, 40):
            found = set(windows(sources, source, length).tolist())
            low, high = int(length * weight), -int(-length * weight // 1)
            assert found <= set(range(low - (len(weights) > 2), high + 1 + (len(weights) > 2)))


SCHEDULE = [(0, fractions("0.8", "0.2", 0)), (3, fractions(1, 1, 1)), (10, fractions(0, 1, 1))]


@pytest.mark.parametrize("num_streams", [1, 4, 6, 12])
def test_own_positions_are_used_once_and_stay_in_their_stream(num_streams):
    shares = MixtureWeights(SCHEDULE, num_streams=num_streams, batch_size=12)
    rows = [shares.find(position) for position in range(12 * 60)]
    used = collections.defaultdict(list)
    for position, (source, own) in enumerate(rows):
        assert own % num_streams == position % num_streams
        used[source, own % num_streams].append(own // num_streams)
    for counts in used.values():
        assert counts == list(range(len(counts)))
    for position in range(0, len(rows), num_streams):
        before = collections.Counter(source for source, _ in rows[:position])
        assert shares.counts(position) == [before[source] for source in range(3)]
    # The schedule: nothing of the third source before step 3, nothing of the first from 10 on.
    assert 2 not in {source for source, _ in rows[: 3 * 12]}
    assert 0 not in {source for source, _ in rows[10 * 12 :]}


def test_shares_are_those_of_the_weights_however_they_are_typed():
    assert exact_shares(fractions("0.8", "0.2")) == fractions("4/5", "1/5")
    assert exact_shares(fractions(30, 10)) == fractions("3/4", "1/4")
    sizes = fractions(413_871_335, 1_000_003, 7)
    rounded = exact_shares(sizes)
    assert sum(rounded) == 1 and min(rounded) > 0
    for share, size in zip(rounded, sizes, strict=True):
        assert abs(share - size / sum(sizes)) <= Fraction(3, MAX_CYCLE)
