"""Several texts in a row of the text tower: where they lie, and that nobody sees the others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diht_jax.hardware.flops import count_flops
from diht_jax.models import Architecture
from diht_jax.models.packing import find_starts, pack
from diht_jax.models.parameters import merge_model, model_definition
from diht_jax.models.transformer import Execution

ARCH = Architecture(
    image_size=16,
    patch_size=8,
    vision_layers=1,
    vision_width=16,
    vision_heads=2,
    text_layers=2,
    text_width=16,
    text_heads=2,
    embed_dim=8,
    context_length=24,
    vocab_size=64,
)
DEFINITION, INIT = model_definition(ARCH, jnp.float32, jnp.float32)
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def first_fit_decreasing(lengths, num_rows, row_length):
    """Starts by the book, None where a text finds no row."""
    rooms, starts = [row_length] * num_rows, [None] * len(lengths)
    for text in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for row, room in enumerate(rooms):
            if room >= lengths[text]:
                starts[text] = row * row_length + row_length - room
                rooms[row] -= lengths[text]
                break
    return starts


def test_texts_lie_where_first_fit_decreasing_puts_them():
    num_rows, row_length = 5, 12
    find = jax.jit(functools.partial(find_starts, num_rows=num_rows, row_length=row_length))
    outcomes = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 4 + seed % 4, 20).astype(np.int32)
        expected = first_fit_decreasing(lengths.tolist(), num_rows, row_length)
        starts, fits = find(lengths)
        assert bool(fits) == (None not in expected)
        outcomes.add(bool(fits))
        if fits:
            assert starts.tolist() == expected
            tokens = rng.integers(1, 50, (20, row_length)).astype(np.int32)
            _check_rows(pack(jnp.asarray(tokens), lengths, starts, num_rows), tokens, lengths)
    assert outcomes == {True, False}


def _check_rows(rows, tokens, lengths):
    flat = [np.asarray(values).reshape(-1) for values in rows[:3]]
    filled = np.zeros(flat[0].size, bool)
    for text, (end, length) in enumerate(zip(rows.ends.tolist(), lengths, strict=True)):
        own = slice(end + 1 - length, end + 1)
        assert own.start // tokens.shape[1] == end // tokens.shape[1] and not filled[own].any()
        filled[own] = True
        np.testing.assert_array_equal(flat[0][own], tokens[text, :length])
        np.testing.assert_array_equal(flat[1][own], np.arange(length))
        assert set(flat[2][own]) == {text}
    assert not flat[0][~filled].any()


@functools.cache
def parameters():
    params = jax.device_get(jax.jit(INIT)(jax.random.key(0)))
    # Positions and weights large enough that a wrong one is seen.
    params["text"]["positional_embedding"] = params["text"]["positional_embedding"] * 50
    return params


def texts(longest):
    """Texts whose largest id, their end, is one of the first `longest` tokens, others behind it."""
    rng = np.random.default_rng(longest)
    tokens = rng.integers(1, 60, (16, ARCH.context_length)).astype(np.int32)
    tokens[np.arange(16), rng.integers(1, longest, 16)] = 63
    return tokens


def encode(execution, params, tokens):
    """Embeddings, and whether the texts fitted."""
    model = merge_model(dataclasses.replace(DEFINITION, execution=execution), params)
    if execution.texts_per_row == 1:
        return model.encode_text(tokens), True
    return model.encode_packed_texts(tokens)


@functools.cache
def gradient_function(execution):
    weights = np.random.default_rng(1).standard_normal((16, ARCH.embed_dim)).astype(np.float32)

    def value(params, tokens):
        embeddings, fits = encode(execution, params, tokens)
        return jnp.sum(weights * embeddings), (embeddings, fits)

    return jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=QUICK_COMPILE)


@pytest.mark.parametrize("scan_layers, remat", [(False, "none"), (True, "dots")])
@pytest.mark.parametrize("longest, fits", [(8, True), (23, False)])
def test_packed_texts_are_embedded_as_padded_ones(scan_layers, remat, longest, fits):
    tokens = texts(longest)
    (_, (expected, _)), expected_grads = gradient_function(Execution())(parameters(), tokens)
    execution = Execution(texts_per_row=4, scan_layers=scan_layers, remat=remat)
    (_, (found, have_fitted)), grads = gradient_function(execution)(parameters(), tokens)
    assert bool(have_fitted) == fits
    np.testing.assert_allclose(found, expected, atol=2e-6)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    for leaf, other in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(leaf, other, atol=2e-6 * largest)


def test_packing_does_a_share_of_the_work():
    def work(execution):
        run = functools.partial(encode, execution)
        return count_flops(lambda *args: run(*args)[0], parameters(), texts(8)).matmul_flops

    padded = work(Execution(scan_layers=True))  # which computes all tokens of the last block
    assert work(Execution(texts_per_row=4, packing_fallback=False)) < 0.26 * padded
