"""Which images the heads learn from."""

import hashlib

import numpy as np
import pytest

from data_prep.labelling.embeddings import key_ranks
from data_prep.labelling.examples import is_held_out


def test_split_by_keys_is_fair_and_independent():
    hashes = np.array(
        [
            int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "little")
            for i in range(20_000)
        ],
        np.uint64,
    )
    ranks = [key_ranks(hashes, seed) for seed in (0, 1)]
    for rank in ranks:
        assert 0 <= rank.min() < rank.max() < 1
        np.testing.assert_allclose(np.histogram(rank, 10, (0, 1))[0], 2000, atol=200)
    assert abs(np.corrcoef(*ranks)[0, 1]) < 0.03
    assert is_held_out(hashes, 0.1, 0).mean() == pytest.approx(0.1, abs=0.01)
    assert is_held_out(hashes[5:], 0.1, 0).tolist() == is_held_out(hashes, 0.1, 0)[5:].tolist()
