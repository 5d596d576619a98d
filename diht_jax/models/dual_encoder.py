"""The dual encoder: an image tower, a text tower and the logit scale.

Both towers are CLIP's, as in DiHT's official code (facebookresearch/diht). With attention pooling
the image tower is that of SigLIP (Zhai et al. 2023, arXiv 2303.15343) or of the Perception Encoder
(Bolya et al. 2025, arXiv 2504.13181). SigLIP's text tower has no causal mask and pools at the last
token. Inputs are normalised images (`input/transforms.py`) and token ids of `data.tokenizer`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diht_jax.models.attention import Rotary, rotary_positions
from diht_jax.models.layers import Linear, apply_columns
from diht_jax.models.transformer import (
    BlockInit,
    Execution,
    Gather,
    Mlp,
    layer_norm,
    make_blocks,
    normal_init,
    run_blocks,
    uniform_init,
)
from diht_jax.models.zoo import Architecture

INITIAL_LOG_LOGIT_SCALE = math.log(1 / 0.07)


class DualEncoder(nnx.Module):
    """CLIP's dual encoder, as DiHT has it (arXiv 2301.02280, official code)."""

    def __init__(
        self,
        arch: Architecture,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        execution: Execution | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds both towers with CLIP's initialisation.

        Args:
            arch: sizes.
            dtype: of the computation. Softmax, LayerNorm statistics and embeddings are float32.
            param_dtype: of the stored parameters.
            execution: how to compute; the default unrolls the layers and rematerialises nothing.
            rngs: must have the stream `params`.
        """
        execution = execution or Execution()
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision = VisionTransformer(arch, execution=execution, **dtypes)
        self.text = TextTransformer(arch, execution=execution, **dtypes)
        self.log_logit_scale = nnx.Param(jnp.asarray(INITIAL_LOG_LOGIT_SCALE, jnp.float32))

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Embeds normalised images, float [b, size, size, 3] -> float32 [b, d], L2-normalised."""
        return l2_normalize(self.vision.projection(self.vision.features(images)))

    def encode_text(self, tokens: jax.Array, *, gather: Gather | None = None) -> jax.Array:
        """Embeds texts, int32 [b, t] -> float32 [b, d], L2-normalised."""
        return l2_normalize(self.text(tokens, gather=gather))


def l2_normalize(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Divides rows by their L2 norms, in at least float32.

    Rows with a norm below 1e-12 become 0 and have a gradient of 0; dividing by a norm of 0 would
    make it NaN.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    has_length = squared > 1e-24
    # The inner `where` keeps the derivative of the branch that is not selected finite.
    return jnp.where(has_length, x * jax.lax.rsqrt(jnp.where(has_length, squared, 1)), 0)


class VisionTransformer(nnx.Module):
    """Vision transformer: patch embedding, class token, positions, blocks, pooling, projection."""

    def __init__(self, arch: Architecture, *, execution: Execution, **dtypes: Any):
        width, patch = arch.vision_width, arch.patch_size
        mlp_width = arch.vision_mlp_width or 4 * width
        epsilon = arch.layer_norm_epsilon
        scaled_normal = normal_init(width**-0.5)
        self.dtype, param_dtype, rngs = dtypes["dtype"], dtypes["param_dtype"], dtypes["rngs"]
        self.remat = execution.remat
        self.arch = arch
        self.patch_embedding = nnx.Conv(
            3,
            width,
            kernel_size=(patch, patch),
            strides=(patch, patch),
            padding="VALID",
            use_bias=not arch.class_token,
            kernel_init=uniform_init((3 * patch * patch) ** -0.5),
            **dtypes,
        )
        if arch.class_token:
            self.class_embedding = nnx.Param(scaled_normal(rngs.params(), (width,), param_dtype))
        self.positional_embedding = nnx.Param(
            scaled_normal(rngs.params(), (arch.num_image_tokens, width), param_dtype)
        )
        if arch.class_token:
            self.pre_norm = layer_norm(width, epsilon=epsilon, **dtypes)
        init = BlockInit.torch_default(width, mlp_width)
        self.blocks = make_blocks(
            execution,
            arch.vision_layers,
            width,
            arch.vision_heads,
            num_tokens=arch.num_image_tokens,
            mlp_width=mlp_width,
            init=init,
            causal=False,
            activation=arch.activation,
            epsilon=epsilon,
            **dtypes,
        )
        self.post_norm = layer_norm(width, epsilon=epsilon, **dtypes)
        if arch.vision_pool_heads is not None:
            self.pool = AttentionPool(arch, init, **dtypes)
        if arch.vision_projection == "none":
            self.projection = _unprojected
        else:
            self.projection = nnx.Linear(
                width,
                arch.embed_dim,
                use_bias=arch.vision_projection == "bias",
                kernel_init=scaled_normal,
                **dtypes,
            )

    def features(
        self,
        images: jax.Array,
        *,
        kept_patches: jax.Array | None = None,
        gather: Gather | None = None,
    ) -> jax.Array:
        """Returns the pooled features of images, before the projection.

        Args:
            images: float [b, size, size, 3], normalised with CLIP's mean and std.
            kept_patches: int32 [b, k] from `choose_patches`, the patches of each image to encode
                (FLIP, arXiv 2212.00794); all by default. The class token is always kept.
            gather: see `run_blocks`.

        Returns:
            [b, width] in the compute dtype.
        """
        if self.arch.vision_pool_heads is not None:
            return self.pool(self.tokens(images, kept_patches=kept_patches, gather=gather))
        x = self._embed(images, kept_patches)
        class_positions = jnp.zeros((x.shape[0],), jnp.int32)
        return self.post_norm(
            run_blocks(self.blocks, x, pooled=class_positions, remat=self.remat, gather=gather)
        )

    def tokens(
        self,
        images: jax.Array,
        *,
        kept_patches: jax.Array | None = None,
        gather: Gather | None = None,
    ) -> jax.Array:
        """Returns all tokens of images, [b, t, width]. `pool_tokens` turns them into `features`."""
        x = self._embed(images, kept_patches)
        rotary = self._rotary(kept_patches)
        return self.post_norm(
            run_blocks(self.blocks, x, rotary=rotary, remat=self.remat, gather=gather)
        )

    def pool_tokens(self, tokens: jax.Array) -> jax.Array:
        """Pools the result of `tokens` into that of `features`, [b, t, width] -> [b, width]."""
        return tokens[:, 0] if self.arch.vision_pool_heads is None else self.pool(tokens)

    def _rotary(self, kept_patches: jax.Array | None) -> Rotary | None:
        """Returns the rotary positions of the tokens, or None if the architecture has none."""
        arch = self.arch
        if arch.rotary_grid is None:
            return None
        rotary = rotary_positions(
            arch.image_size // arch.patch_size,
            arch.rotary_grid,
            arch.vision_width // arch.vision_heads,
            class_token=arch.class_token,
        )
        if kept_patches is None:
            return rotary
        first = int(arch.class_token)
        kept = jnp.pad(kept_patches + first, ((0, 0), (first, 0)))
        return Rotary(*(table[kept] for table in rotary))

    def _embed(self, images: jax.Array, kept_patches: jax.Array | None) -> jax.Array:
        """Embeds images as the input of the blocks, [b, t, width]."""
        expected = (self.arch.image_size, self.arch.image_size, 3)
        if images.shape[1:] != expected:
            raise ValueError(f"expected images of shape [b, {expected}], got {images.shape}")
        b = images.shape[0]
        patches = self.patch_embedding(images.astype(self.dtype))
        patches = patches.reshape(b, -1, patches.shape[-1])
        positions = self.positional_embedding[...].astype(self.dtype)
        patches = patches + (positions[1:] if self.arch.class_token else positions)
        if kept_patches is not None:
            patches = jnp.take_along_axis(patches, kept_patches[:, :, None], axis=1)
        if not self.arch.class_token:
            return patches
        class_token = self.class_embedding[...].astype(self.dtype) + positions[0]
        class_tokens = jnp.broadcast_to(class_token, (b, 1, class_token.shape[-1]))
        return self.pre_norm(jnp.concatenate([class_tokens, patches], axis=1))


class AttentionPool(nnx.Module):
    """Attention pooling by one learnt query, then an MLP: SigLIP's "MAP" head."""

    def __init__(self, arch: Architecture, init: BlockInit, **dtypes: Any):
        width = arch.vision_width
        self.heads = arch.vision_pool_heads or arch.vision_heads
        draw = uniform_init(math.sqrt(6 / (1 + width)))
        self.probe = nnx.Param(draw(dtypes["rngs"].params(), (width,), dtypes["param_dtype"]))
        self.in_proj = Linear(width, 3 * width, kernel_init=init.attention_in, **dtypes)
        self.out_proj = Linear(width, width, kernel_init=init.attention_out, **dtypes)
        self.norm = layer_norm(width, epsilon=arch.layer_norm_epsilon, **dtypes)
        mlp_width = arch.vision_mlp_width or 4 * width
        self.mlp = Mlp(width, mlp_width, init, activation=arch.activation, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, t, width] -> [b, width]; softmax in float32."""
        b, t, width = x.shape
        head_dim = width // self.heads
        probe = self.probe[...].astype(x.dtype)
        q = apply_columns(self.in_proj, probe, slice(0, width)).reshape(1, 1, self.heads, head_dim)
        kv = apply_columns(self.in_proj, x, slice(width, None))
        kv = kv.reshape(b, t, 2, self.heads, head_dim)
        q = jnp.broadcast_to(q, (b, 1, self.heads, head_dim))
        pooled = jax.nn.dot_product_attention(q, kv[:, :, 0], kv[:, :, 1])
        pooled = self.out_proj(pooled.reshape(b, width))
        return pooled + self.mlp(self.norm(pooled))


def _unprojected(features: jax.Array) -> jax.Array:
    return features


def choose_patches(
    key: jax.Array, batch_size: int, num_patches: int, dropped_share: float
) -> jax.Array:
    """Draws a random subset of the patches of every image, independently of other images.

    Args:
        key: random key.
        batch_size: b, of the whole batch; rows then do not depend on how the batch is split.
        num_patches: t, patches of an image.
        dropped_share: in [0, 1), fraction of patches to drop; at least one patch is kept.

    Returns:
        int32 [b, num_kept_patches(t, dropped_share)], distinct indices of patches.
    """
    order = jnp.argsort(jax.random.uniform(key, (batch_size, num_patches)), axis=1)
    return order[:, : num_kept_patches(num_patches, dropped_share)].astype(jnp.int32)


def num_kept_patches(num_patches: int, dropped_share: float) -> int:
    """Returns the number of kept patches of an image: max(1, floor(t * (1 - dropped_share)))."""
    return max(1, math.floor(num_patches * (1.0 - dropped_share)))


class TextTransformer(nnx.Module):
    """Text transformer: token and position embeddings, blocks, pooling at one token, projection."""

    def __init__(self, arch: Architecture, *, execution: Execution, **dtypes: Any):
        width = arch.text_width
        self.dtype, param_dtype, rngs = dtypes["dtype"], dtypes["param_dtype"], dtypes["rngs"]
        self.remat = execution.remat
        self.context_length = arch.context_length
        self.end_of_text_id = arch.end_of_text_id
        self.pools_last = arch.text_pool == "last"
        # The lookup is in the parameters' dtype: the gradient of a token is a sum over all of its
        # positions in the batch, which has too many terms for bfloat16.
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
        self.final_norm = layer_norm(width, epsilon=arch.layer_norm_epsilon, **dtypes)
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
            tokens: int32 [b, t] with t up to the context length. For the end-of-text token see
                `find_end_of_text`. With `text_pool` "last" it does not matter, and texts must be
                padded to the context length.
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
        x = x.astype(self.dtype)
        if self.pools_last:
            pooled = jnp.full(tokens.shape[0], t - 1, jnp.int32)
        else:
            pooled = find_end_of_text(tokens, self.end_of_text_id)
        x = run_blocks(self.blocks, x, pooled=pooled, remat=self.remat, gather=gather)
        return self.projection(self.final_norm(x))


def find_end_of_text(tokens: jax.Array, end_of_text_id: int | None) -> jax.Array:
    """Returns the indices of the end-of-text tokens, int32 [b, t] -> int [b].

    The end is the first token with this id. For None it is the first token with the largest id.
    """
    is_end = tokens if end_of_text_id is None else tokens == end_of_text_id
    return jnp.argmax(is_end, axis=-1)
