"""Positions for longer texts, against Long-CLIP's code and other libraries."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from diht_jax import load_model
from diht_jax.data.tokenizer import VOCAB_SIZE
from diht_jax.export import export_model
from diht_jax.models.parameters import stretch_positions
from diht_jax.weights.source import read_weights
from tests.weights.conftest import SMALL, open_clip_config, open_clip_model


def long_clip_table(table):
    """Stretches positions like Long-CLIP's released code (model/longclip.py, `load_from_clip`)."""
    length, width = table.shape
    keep = 20
    new = np.zeros((4 * length - 3 * keep, width))
    new[:keep] = table[:keep]
    for i in range(length - 1 - keep):
        for part in range(4):
            step = (4 - part) * table[i + keep] / 4 + part * table[i + 1 + keep] / 4
            new[4 * i + part + keep] = step
    for part in range(4):
        last = table[length - 1] + part * (table[length - 1] - table[length - 2]) / 4
        new[4 * length - 3 * keep - 4 + part] = last
    return new


def test_positions_are_stretched_as_long_clip_does():
    table = np.random.default_rng(0).standard_normal((77, 5)).astype(np.float32)
    expected = long_clip_table(table)
    assert len(expected) == 248
    np.testing.assert_allclose(stretch_positions(table, 248), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        stretch_positions(table, 100), stretch_positions(table, 248)[:100]
    )
    # Beyond 248 the factor is 236 / 57, so the last position is extrapolated no farther than there.
    longest = np.asarray(stretch_positions(table, 256))
    np.testing.assert_array_equal(longest[:20], table[:20])
    source = 20 + 235 * 57 / 236
    np.testing.assert_allclose(
        longest[255], table[76] + (source - 76) * (table[76] - table[75]), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(stretch_positions(table, 32), table[:32])
    assert stretch_positions(table, 77) is table or (stretch_positions(table, 77) == table).all()
    with pytest.raises(ValueError, match="of 21 tokens cannot be stretched to 30: the first 20"):
        stretch_positions(table[:21], 30)
    half = stretch_positions(table.astype("bfloat16"), 248)
    assert half.dtype == "bfloat16"


def test_a_stretched_model_embeds_as_open_clip_with_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    arch = dataclasses.replace(
        SMALL, context_length=24, text_layers=1, vision_layers=1, vocab_size=VOCAB_SIZE
    )
    other = open_clip_model(arch)
    torch.save(other.state_dict(), tmp_path / "a.pt")
    open_clip = pytest.importorskip("open_clip")
    longer = dataclasses.replace(arch, context_length=36)
    stretched = open_clip.model.CLIP(**open_clip_config(longer)).eval()
    state = other.state_dict()
    table = long_clip_table(state["positional_embedding"].numpy())
    assert len(table) == 36
    state["positional_embedding"] = torch.from_numpy(table.astype(np.float32))
    state.pop("attn_mask", None)
    stretched.load_state_dict(state, strict=False)

    model = load_model(tmp_path / "a.pt", context_length=36)
    assert model.context_length == 36 == model.config.model.overrides.context_length
    tokens = model.tokenize(["a photo", "many words " * 13, "longer than that " * 20])
    assert tokens.shape == (3, 36) and (tokens[2] != 0).all()
    with torch.no_grad():
        expected = stretched.encode_text(torch.from_numpy(tokens), normalize=True).numpy()
    np.testing.assert_allclose(model.encode_text(tokens), expected, atol=2e-6)
    # Texts of up to 20 tokens have the same embedding as before.
    short = load_model(tmp_path / "a.pt").encode_text("a photo")
    np.testing.assert_allclose(model.encode_text("a photo"), short, atol=1e-6)

    export_model(
        str(tmp_path / "a.pt"), "huggingface", tmp_path / "out", context_length=36, image_size=None
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["max_position_embeddings"] == 36
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 36
    back = read_weights(tmp_path / "out")
    np.testing.assert_allclose(back.params["text"]["positional_embedding"], table, atol=1e-6)
