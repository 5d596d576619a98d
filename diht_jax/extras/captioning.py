"""Captioning: a decoder predicts the caption of a picture from the tokens of the image tower."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diht_jax.config.keys import COUNT, Key
from diht_jax.extras.caption_decoder import CaptionDecoder, merge_decoder
from diht_jax.losses.concepts import concept_losses_in_chunks
from diht_jax.losses.objective import Parameters, Term
from diht_jax.models.dual_encoder import find_end_of_text
from diht_jax.models.layers import POLICIES
from diht_jax.models.parameters import model_parameters

DECODER = "caption_decoder"


class Captioning(Term):
    """Cross-entropy of each next token of a caption, the mean over all tokens of the global batch.

    The end of a text is a token to be predicted, what follows it is not. The decoder is stored with
    the parameters of the model; `LoadedModel.caption` writes captions with it.

    Source: CoCa, arXiv 2205.01917, which weighs it by 2 and the contrastive loss by 1.
    """

    settings: ClassVar[dict[str, Any]] = {
        "weight": 0.0,  # of this loss; 0 leaves it out
        "layers": Key(6, COUNT),  # of the decoder, which is as wide as the text tower
        "remat": "none",  # as config.model.remat, of the decoder's blocks
        "chunk_tokens": Key(2048, COUNT),  # tokens of a device whose logits are held at once
    }
    reads_image_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.section.remat not in POLICIES:
            raise ValueError(
                f"config.{self.name}.remat='{self.section.remat}': expected one of "
                f"{', '.join(POLICIES)}"
            )

    def parameters(self, key: jax.Array, widths: dict[str, int], dtype: DTypeLike) -> Parameters:
        """The decoder; see `CaptionDecoder`."""
        decoder = CaptionDecoder(
            self.arch, self.section.layers, param_dtype=dtype, rngs=nnx.Rngs(params=key)
        )
        return {DECODER: model_parameters(decoder)}

    def of_examples(
        self, params: Parameters, features: dict[str, jax.Array], examples: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The sum over a caption's tokens; see `Term.of_examples`."""
        image_tokens, tokens = features["image_tokens"], examples["tokens"]
        decoder = merge_decoder(
            params[DECODER], self.arch, dtype=image_tokens.dtype, remat=self.section.remat
        )
        found = decoder(tokens[:, :-1], image_tokens)
        b, t, width = found.shape
        losses, _ = concept_losses_in_chunks(
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
        """The mean over the batch's tokens, in nats; see `Term.of_batch`."""
        count = jnp.sum(is_predicted(examples["tokens"], self.arch.end_of_text_id))
        loss = jnp.sum(encoded["captioning_loss"]) / jnp.maximum(count, 1)
        return {"captioning_loss": (self.section.weight, loss)}


def is_predicted(tokens: jax.Array, end_of_text_id: int | None) -> jax.Array:
    """int32 [b, t] -> bool [b, t - 1]: which of the tokens behind the first count."""
    end = find_end_of_text(tokens, end_of_text_id)
    return jnp.arange(1, tokens.shape[1]) <= end[:, None]
