"""Shares of sources in a run: exact in every window, and each source's own positions used once."""

import collections
from fractions import Fraction

import pytest

from diht_jax.input.mixture_weights import MAX_CYCLE, MixtureWeights, exact_shares


def fractions(*values):
    return [Fraction(value) for value in values]


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
