"""The probability that a pair is right, against Bayes' rule in float64; ids of equal pairs."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diht_jax.extras.noisy_pairs import right_probabilities
from diht_jax.input.examples import DecodeExample
from diht_jax.records.schema import Record
from tests import make
from tests.losses.test_noisy_pairs import NUM_PAIRS, pairs

NOISE_SHARE = 0.25


def test_they_are_bayes_rule_on_any_mesh_and_in_any_order():
    image_emb, text_emb = pairs()
    similarities = image_emb @ text_emb.T
    wrong, variance = similarities.mean(), similarities.var()
    right = wrong + (np.diagonal(similarities).mean() - wrong) / (1 - NOISE_SHARE)

    def density(mean):
        return np.exp(-((np.diagonal(similarities) - mean) ** 2) / (2 * variance))

    of_right, of_wrong = (1 - NOISE_SHARE) * density(right), NOISE_SHARE * density(wrong)
    expected = of_right / (of_right + of_wrong)
    assert expected.min() < 0.2 < 0.8 < expected.max()
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    by_example = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    probabilities = jax.jit(
        lambda *emb: right_probabilities(*emb, NOISE_SHARE), in_shardings=by_example
    )
    order = np.random.default_rng(0).permutation(NUM_PAIRS)
    found = np.asarray(probabilities(*(np.float32(x[order]) for x in pairs())))
    np.testing.assert_allclose(found, expected[order], rtol=1e-4)
    # If right pairs do not stand out, all get the same probability: the loss without weights.
    opposed = probabilities(np.float32(image_emb), np.float32(-text_emb))
    np.testing.assert_allclose(opposed, 1 - NOISE_SHARE, rtol=1e-6)


def test_ids_are_equal_for_equal_tokens_or_equal_classes():
    image = make.png()

    def pair_id(caption, class_key="kind", **metadata):
        keys = {"pair_ids": True, "class_key": class_key}
        decode = DecodeExample(8, 16, (1, 1), "{caption}", **keys)
        record = Record("key", image, caption, metadata)
        found = decode.plan(record, np.random.default_rng(0))()["pair_ids"]
        assert found.dtype == np.uint32 and found.shape == (2,)
        return tuple(found)

    # Ids depend on the tokens, which drop capitals and trailing spaces.
    assert pair_id("A dog ") == pair_id("a dog") != pair_id("a cat")
    assert pair_id("a dog", kind=3) == pair_id("a cat", kind=3) != pair_id("a dog", kind=4)
    assert pair_id("a dog", kind="3") != pair_id("a dog", kind=3) != pair_id("a dog")
    assert pair_id("a dog", class_key=None, kind=3) == pair_id("a dog")
    ids = {pair_id(f"number {i}")[word] for i in range(500) for word in (0, 1)}
    assert len(ids) == 1000
