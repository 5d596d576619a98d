"""Several texts in one row of the text tower, in shapes that never change.

A batch of texts padded to the context length is mostly padding where the context is long and most
texts are short. Packed, `b` texts share `b / texts_per_row` rows: a token sees those of its own
text before it, and has the position that it has there, so that every text is embedded as if it
were alone. Where texts do not fit, nothing is cut: see `TextTransformer.packed`. Ours; the order is
"first fit decreasing" (Johnson 1973), which needs at most 11/9 of the fewest rows, and one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Steps of the search for rows in one turn of its loop: they are short, and turns cost time on GPUs.
_UNROLL = 8


class PackedRows(NamedTuple):
    """Texts in rows, [r, t].

    Attributes:
        tokens: int32 [r, t]; 0 behind the end of a text.
        positions: int32 [r, t], of each token in its text; at most t - 1.
        texts: int32 [r, t], the number of the text that a token belongs to. What follows the
            end of a text counts as the text's, as padding does: it comes later, so nobody sees it.
        ends: int32 [b], the last token of each text, as an index in the flattened rows.
    """

    tokens: jax.Array
    positions: jax.Array
    texts: jax.Array
    ends: jax.Array


def find_starts(lengths: jax.Array, num_rows: int, row_length: int) -> tuple[jax.Array, jax.Array]:
    """Starts of the texts: the longest first, each in the first row with room for it.

    Args:
        lengths: int32 [b], tokens of each text, from 1 to `row_length`.
        num_rows: r.
        row_length: t.

    Returns:
        int32 [b], indices in the flattened rows; and whether all texts fit, without which the
        indices mean nothing.
    """
    longest_first = jnp.argsort(-lengths)
    rows = jnp.arange(num_rows)

    def put(room: jax.Array, length: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        fits = room >= length
        row = jnp.argmax(fits)
        start = row * row_length + row_length - room[row]
        return room - jnp.where(rows == row, length, 0), (start, jnp.any(fits))

    room = jnp.full(num_rows, row_length, lengths.dtype)
    _, (starts, fits) = jax.lax.scan(put, room, lengths[longest_first], unroll=_UNROLL)
    starts = jnp.zeros_like(lengths).at[longest_first].set(starts.astype(lengths.dtype))
    return starts, jnp.all(fits)


def pack(tokens: jax.Array, lengths: jax.Array, starts: jax.Array, num_rows: int) -> PackedRows:
    """Puts texts where `find_starts` wants them.

    Args:
        tokens: int32 [b, t].
        lengths: int32 [b], tokens of each text.
        starts: int32 [b]; all texts fit.
        num_rows: r.
    """
    row_length = tokens.shape[1]
    size = num_rows * row_length
    by_start = jnp.argsort(starts)
    # The first text begins with the first row, so that every token comes behind some start.
    begun = jnp.cumsum(jnp.zeros(size, jnp.int32).at[starts].add(1))
    texts = by_start[begun - 1]
    offsets = jnp.arange(size) - starts[texts]
    positions = jnp.minimum(offsets, row_length - 1)
    packed = jnp.where(offsets < lengths[texts], tokens[texts, positions], 0)
    shape = (num_rows, row_length)
    return PackedRows(
        packed.reshape(shape), positions.reshape(shape), texts.reshape(shape), starts + lengths - 1
    )
