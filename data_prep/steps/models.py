"""Embedding models for filter steps, loaded in the worker or in actors that workers share.

A model is identified by its files. `data_prep.jobs.models` decides where it runs.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from data_prep.duplicates import precomputed
from data_prep.jobs.models import is_shared, open_model
from diht_jax.input import transforms
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage.hub import is_hub_name
from diht_jax.storage.stores import is_remote
from diht_jax.weights.releases import CONTAINED, HUB_MODELS, RELEASES, locate_weights

# Batches that a step takes at once, to keep several of a shared model in flight.
BATCHES = 4


class Encoder:
    """Embeds pictures and captions with a model that `diht_jax.load_model` can load.

    Batches are padded to one shape, so the model is compiled only once.
    """

    def __init__(self, model: str, batch_size: int, max_pixels: int = transforms.MAX_PIXELS):
        """Loads the model, unless it is shared.

        Args:
            model: name or path for `diht_jax.load_model`.
            batch_size: number of pictures or texts per batch.
            max_pixels: maximum number of pixels of a picture to decode.
        """
        self._model = open_model(functools.partial(_load, model, batch_size))
        self._batch_size = batch_size
        self._max_pixels = max_pixels
        if not is_shared():
            _ = self.pictures  # load here: errors belong to no pair, and the time to no step

    @functools.cached_property
    def pictures(self) -> tuple[int, transforms.Preprocessing]:
        """Side of the model's input pictures in px, and their preprocessing."""
        (found,) = self._model.map("describe_pictures", [()])
        return found

    def embed_images(self, images: Sequence[bytes]) -> list[np.ndarray | str]:
        """Decodes and embeds pictures. A shared model embeds one batch while the next is decoded.

        Returns:
            For each picture float32 [d] of unit length, or the reason why it cannot be decoded.
        """
        found: list[np.ndarray | str] = [""] * len(images)
        readable: list[int] = []  # indices of the pictures that the model embeds

        def decode() -> Iterator[tuple[np.ndarray, int]]:
            size, preprocessing = self.pictures
            for start in range(0, len(images), self._batch_size):
                shape = (self._batch_size, size, size, 3)
                pixels, count = np.zeros(shape, np.uint8), 0
                for number in range(start, min(start + self._batch_size, len(images))):
                    try:
                        decoded = transforms.decode_rgb(images[number], max_pixels=self._max_pixels)
                        picture = transforms.eval_transform(decoded, size, preprocessing)
                    except transforms.ImageError as error:
                        found[number] = error.reason
                        continue
                    pixels[count] = picture
                    readable.append(number)
                    count += 1
                if count:
                    yield pixels, count

        rows = itertools.chain.from_iterable(self._model.map("encode_images", decode()))
        for number, row in enumerate(rows):
            found[readable[number]] = row
        return found

    def embed_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the embedding of each text, float32 [d] of unit length."""
        size = self._batch_size
        chunks = (list(texts[start : start + size]) for start in range(0, len(texts), size))
        filled = ((chunk + [""] * (size - len(chunk)), len(chunk)) for chunk in chunks)
        return list(itertools.chain.from_iterable(self._model.map("encode_texts", filled)))


class PictureEmbeddings:
    """Embeddings of a shard's pictures, either stored ones by key or from a model."""

    def __init__(
        self,
        source: SourceShard,
        stored: str | None,
        key: str,
        model: str | None,
        batch_size: int,
        max_pixels: int,
    ):
        """Reads the stored embeddings of the shard, or loads the model if `stored` is None.

        `stored` is the --output of `diht_jax.embed` for the input, and `key` the config key that
        names it. The other arguments are those of `Encoder`.
        """
        self._source, self._where, self._missing = source, f"{key}='{stored}'", 0
        self._rows: Mapping[str, np.ndarray] = {}
        self._model: Encoder | None = None
        if stored is None:
            self._model = Encoder(str(model), batch_size, max_pixels)
        else:
            self._rows = precomputed.read_of_shard(stored, source)

    def embed(self, pairs: Sequence[Pair]) -> Sequence[np.ndarray | str | None]:
        """Returns for each [d], or None if none is stored, or why the picture is unreadable."""
        if self._model is not None:
            return self._model.embed_images([pair.image for pair in pairs])
        found = [self._rows.get(pair.key) for pair in pairs]
        self._missing += sum(row is None for row in found)
        return found

    def warn_of_missing(self, lacking: str) -> None:
        """Warns if pairs had no embedding and therefore got no score or comparison."""
        if self._missing:
            logging.warning(
                "%s: %d pairs have no embedding in %s, and went on without %s",
                self._source,
                self._missing,
                self._where,
                lacking,
            )


class _Loaded:
    """A loaded model, in the process where it runs. Only this class imports JAX."""

    def __init__(self, model: str, batch_size: int):
        from diht_jax.loading import load_model

        self._model = load_model(model, batch_size=batch_size)

    def describe_pictures(self) -> tuple[int, transforms.Preprocessing]:
        """Returns the pictures' side in px and their preprocessing."""
        return self._model.image_size, self._model.preprocessing

    def encode_images(self, pixels: np.ndarray, count: int) -> np.ndarray:
        """Embeds the first `count` of uint8 [b, size, size, 3] as float32 [count, d]."""
        return self._model.encode_image(pixels)[:count]

    def encode_texts(self, texts: list[str], count: int) -> np.ndarray:
        """Embeds the first `count` texts as float32 [count, d]."""
        return self._model.encode_text(texts)[:count]


@functools.lru_cache(maxsize=4)  # steps may use different models
def _load(model: str, batch_size: int) -> _Loaded:
    return _Loaded(model, batch_size)


@functools.lru_cache(maxsize=4)
def fingerprint(model: str, name: str) -> str:
    """Identifies a model without loading it: files by content, a run by its last checkpoint.

    Released models and models of a hub or a store are identified by name; loading a released one
    checks its bytes. A finished run keeps its identity if it is restarted or copied.

    Args:
        model: name or path for `diht_jax.load_model`.
        name: config key, for error messages.

    Raises:
        ValueError: the model does not exist.
    """
    digest = hashlib.blake2b(digest_size=16)
    if os.path.isfile(model):
        with open(model, "rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
    if not os.path.isdir(model):
        if model in CONTAINED:  # another version of the package may contain another model
            return fingerprint(str(locate_weights(model) / "model.safetensors"), name)
        known = (*CONTAINED, *RELEASES, *HUB_MODELS)
        if model not in known and not is_remote(model) and not is_hub_name(model):
            raise ValueError(
                f"{name}='{model}': no such work directory or weight file, and no model of this "
                f"name ({', '.join(known)})"
            )
        return model
    from diht_jax.loading import identify_run

    if learnt := identify_run(model):
        digest.update(learnt.encode())
        return digest.hexdigest()
    for folder, folders, names in os.walk(model):
        folders.sort()
        for file_name in sorted(names):
            path = os.path.join(folder, file_name)
            digest.update(f"{os.path.relpath(path, model)}\n".encode("utf-8", "surrogatepass"))
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
