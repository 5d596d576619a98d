"""Several texts in a row of the text tower: where they are put, and the work that it saves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax.hardware.flops import count_flops
from diht_jax.models.packing import find_starts, pack
from diht_jax.models.parameters import merge_model, model_definition
from diht_jax.models.transformer import Execution
from tests import make

ARCH = make.small_architecture(
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


def test_packing_does_a_share_of_the_work():
    params = jax.eval_shape(INIT, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((16, ARCH.context_length), np.int32)

    def work(method, **execution):
        definition = dataclasses.replace(DEFINITION, execution=Execution(**execution))

        def encode(params, tokens):
            return getattr(merge_model(definition, params), method)(tokens)

        return count_flops(encode, params, tokens).matmul_flops

    # Scanned layers compute all tokens of the last block, as packed texts do.
    padded = work("encode_text", scan_layers=True)
    packed = work("encode_packed_texts", texts_per_row=4, packing_fallback=False)
    assert packed < 0.26 * padded
