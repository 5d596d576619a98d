"""The text tower: CLIP's causal transformer, as in DiHT's official code (facebookresearch/diht).

Takes token ids of `data.tokenizer`; text cleaning and BPE live there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from diht_jax.models.transformer import (
    Block,
    BlockInit,
    Execution,
    Gather,
    build_blocks,
    layer_norm,
    normal_init,
    run_blocks,
)
from diht_jax.models.zoo import Architecture


class TextTransformer(nnx.Module):
    """Token and position embeddings, causal blocks, end-of-text pooling, projection."""

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
        dtypes = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype = dtype
        self.remat = execution.remat
        self.context_length = arch.context_length
        self.end_of_text_id = arch.end_of_text_id
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
        blocks = [
            Block(
                width,
                arch.text_heads,
                arch.text_mlp_width or 4 * width,
                init,
                causal=True,
                activation=arch.activation,
                epsilon=arch.layer_norm_epsilon,
                attention=execution.attention_kernel(
                    dtype,
                    width // arch.text_heads,
                    num_tokens=arch.context_length,
                    num_heads=arch.text_heads,
                ),
                **dtypes,
            )
            for _ in range(arch.text_layers)
        ]
        self.blocks = build_blocks(blocks, scan_layers=execution.scan_layers)
        self.final_norm = layer_norm(width, arch.layer_norm_epsilon, **dtypes)
        self.projection = nnx.Linear(
            width, arch.embed_dim, use_bias=False, kernel_init=normal_init(width**-0.5), **dtypes
        )

    def __call__(self, tokens: jax.Array, *, gather: Gather | None = None) -> jax.Array:
        """Embeds texts.

        Args:
            tokens: int32 [b, t] with t up to the context length. The end-of-text token is the
                first with the architecture's `end_of_text_id`; without one, the largest id.
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
        is_end = tokens if self.end_of_text_id is None else tokens == self.end_of_text_id
        end_of_text = jnp.argmax(is_end, axis=-1)
        pooled = run_blocks(
            self.blocks,
            x.astype(self.dtype),
            pooled=end_of_text,
            remat=self.remat,
            gather=gather,
        )
        return self.projection(self.final_norm(pooled))
