"""Captioning: a causal decoder predicts a caption from the tokens of the image tower.

A simplified version of CoCa (arXiv 2205.01917): the decoder has separate embeddings and blocks, so
the text tower remains CLIP's, and it attends to all tokens of the image instead of a few pooled
ones. Its blocks are those of torch's `nn.TransformerDecoderLayer` with `norm_first`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diht_jax.config.keys import COUNT, NOT_NEGATIVE, Key, OneOf
from diht_jax.losses.concepts import concept_losses_in_chunks
from diht_jax.losses.objective import Parameters, Term
from diht_jax.models.dual_encoder import find_end_of_text
from diht_jax.models.layers import ATTENTION_OUT, POLICIES, QKV, Linear, checkpointed
from diht_jax.models.parameters import ParameterKeys, model_parameters
from diht_jax.models.transformer import Attention, BlockInit, Mlp, layer_norm, normal_init
from diht_jax.models.zoo import Architecture

DECODER = "caption_decoder"


class Captioning(Term):
    """Cross-entropy of the next token of a caption, the mean over all tokens of the global batch.

    The end-of-text token is predicted; tokens after it are ignored. The decoder is stored with the
    parameters of the model, and `LoadedModel.caption` generates captions with it.

    Source: CoCa, arXiv 2205.01917, with a weight of 2 (and 1 for the contrastive loss).
    """

    settings: ClassVar[dict[str, Any]] = {
        "weight": Key(0.0, NOT_NEGATIVE),  # weight of this loss; 0 disables it
        "layers": Key(6, COUNT),  # layers of the decoder, which is as wide as the text tower
        # Like config.model.remat, for the decoder's blocks.
        "remat": Key("none", OneOf(POLICIES)),
        "chunk_tokens": Key(2048, COUNT),  # tokens with logits in memory at once, on each device
    }
    reads_image_tokens: bool = True

    def parameters(self, key: jax.Array, widths: dict[str, int], dtype: DTypeLike) -> Parameters:
        """Returns the parameters of a `CaptionDecoder`; see `Term.parameters`."""
        decoder = CaptionDecoder(
            self.arch, self.section.layers, param_dtype=dtype, rngs=ParameterKeys(key)
        )
        return {DECODER: model_parameters(decoder)}

    def of_examples(
        self, params: Parameters, features: dict[str, jax.Array], examples: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Computes the sum over the tokens of each caption; see `Term.of_examples`."""
        image_tokens, tokens = features["image_tokens"], examples["tokens"]
        decoder = merge_decoder(
            params[DECODER], self.arch, dtype=image_tokens.dtype, remat=self.section.remat
        )
        found = decoder(tokens[:, :-1], image_tokens)
        b, t, width = found.shape
        losses = concept_losses_in_chunks(
            found.reshape(b * t, width),
            decoder.output_kernel(),
            jnp.zeros((), jnp.float32),
            tokens[:, 1:].reshape(b * t, 1),
            is_predicted(tokens, self.arch.end_of_text_id).reshape(b * t, 1).astype(jnp.float32),
            chunk_rows=self.section.chunk_tokens,
        )
        return {"captioning_loss": jnp.sum(losses.reshape(b, t), axis=1)}

    def of_batch(
        self,
        encoded: dict[str, jax.Array],
        params: Parameters,
        examples: dict[str, jax.Array],
        *,
        mesh: Mesh,
    ) -> dict[str, tuple[float, jax.Array]]:
        """Computes the mean over the batch's tokens, in nats; see `Term.of_batch`."""
        count = jnp.sum(is_predicted(examples["tokens"], self.arch.end_of_text_id))
        loss = jnp.sum(encoded["captioning_loss"]) / jnp.maximum(count, 1)
        return {"captioning_loss": (self.section.weight, loss)}


def is_predicted(tokens: jax.Array, end_of_text_id: int | None) -> jax.Array:
    """Returns a mask of the predicted tokens after the first, int32 [b, t] -> bool [b, t - 1]."""
    end = find_end_of_text(tokens, end_of_text_id)
    return jnp.arange(1, tokens.shape[1]) <= end[:, None]


# For each block, keys and values of the captions so far and of the images.
Cache = list[dict[str, jax.Array]]


class CrossAttention(nnx.Module):
    """Multi-head attention of the caption's tokens to the image's tokens."""

    def __init__(self, width: int, image_width: int, heads: int, init: BlockInit, **dtypes: Any):
        self.heads = heads
        # This initialisation keeps the scale of image tokens, which have another width.
        image_init = normal_init(image_width**-0.5)
        self.q_proj = Linear(width, width, kernel_init=init.attention_in, **dtypes)
        self.k_proj = Linear(image_width, width, kernel_init=image_init, **dtypes)
        self.v_proj = Linear(image_width, width, kernel_init=image_init, **dtypes)
        self.out_proj = Linear(width, width, kernel_init=init.attention_out, **dtypes)

    def __call__(self, x: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """[b, t, width], and [b, s, heads, head_dim] of `keys_and_values` -> [b, t, width]."""
        b, t, width = x.shape
        q = checkpoint_name(self.q_proj(x), QKV).reshape(b, t, self.heads, -1)
        out = jax.nn.dot_product_attention(q, keys, values)
        return checkpoint_name(self.out_proj(out.reshape(b, t, width)), ATTENTION_OUT)

    def keys_and_values(self, image_tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[b, s, image_width] -> keys and values, [b, s, heads, head_dim] each."""
        b, s, _ = image_tokens.shape
        return tuple(
            checkpoint_name(layer(image_tokens), QKV).reshape(b, s, self.heads, -1)
            for layer in (self.k_proj, self.v_proj)
        )


class DecoderBlock(nnx.Module):
    """Decoder block: causal self-attention, cross-attention and MLP, each residual and pre-norm."""

    def __init__(self, arch: Architecture, init: BlockInit, **dtypes: Any):
        width, heads, epsilon = arch.text_width, arch.text_heads, arch.layer_norm_epsilon
        self.attention_norm = layer_norm(width, epsilon=epsilon, **dtypes)
        self.attention = Attention(width, heads, init, causal=True, implementation="xla", **dtypes)
        self.cross_attention_norm = layer_norm(width, epsilon=epsilon, **dtypes)
        self.cross_attention = CrossAttention(width, arch.vision_width, heads, init, **dtypes)
        self.mlp_norm = layer_norm(width, epsilon=epsilon, **dtypes)
        self.mlp = Mlp(
            width, arch.text_mlp_width or 4 * width, init, activation=arch.activation, **dtypes
        )

    def __call__(self, x: jax.Array, image_tokens: jax.Array) -> jax.Array:
        """[b, t, width] and [b, s, image_width] -> [b, t, width]."""
        x = x + self.attention(self.attention_norm(x))
        return self._after_attention(x, *self.cross_attention.keys_and_values(image_tokens))

    def at(
        self, x: jax.Array, position: jax.Array, cache: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Runs the block on one token [b, 1, width], with the cache of the previous tokens."""
        b, _, width = x.shape
        layer = self.attention
        qkv = layer.in_proj(self.attention_norm(x)).reshape(b, 1, 3, layer.heads, -1)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(cache[name], qkv[:, :, i], position, axis=1)
            for i, name in ((1, "keys"), (2, "values"))
        )
        is_past = jnp.arange(keys.shape[1]) <= position
        out = jax.nn.dot_product_attention(
            qkv[:, :, 0], keys, values, mask=is_past[None, None, None]
        )
        x = x + layer.out_proj(out.reshape(b, 1, width))
        x = self._after_attention(x, cache["image_keys"], cache["image_values"])
        return x, {**cache, "keys": keys, "values": values}

    def _after_attention(self, x: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        x = x + self.cross_attention(self.cross_attention_norm(x), keys, values)
        return x + self.mlp(self.mlp_norm(x))


class CaptionDecoder(nnx.Module):
    """Causal caption decoder; its output layer shares the weights of the token embedding."""

    def __init__(
        self,
        arch: Architecture,
        layers: int,
        *,
        remat: str = "none",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the decoder, with the text tower's width, heads, context length and vocabulary.

        `remat` is one of `layers.POLICIES`. `dtype` is that of the computation, except for logits,
        which are float32. `rngs` must have the stream `params`.
        """
        width = arch.text_width
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.dtype, self.remat, self.head_dim = dtype, remat, width // arch.text_heads
        # The lookup is in the parameters' dtype, as in the text tower.
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
        init = BlockInit.scaled_by_depth(width, layers)
        self.blocks = nnx.List([DecoderBlock(arch, init, **dtypes) for _ in range(layers)])
        self.final_norm = layer_norm(width, epsilon=arch.layer_norm_epsilon, **dtypes)

    def __call__(self, tokens: jax.Array, image_tokens: jax.Array) -> jax.Array:
        """Computes the features of captions; times `output_kernel`, they are next-token logits.

        Maps tokens int32 [b, t], with t up to the context length, and `VisionTransformer.tokens`
        [b, s, image_width] to [b, t, width]. A position depends only on tokens up to it.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x, image_tokens = x.astype(self.dtype), image_tokens.astype(self.dtype)
        for block in self.blocks:
            graphdef, params = nnx.split(block, nnx.Param)

            def run(params, x, image_tokens, graphdef=graphdef):
                return nnx.merge(graphdef, params)(x, image_tokens)

            is_plain = self.remat == "none"
            call = run if is_plain else checkpointed(run, self.remat, scanned=False)
            x = call(params, x, image_tokens)
        return self.final_norm(x)

    def output_kernel(self) -> jax.Array:
        """Returns the kernel [width, vocabulary] that maps features to logits."""
        return self.token_embedding.embedding[...].T

    def start(self, image_tokens: jax.Array, length: int) -> Cache:
        """Creates the cache of `step` for some images and captions of up to `length` tokens."""
        b, cache = image_tokens.shape[0], []
        for block in self.blocks:
            keys, values = block.cross_attention.keys_and_values(image_tokens.astype(self.dtype))
            empty = jnp.zeros((b, length, keys.shape[2], self.head_dim), self.dtype)
            cache.append(
                {"keys": empty, "values": empty, "image_keys": keys, "image_values": values}
            )
        return cache

    def step(self, tokens: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Computes next-token logits from one token and the cache of the previous tokens.

        `tokens` are int32 [b] at `position`. Returns float32 [b, vocabulary], and the cache
        including this position.
        """
        x = self.token_embedding(tokens[:, None]) + self.positional_embedding[position]
        x, after = x.astype(self.dtype), []
        for block, of_block in zip(self.blocks, cache, strict=True):
            x, of_block = block.at(x, position, of_block)
            after.append(of_block)
        features = self.final_norm(x)[:, 0]
        kernel = self.output_kernel().astype(self.dtype)
        logits = jnp.matmul(features, kernel, preferred_element_type=jnp.float32)
        return logits, after


def merge_decoder(
    params: dict[str, Any], arch: Architecture, *, dtype: DTypeLike, remat: str = "none"
) -> CaptionDecoder:
    """Returns the decoder with the given parameters, which determine its number of blocks."""
    layers = len(params["blocks"])
    abstract = nnx.eval_shape(
        lambda: CaptionDecoder(arch, layers, remat=remat, dtype=dtype, rngs=ParameterKeys(0))
    )
    return nnx.merge(nnx.split(abstract, nnx.Param)[0], nnx.restore_int_paths(params))


def decode_captions(
    decoder: CaptionDecoder,
    image_tokens: jax.Array,
    keys: jax.Array,
    *,
    start_id: int,
    end_id: int,
    length: int,
    top_k: int | None = None,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """Generates captions of images, token by token until all have ended.

    Args:
        decoder: with parameters.
        image_tokens: float [b, s, image_width].
        keys: random keys [b] for sampling.
        start_id: first token of every caption; never generated again.
        end_id: last token of a caption.
        length: largest number of tokens, including start and end; up to the context length.
        top_k: number of most likely tokens to sample from; None is greedy decoding.
        temperature: divisor of the logits before sampling.

    Returns:
        int32 [b, length]: start, text, end, zeros. A truncated caption has no end.
    """

    def choose(logits: jax.Array, position: jax.Array) -> jax.Array:
        logits = logits.at[:, start_id].set(-jnp.inf)
        if top_k is None:
            return jnp.argmax(logits, axis=1)
        values, ids = jax.lax.top_k(logits, top_k)
        draws = jax.vmap(
            lambda key, row: jax.random.categorical(jax.random.fold_in(key, position), row)
        )(keys, values / temperature)
        return jnp.take_along_axis(ids, draws[:, None], axis=1)[:, 0]

    def is_unfinished(carry: tuple[Any, ...]) -> jax.Array:
        position, _, has_ended, _ = carry
        return (position < length - 1) & ~jnp.all(has_ended)

    def write(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        position, written, has_ended, cache = carry
        logits, cache = decoder.step(written[:, position], position, cache)
        chosen = jnp.where(has_ended, 0, choose(logits, position).astype(jnp.int32))
        written = written.at[:, position + 1].set(chosen)
        return position + 1, written, has_ended | (chosen == end_id), cache

    b = image_tokens.shape[0]
    start = jnp.zeros((b, length), jnp.int32).at[:, 0].set(start_id)
    carry = (jnp.int32(0), start, jnp.zeros(b, bool), decoder.start(image_tokens, length))
    return jax.lax.while_loop(is_unfinished, write, carry)[1]
