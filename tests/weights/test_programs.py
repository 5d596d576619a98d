"""Exported programs give the model's embeddings for any batch size, in other runtimes."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from diht_jax import load_model
from diht_jax.export import export_model
from diht_jax.weights import export
from tests import make

TEXTS = ["a red heart", "Two men aren't playing chess in the café", "x"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return make.write_run(folder, make.tiny_config(model__overrides__vocab_size=49408))


@pytest.fixture(scope="module")
def expected(run):
    """Maps each tower to its inputs and the embeddings of `load_model`."""
    model = load_model(run, dtype="float32", devices=jax.devices()[:1])
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    tokens = model.tokenize(TEXTS)
    return {
        "image": (images, model.encode_image(images)),
        "text": (tokens, model.encode_text(tokens)),
    }


def read_stablehlo(folder, tower):
    return jax.export.deserialize(bytearray((folder / f"{tower}.stablehlo").read_bytes()))


def test_stablehlo(run, expected, tmp_path):
    sizes = {}
    for dtype, folder in (("float32", "out"), ("bfloat16", "smaller")):
        export_model(run, "stablehlo", tmp_path / folder, dtype=dtype)
        sizes[dtype] = (tmp_path / folder / "text.stablehlo").stat().st_size
    assert sizes["bfloat16"] < 0.55 * sizes["float32"]
    images, embeddings = expected["image"]
    found = read_stablehlo(tmp_path / "smaller", "image").call(images)
    np.testing.assert_allclose(found, embeddings, rtol=0, atol=0.02)
    for tower, (inputs, embeddings) in expected.items():
        program = read_stablehlo(tmp_path / "out", tower)
        assert {"cpu", "cuda", "tpu"} <= set(program.platforms)
        for rows in (len(inputs), 1):
            np.testing.assert_allclose(
                program.call(inputs[:rows]), embeddings[:rows], rtol=0, atol=1e-5
            )
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokens = expected["text"][0]
    assert [tokenizer.encode(text).ids for text in TEXTS] == [
        row[: row.argmax() + 1].tolist() for row in tokens
    ]
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["vision_cfg"]["image_size"] == 16


SIGLIP = {
    "class_token": False,
    "vision_pool_heads": 2,
    "vision_projection": "none",
    "embed_dim": 32,
    "text_projection": "bias",
    "causal_text": False,
    "text_pool": "last",
}


@pytest.mark.parametrize("overrides", [{}, SIGLIP], ids=["clip", "siglip"])
def test_onnx(overrides, tmp_path, recwarn):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    config = make.tiny_config()
    config.model.overrides.update(vocab_size=600, **overrides)
    run = make.write_run(tmp_path / "run", config)
    export_model(run, "onnx", tmp_path / "out")
    model = load_model(run, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    tokens = rng.integers(0, 599, (3, 24), dtype=np.int32)
    tokens[:, 9] = 599  # the end of text
    for tower, inputs, expected in (
        ("image", images, model.encode_image(images)),
        ("text", tokens, model.encode_text(tokens)),
    ):
        session = onnxruntime.InferenceSession(tmp_path / "out" / f"{tower}.onnx")
        (argument,) = session.get_inputs()
        for rows in (len(inputs), 1):
            (found,) = session.run(None, {argument.name: inputs[:rows]})
            np.testing.assert_allclose(found, expected[:rows], rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not [w for w in recwarn if w.filename == export.__file__]


def test_onnx_without_its_packages(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install torch .* 'stablehlo'"):
        export_model(run, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
