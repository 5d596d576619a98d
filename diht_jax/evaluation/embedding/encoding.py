"""Embeds pairs and texts in batches of a fixed shape, decoding ahead of the device.

This module knows nothing of metrics, tasks or files: it takes an iterator of pairs and returns
embeddings as NumPy arrays.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL.Image

from diht_jax.evaluation.embedding.entries import Order, Processes, Units, decode_picture
from diht_jax.input.transforms import ImageError
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair
from diht_jax.storage.files import map_many
from diht_jax.terminal import ProgressBar

# Batches of decoded images that wait for the device: enough to keep the threads busy during a
# device step, and small enough for a laptop's memory.
_BATCHES_AHEAD = 2

_DROPPED_KEYS_KEPT = 10


class EmbeddingModel(Protocol):
    """The methods of a model that evaluation uses; `diht_jax.loading.LoadedModel` is one."""

    @property
    def logit_scale(self) -> float:
        """The factor on cosine similarities, after exp."""

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """Embeds uint8 [b, h, w, 3]: float32 [b, d], L2-normalised."""

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [b, d], L2-normalised."""

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray:
        """Crops and resizes a picture: uint8 [h, w, 3]."""


class UnusablePair(ValueError):
    """Raised by `describe` for a pair that the task cannot use; counted under `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Batching(NamedTuple):
    """How a source is embedded."""

    # Images per batch, over the devices of all processes; texts, over this process's devices.
    batch_size: int = 256
    num_threads: int | None = None  # decoding threads; None is one per core, at most 16
    progress: bool = False  # show bars on stderr
    processes: Processes = Processes()  # the processes that embed a source together


class EncodedImages(NamedTuple):
    """The embedded usable images of a source, in source order."""

    image_emb: np.ndarray  # float32 [n, d], L2-normalised
    notes: list[Any]  # what `describe` returned for each usable pair
    # Maps a reason to the number of skipped entries: "image_" + the reason of an `ImageError`, or
    # the reason of a `Skipped` entry or an `UnusablePair`.
    dropped: dict[str, int]
    dropped_keys: list[str]  # keys of the first few skipped entries
    seconds: float  # wall time of reading, decoding and encoding together
    digest: str  # of the usable keys, in order; shows whether two models saw the same images
    orders: list[Order]  # for each usable pair, its unit number and its index within the unit


class Encoder:
    """A model together with a source to embed; protocols measure with it."""

    def __init__(
        self,
        model: EmbeddingModel,
        entries: Units | Iterable[Pair | Skipped],
        batching: Batching | None = None,
        *,
        limit: int | None = None,
        name: str | None = None,
    ):
        """Takes entries, which are consumed once, in order; `limit` keeps only the first ones.

        With several processes, each reads its share of `Units`. Any other iterable is read by the
        first process alone. `name` is the title of the progress bar.
        """
        self.model, self.batching = model, batching or Batching()
        if not isinstance(entries, Units):
            entries = Units([functools.partial(iter, entries)], lambda: None)
        self._units, self._limit, self._name = entries, limit, name

    def images(
        self, describe: Callable[[Pair], Any], *, allow_empty: bool = False
    ) -> EncodedImages:
        """Embeds the image of every pair; counts unusable pairs by reason.

        Threads decode and resize while the device works. All batches have the same shape: the last
        one is padded and the padding is removed from the result.

        Args:
            describe: called once per pair, from several threads. Its results are kept in memory and
                should be small. Raises `UnusablePair` to skip a pair; any other ValueError aborts
                the embedding.
            allow_empty: return embeddings of shape [0, 0] if no pair is usable.

        Raises:
            ValueError: no pair is usable and `allow_empty` is false, or an embedding is not
                finite.
        """
        start, processes = time.perf_counter(), self.batching.processes
        if processes.count == 1:
            found, image_emb = self._embed_share(describe)
        else:
            share = processes.together(functools.partial(self._embed_share, describe))
            found, image_emb = _merge_shares(processes.exchange(share), self._limit)
        kept = [row for row in found if row.reason is None]
        left_out = [row for row in found if row.reason is not None]
        dropped = dict(collections.Counter([str(row.reason) for row in left_out]))
        if not kept and not allow_empty:
            raise ValueError(
                f"no usable pair in the source: {len(left_out)} entries, left out for {dropped}"
            )
        check_finite(image_emb, "image embeddings")
        keys = "\n".join([row.key for row in kept])
        return EncodedImages(
            image_emb=image_emb,
            notes=[row.note for row in kept],
            dropped=dropped,
            dropped_keys=[row.key for row in left_out[:_DROPPED_KEYS_KEPT]],
            seconds=time.perf_counter() - start,
            digest=hashlib.blake2b(keys.encode(), digest_size=16).hexdigest(),
            orders=[row.order for row in kept],
        )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds one or more texts: float32 [n, d], in order."""
        batches = encode_text_batches(self.model.encode_text, texts, self.batching)
        return np.concatenate(list(batches))

    def _own_entries(self) -> Iterator[tuple[Order, Pair | Skipped]]:
        """Yields the entries of this process's units, every `count`-th unit."""
        index, count = self.batching.processes.index, self.batching.processes.count
        for number in range(index, len(self._units), count):
            for offset, entry in enumerate(self._units[number]()):
                yield (number, offset), entry

    def _embed_share(self, describe: Callable[[Pair], Any]) -> tuple[list[_Row], np.ndarray]:
        """Returns this process's entries, and the embeddings of the usable ones."""
        batching, count = self.batching, self.batching.processes.count
        size = max(1, batching.batch_size // count)
        found: list[_Row] = []
        embedded: list[np.ndarray] = []

        def embed(pixels: list[np.ndarray]) -> None:
            batch = np.stack(pixels)
            # A source smaller than one batch needs no padding, since nothing is compiled yet.
            if embedded:
                batch = np.pad(batch, [(0, size - len(batch))] + [(0, 0)] * (batch.ndim - 1))
            embedded.append(np.asarray(self.model.encode_image(batch), np.float32)[: len(pixels)])

        # With a limit, the entries within it are known only when all processes have
        # finished.
        num_entries = self._units.count_entries() if batching.progress else None
        known: set[Any] = {num_entries, self._limit} - {None}
        entries = ProgressBar(
            itertools.islice(self._own_entries(), self._limit),
            desc=self._name,
            unit=" images",
            disable=not batching.progress,
            total=-(-min(known) // count) if known else None,
        )
        decoded = map_many(
            functools.partial(_decode, describe, self.model.preprocess),
            entries,
            num_threads=batching.num_threads or min(os.cpu_count() or 1, 16),
            ahead=size * _BATCHES_AHEAD,
            num_bytes=lambda ordered: len(ordered[1].image) if isinstance(ordered[1], Pair) else 0,
        )
        pixels: list[np.ndarray] = []
        with contextlib.closing(decoded):
            for row, image in decoded:
                found.append(row)
                pixels += [] if image is None else [image]
                if len(pixels) == size:
                    embed(pixels)
                    pixels = []
            if pixels:
                embed(pixels)
        return found, np.concatenate(embedded) if embedded else np.zeros((0, 0), np.float32)


class _Row(NamedTuple):
    """One entry: its `note` if usable, else the reason why it is skipped."""

    order: Order
    key: str
    note: Any = None
    reason: str | None = None


def _merge_shares(
    shares: Sequence[tuple[list[_Row], np.ndarray]], limit: int | None
) -> tuple[list[_Row], np.ndarray]:
    """Merges the entries of all processes in source order, up to the limit."""
    found = [row for rows, _ in shares for row in rows]
    usable = [row.order for row in found if row.reason is None]
    index_of = {order: i for i, order in enumerate(usable)}
    found = sorted(found, key=lambda row: row.order)[:limit]
    chosen = [index_of[row.order] for row in found if row.reason is None]
    embedded = [image_emb for _, image_emb in shares if len(image_emb)]
    return found, np.concatenate(embedded)[chosen] if embedded else np.zeros((0, 0), np.float32)


def encode_text_batches(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    batching: Batching | None = None,
) -> Iterator[np.ndarray]:
    """Yields [up to batch_size, d] embeddings of the texts, in order.

    All calls of `encode_text` have the same number of texts, with empty ones as padding, so a
    jitted encoder compiles once. With more than one batch, a progress bar is shown.
    """
    batching = batching or Batching()
    batch_size, remaining = batching.batch_size, iter(texts)
    hidden = not batching.progress or len(texts) <= batch_size
    with ProgressBar(total=len(texts), desc="texts", unit=" texts", disable=hidden) as bar:
        while batch := list(itertools.islice(remaining, batch_size)):
            fill = [""] * (batch_size - len(batch)) if len(texts) > batch_size else []
            embedded = np.asarray(encode_text(batch + fill), np.float32)[: len(batch)]
            bar.update(len(batch))
            yield check_finite(embedded, "text embeddings")


def check_finite(embeddings: np.ndarray, what: str) -> np.ndarray:
    """Returns `embeddings` [n, d] unchanged; raises ValueError if any is NaN or infinite.

    Comparisons with NaN are always false, so a diverged model would get arbitrary metrics.
    """
    bad = ~np.isfinite(embeddings).all(axis=-1)
    if bad.any():
        raise ValueError(
            f"{what}: {bad.sum()} of {len(embeddings)} rows are not finite "
            f"(first at {bad.argmax()}); the model has diverged or its weights are broken"
        )
    return embeddings


def _decode(
    describe: Callable[[Pair], Any],
    preprocess: Callable[[PIL.Image.Image], np.ndarray],
    ordered: tuple[Order, Pair | Skipped],
) -> tuple[_Row, np.ndarray | None]:
    """Returns the row of an entry, and its pixels if it is usable."""
    order, entry = ordered
    if isinstance(entry, Skipped):
        return _Row(order, entry.key, reason=entry.reason), None
    try:
        note = describe(entry)
        return _Row(order, entry.key, note), preprocess(decode_picture(entry))
    except UnusablePair as unusable:
        reason = unusable.reason
    except ImageError as error:
        reason = f"image_{error.reason}"
    return _Row(order, entry.key, reason=reason), None
