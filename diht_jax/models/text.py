"""The text tower: CLIP's causal transformer (DiHT's official code, paper note sec. 5).

Takes token ids of `data.tokenizer`; text cleaning and BPE live there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.transformer import Block, BlockInit, layer_norm, normal_init
from diht_jax.models.zoo import Architecture


class TextTransformer(nnx.Module):
    """Token and position embeddings, causal blocks, end-of-text pooling, projection."""

    def __init__(
        self, arch: Architecture, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        width = arch.text_width
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype = dtype
        self.context_length = arch.context_length
        self.token_embedding = nnx.Embed(
            arch.vocab_size, width, embedding_init=normal_init(0.02), **dtypes
        )
        self.positional_embedding = nnx.Param(
            normal_init(0.01)(rngs.params(), (arch.context_length, width), param_dtype)
        )
        init = BlockInit.scaled_by_depth(width, arch.text_layers)
        self.blocks = nnx.List(
            [
                Block(width, arch.text_heads, init, causal=True, **dtypes)
                for _ in range(arch.text_layers)
            ]
        )
        self.final_norm = layer_norm(width, **dtypes)
        self.projection = nnx.Linear(
            width, arch.embed_dim, use_bias=False, kernel_init=normal_init(width**-0.5), **dtypes
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Embeds texts.

        Args:
            tokens: int32 [b, t] with t up to the context length. The end-of-text token has the
                largest id, so its place is the arg-max.

        Returns:
            [b, d] in the compute dtype, not normalised.
        """
        t = tokens.shape[1]
        if t > self.context_length:
            raise ValueError(
                f"expected at most {self.context_length} tokens a text, got shape {tokens.shape}"
            )
        x = self.token_embedding(tokens) + self.positional_embedding[:t].astype(self.dtype)
        for block in self.blocks:
            x = block(x)
        # Causal attention: nothing after the end-of-text token reaches it, so it can be picked
        # before the last LayerNorm.
        end_of_text = jnp.argmax(tokens, axis=-1)
        pooled = jnp.take_along_axis(x, end_of_text[:, None, None], axis=1)[:, 0]
        return self.projection(self.final_norm(pooled))
