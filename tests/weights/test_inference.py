"""A loaded model's embeddings do not depend on the batch size or the number of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from diht_jax import load_model, sharding
from diht_jax.config import default_config
from diht_jax.data import tokenizer
from diht_jax.extras.captioning import CaptionDecoder, decode_captions, merge_decoder
from diht_jax.input.transforms import normalize
from diht_jax.models import get_architecture
from diht_jax.models.parameters import ModelDefinition, merge_model, model_parameters
from diht_jax.weights.inference import LoadedModel
from diht_jax.weights.source import ModelFiles
from tests import make

ARCH = get_architecture("tiny_32px", {"vision_layers": 1, "text_layers": 1})
GRAPHDEF = ModelDefinition(ARCH, jnp.float32, jnp.float32)
PARAMS = make.draw_parameters(GRAPHDEF.init_params)


def loaded(num_devices, batch_size=16, decoder=None):
    config = default_config()
    config.model.dtype = "float32"
    mesh = sharding.create_mesh(-1, 1, jax.devices()[:num_devices])
    params = jax.device_put(PARAMS, sharding.replicated(mesh))
    files = ModelFiles(ARCH, params, "drawn", config=config, decoder=decoder)
    return LoadedModel(GRAPHDEF, files, mesh, batch_size=batch_size)


@pytest.fixture(scope="module")
def model():
    return loaded(8)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (37, 32, 32, 3)).astype(np.uint8)


def test_embeddings_equal_the_plain_model_on_every_batch_size(model, images):
    plain = merge_model(GRAPHDEF, PARAMS)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
    expected = np.asarray(plain.encode_image((images / np.float32(255) - mean) / std))
    for count in (0, 1, 16, 37):
        found = model.encode_image(images[:count])
        assert found.dtype == np.float32 and found.shape == (count, ARCH.embed_dim)
        np.testing.assert_allclose(found, expected[:count], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(loaded(1).encode_image(images[:5]), expected[:5], atol=2e-6)


def test_one_string_is_one_text(model):
    found = model.encode_text("red flag")
    assert found.shape == (1, ARCH.embed_dim)
    np.testing.assert_array_equal(found, model.encode_text(["red flag"]))
    several = [model.encode_text(texts) for texts in (["a", "b c"], np.array(["a", "b c"]))]
    np.testing.assert_array_equal(*several)
    np.testing.assert_array_equal(several[0], model.encode_text(text for text in ("a", "b c")))


def test_pictures_in_every_form_give_the_same(model, images, tmp_path):
    pictures = [Image.fromarray(image).resize((40, 50)) for image in images[:2]]
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    arrays = [np.asarray(picture) for picture in pictures]
    expected = model.encode_image(np.stack([model.preprocess(picture) for picture in pictures]))
    for several in (pictures, paths, [str(path) for path in paths], arrays, np.stack(arrays)):
        np.testing.assert_array_equal(model.encode_image(several), expected)
    mixed = [pictures[0], str(paths[1])]
    np.testing.assert_array_equal(model.encode_image(iter(mixed)), expected)
    alone = model.encode_image(pictures[0])
    assert alone.shape == (1, ARCH.embed_dim)
    for one in (paths[0], str(paths[0]), arrays[0], jnp.asarray(arrays[0])):
        np.testing.assert_array_equal(model.encode_image(one), alone)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.encode_image(np.zeros((2, 32, 32, 3))), "got float64"),
        (
            lambda m: m.encode_image("no.png"),
            r"images\[0\]: 'no.png' cannot be read .*No such file",
        ),
        (lambda m: m.encode_text(["a", 3]), r"texts\[1\]: expected a str, got int"),
        (lambda m: m.encode_text(np.zeros((2, 77), np.int32)), r"\[b, 32\], got int32 \[2, 77\]"),
    ],
)
def test_wrong_inputs_are_refused(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.fixture(scope="module")
def decoder():
    """A decoder that depends more on the image than on previous tokens."""
    arch = dataclasses.replace(ARCH, context_length=7)
    built = CaptionDecoder(arch, 1, rngs=nnx.Rngs(params=jax.random.key(1)))
    params = model_parameters(built)
    cross = params["blocks"]["0"]["cross_attention"]
    cross["v_proj"]["kernel"] *= 8
    cross["out_proj"]["kernel"] *= 40
    return params


def test_captions_whatever_the_batch_and_the_devices(decoder, images):
    on_two, in_fives = loaded(2, decoder=decoder), loaded(1, 5, decoder=decoder)
    options = {"top_k": 5, "temperature": 3.0}
    drawn = on_two.caption(images, **options, seed=1)
    assert len(drawn) == len(images) and len(set(drawn)) > 5
    assert in_fives.caption(list(images), **options, seed=1) == drawn
    assert in_fives.caption(images, **options, seed=2) != drawn
    assert in_fives.caption(images[:0]) == []

    # Greedy captions are what the decoder generates from the tokens of the normalised images.
    plain = merge_model(GRAPHDEF, PARAMS)
    image_tokens = jax.jit(plain.vision.tokens)(normalize(images[:3], jnp.float32))
    written = decode_captions(
        merge_decoder(decoder, ARCH, dtype=jnp.float32),
        image_tokens,
        jax.random.split(jax.random.key(0), 3),
        start_id=tokenizer.START_OF_TEXT_ID,
        end_id=tokenizer.END_OF_TEXT_ID,
        length=6,
    )
    assert in_fives.caption(images[:3]) == [tokenizer.decode(row) for row in np.asarray(written)]


def test_captions_that_cannot_be_written(model, decoder, images):
    with pytest.raises(ValueError, match="max_tokens=6: expected 1 to 5"):
        loaded(1, decoder=decoder).caption(images[:1], max_tokens=6)
    with pytest.raises(ValueError, match="no caption decoder: it was trained without config.capt"):
        model.caption(images[:1])


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='bf16'"):
        load_model("clipart_tiny", dtype="bf16")
