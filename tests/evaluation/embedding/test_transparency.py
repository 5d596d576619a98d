"""A PIL image that a user gives is seen as the data pipeline sees its file."""

import io

import numpy as np
from PIL import Image

from diht_jax.input.decode import decode_rgb


def test_transparency_is_white(tiny_model):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 32, 4), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    opened = tiny_model.preprocess(Image.open(buffer))
    np.testing.assert_array_equal(opened, tiny_model.preprocess(decode_rgb(buffer.getvalue())))
    clear = Image.fromarray(np.zeros((32, 32, 4), np.uint8))
    assert (tiny_model.preprocess(clear) == 255).all()
