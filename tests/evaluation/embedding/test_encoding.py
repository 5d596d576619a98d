"""Encoding: every image once, in order, in batches of one shape."""

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Batching, Encoder, UnusablePair
from diht_jax.records.schema import Pair
from tests import make


class _MeanColor:
    """Embeds an image as its mean colour; enough to tell the images of these tests apart."""

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
    # One shape, so that a jitted encoder compiles once; no filling where one batch is enough.
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
