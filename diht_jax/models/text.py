"""The text tower: CLIP's causal transformer, as in DiHT's official code (facebookresearch/diht).

SigLIP's has no causal mask, and pools at the last token. Takes token ids of `data.tokenizer`; text
cleaning and BPE live there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.transformer import (
    BlockInit,
    Execution,
    Gather,
    layer_norm,
    make_blocks,
    normal_init,
    run_blocks,
)
from diht_jax.models.zoo import Architecture


class TextTransformer(nnx.Module):
    """Token and position embeddings, blocks, pooling at one token, projection."""

    def __init__(
        self,
        arch: Architecture,
        *,
        execution: Execution,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        width = arch.text_width
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype = dtype
        self.remat = execution.remat
        self.context_length = arch.context_length
        self.end_of_text_id = arch.end_of_text_id
        self.pools_last = arch.text_pool == "last"
        # Looked up in the parameters' dtype: the gradient of a token sums over all its positions in
        # the batch, too many terms for bfloat16.
        self.token_embedding = nnx.Embed(
            arch.vocab_size,
            width,
            embedding_init=normal_init(0.02),
            dtype=param_dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.positional_embedding = nnx.Param(
            normal_init(0.01)(rngs.params(), (arch.context_length, width), param_dtype)
        )
        init = BlockInit.scaled_by_depth(width, arch.text_layers)
        self.blocks = make_blocks(
            execution,
            arch.text_layers,
            width,
            arch.text_heads,
            num_tokens=arch.context_length,
            mlp_width=arch.text_mlp_width or 4 * width,
            init=init,
            causal=arch.causal_text,
            activation=arch.text_activation or arch.activation,
            epsilon=arch.layer_norm_epsilon,
            **dtypes,
        )
        self.final_norm = layer_norm(width, arch.layer_norm_epsilon, **dtypes)
        self.projection = nnx.Linear(
            width,
            arch.embed_dim,
            use_bias=arch.text_projection == "bias",
            kernel_init=normal_init(width**-0.5),
            **dtypes,
        )

    def __call__(self, tokens: jax.Array, *, gather: Gather | None = None) -> jax.Array:
        """Embeds texts.

        Args:
            tokens: int32 [b, t] with t up to the context length. The end-of-text token is the
                first with the architecture's `end_of_text_id`; without one, the largest id. With
                `text_pool` "last" it does not matter, and texts are padded to the context length.
            gather: see `run_blocks`.

        Returns:
            [b, d] in the compute dtype, not normalised.
        """
        t = tokens.shape[1]
        if t > self.context_length:
            raise ValueError(
                f"expected at most {self.context_length} tokens a text, got shape {tokens.shape}"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[:t]
        pooled = run_blocks(
            self.blocks,
            x.astype(self.dtype),
            pooled=self._pooled_tokens(tokens),
            remat=self.remat,
            gather=gather,
        )
        return self.projection(self.final_norm(pooled))

    def _pooled_tokens(self, tokens: jax.Array) -> jax.Array:
        if self.pools_last:
            return jnp.full(tokens.shape[0], tokens.shape[1] - 1, jnp.int32)
        return self._end_of_text(tokens)

    def _end_of_text(self, tokens: jax.Array) -> jax.Array:
        return find_end_of_text(tokens, self.end_of_text_id)


def find_end_of_text(tokens: jax.Array, end_of_text_id: int | None) -> jax.Array:
    """Indices of the end-of-text tokens.

    Args:
        tokens: int32 [b, t].
        end_of_text_id: the end is the first token of this id; None: the first of the largest id.

    Returns:
        int [b], indices of tokens.
    """
    is_end = tokens if end_of_text_id is None else tokens == end_of_text_id
    return jnp.argmax(is_end, axis=-1)
