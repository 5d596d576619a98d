"""Encoding: every image once, in order, in batches of one shape."""

import numpy as np
import pytest

from diht_jax.evaluation.embedding.encoding import Batching, Encoder
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


def test_a_diverged_model_is_refused():
    class Diverged(_MeanColor):
        def encode_image(self, images):
            return super().encode_image(images) * np.nan

    with pytest.raises(ValueError, match="image embeddings: 3 of 3 rows are not finite"):
        Encoder(Diverged(), map(_pair, range(3)), Batching(2)).images(lambda pair: None)
