"""Embeds pairs and texts in batches of one shape, with decoding ahead of the device.

Nothing here knows a metric, a task or a file: pairs come in as an iterator, embeddings go out as
NumPy arrays.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, Protocol

import numpy as np
import PIL.Image

from diht_jax.evaluation.embedding.entries import Entries, Order, ProcessRows
from diht_jax.evaluation.sources.pictures import decode_picture
from diht_jax.input.decode import ImageError
from diht_jax.progress import ProgressBar
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

# Decoded images waiting for the device, in batches: enough to keep the threads busy while one
# batch is on the device, small enough for the memory of a laptop.
_BATCHES_AHEAD = 2

# Of encoded images that wait for a thread; an ordinary window takes a tenth of it.
_WAITING_BYTES = 2**28

_DROPPED_KEYS_KEPT = 10


class EmbeddingModel(Protocol):
    """The methods of a model that evaluation uses; `diht_jax.loading.LoadedModel` is one."""

    @property
    def logit_scale(self) -> float:
        """The factor of cosines, after exp."""

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """Embeds uint8 [b, h, w, 3]: float32 [b, d], L2-normalised."""

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [b, d], L2-normalised."""

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray:
        """Crops and resizes a picture: uint8 [h, w, 3]."""


class UnusablePair(ValueError):
    """Raised by a `describe` for a pair that the task cannot use; counted under `reason`."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Batching:
    """The way a source is embedded.

    Attributes:
        batch_size: images, and texts, a batch over all devices.
        num_threads: decoding threads; None is one per core, 16 at most.
        progress: show bars on stderr.
    """

    batch_size: int = 256
    num_threads: int | None = None
    progress: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """The usable images of a source, embedded, in the order of the source.

    Attributes:
        image_emb: float32 [n, d], L2-normalised.
        notes: n values, what `describe` returned for each usable pair.
        positions: n ints, the index of each usable pair among the entries.
        dropped: reason -> number of entries left out: "image_" + a reason of `data.images.decode`,
            reason of a `Skipped` entry or an `UnusablePair`.
        dropped_keys: keys of the first few of them.
        seconds: wall time of reading, decoding and encoding together.
        digest: of the keys of the usable pairs, in order: equal where two models saw the same.
        orders: of each usable pair, the number of its unit of `Entries` and its own in it.
    """

    image_emb: np.ndarray
    notes: list[Any]
    positions: list[int]
    dropped: dict[str, int]
    dropped_keys: list[str]
    seconds: float
    digest: str = ""
    orders: list[Order] = dataclasses.field(default_factory=list)


def encode_images(
    model: EmbeddingModel,
    entries: Iterable[Pair | Skipped],
    describe: Callable[[Pair], Any],
    batching: Batching | None = None,
    *,
    allow_empty: bool = False,
) -> EncodedImages:
    """Embeds the image of every pair; a pair that cannot be used is counted with its reason.

    Threads decode and resize while the device works. All batches have one shape: the last one is
    filled up and what was filled in is cut off again, so each image counts exactly once.

    Args:
        model: see `EmbeddingModel`; uses all its devices.
        entries: consumed once, in order. In a job of several processes each reads its share of
            `Entries`; any others are read by all, and each decodes its share.
        describe: called once per pair, in order; what it returns is kept, so it should be small.
            Raises `UnusablePair` to leave a pair out, any other ValueError to stop.
        batching: the defaults where None.
        allow_empty: without any usable pair, return embeddings of shape [0, 0].

    Raises:
        ValueError: no usable pair at all, unless `allow_empty`; or an embedding that is not
            finite.
    """
    start = time.perf_counter()
    batching = batching or Batching()
    rows = ProcessRows.of(model, batching.batch_size)
    shares, image_emb = _encode_share(rows, model, entries, describe, batching.num_threads)
    kept = [row for own, _ in shares for row in own]
    left_out = [row for _, own in shares for row in own]
    orders = sorted(order for order, _, _ in [*kept, *left_out])
    if rows.count > 1:  # in order again, and within the limit
        orders = orders[: entries.limit] if isinstance(entries, Entries) else orders
        counted = set(orders)
        chosen = sorted((row[0], i) for i, row in enumerate(kept) if row[0] in counted)
        image_emb, kept = image_emb[[i for _, i in chosen]], [kept[i] for _, i in chosen]
        left_out = sorted(row for row in left_out if row[0] in counted)
    position_of = {order: position for position, order in enumerate(orders)}
    dropped = dict(collections.Counter(reason for _, _, reason in left_out))
    if not len(image_emb) and not allow_empty:
        raise ValueError(
            f"no usable pair in the source: {len(left_out)} entries, left out for {dropped}"
        )
    check_finite(image_emb, "image embeddings")
    keys = "\n".join(key for _, key, _ in kept)
    return EncodedImages(
        image_emb=image_emb,
        notes=[note for _, _, note in kept],
        positions=[position_of[order] for order, _, _ in kept],
        dropped=dropped,
        dropped_keys=[key for _, key, _ in left_out[:_DROPPED_KEYS_KEPT]],
        seconds=time.perf_counter() - start,
        digest=hashlib.blake2b(keys.encode(), digest_size=16).hexdigest(),
        orders=[order for order, _, _ in kept],
    )


# An entry's order, its key, and the note of a usable one or the reason why it is left out.
_Row = tuple[Order, str, Any]


def _encode_share(
    rows: ProcessRows,
    model: EmbeddingModel,
    entries: Iterable[Pair | Skipped],
    describe: Callable[[Pair], Any],
    num_threads: int | None,
) -> tuple[list[tuple[list[_Row], list[_Row]]], np.ndarray]:
    """Decodes and embeds the entries of this process, together with the others.

    Every batch holds rows of all processes, as many of each as it has, so that all call the model
    equally often; what was found is exchanged once, at the end.

    Returns:
        The usable and the other entries of each process, and all embeddings of usable ones, process
        by process.
    """
    kept: list[_Row] = []
    left_out: list[_Row] = []
    embeddings: list[list[np.ndarray]] = [[] for _ in range(rows.count)]
    room = len(rows.own)
    window = room * _BATCHES_AHEAD
    decoded = _decode_ahead(rows.share(entries), describe, model.preprocess, window, num_threads)

    def take() -> list[np.ndarray]:
        pixels: list[np.ndarray] = []
        for row, image in decoded:
            if image is None:
                left_out.append(row)
                continue
            kept.append(row)
            pixels.append(image)
            if len(pixels) == room:
                break
        return pixels

    with contextlib.closing(decoded):
        while True:
            pixels, error = [], None
            try:
                pixels = take()
            except Exception as problem:  # the others would wait for this process without end
                error = problem
            counts = rows.agree(len(pixels), error)
            if not any(counts):
                break
            if rows.count == 1 and not embeddings[0]:
                # A source smaller than one batch needs no filling: nothing is compiled yet.
                batch = np.stack(pixels)
            else:
                shape = pixels[0].shape if pixels else (model.image_size, model.image_size, 3)
                batch = np.zeros((rows.batch_size, *shape), np.uint8)
                if pixels:
                    batch[rows.own[: len(pixels)]] = pixels
            found = np.asarray(model.encode_image(batch), np.float32)
            for process, count in enumerate(counts):
                embeddings[process].append(found[rows.of_process(process)[:count]])
    nothing = np.zeros((0, 0), np.float32)
    found = [batch for batches in embeddings for batch in batches]
    return rows.gather_objects((kept, left_out)), np.concatenate(found or [nothing])


def encode_texts(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    batching: Batching | None = None,
) -> np.ndarray:
    """Embeds at least one text: float32 [n, d], in order; see `encode_text_batches`."""
    return np.concatenate(list(encode_text_batches(encode_text, texts, batching)))


def encode_text_batches(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    texts: Sequence[str],
    batching: Batching | None = None,
) -> Iterator[np.ndarray]:
    """Yields [up to batch_size, d] embeddings of the texts, in order.

    Every call of `encode_text` gets the same number of texts (the last batch is filled up with
    empty ones), so a jitted encoder compiles once. A bar is shown where there is more than one.
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
    """Returns `embeddings` [n, d] as they are; a NaN or infinity in them is a ValueError.

    A comparison with NaN is false both ways, so a diverged model would get arbitrary numbers.
    """
    bad = ~np.isfinite(embeddings).all(axis=-1)
    if bad.any():
        raise ValueError(
            f"{what}: {bad.sum()} of {len(bad)} rows are not finite (first at {bad.argmax()}); "
            "the model has diverged or its weights are broken"
        )
    return embeddings


def _decode_ahead(
    entries: Iterable[tuple[Order, Pair | Skipped]],
    describe: Callable[[Pair], Any],
    preprocess: Callable[[PIL.Image.Image], np.ndarray],
    window: int,
    num_threads: int | None,
) -> Iterator[tuple[_Row, np.ndarray | None]]:
    """Yields rows with their pixels, in order, up to `window` images in work.

    Fewer are in work where their encoded bytes take much memory. Without pixels is what is left
    out, with its reason.
    """

    def decode(pair: Pair) -> np.ndarray | ImageError:
        try:
            return preprocess(decode_picture(pair))
        except ImageError as error:
            return error

    pool = futures.ThreadPoolExecutor(num_threads or min(os.cpu_count() or 1, 16))
    queue: collections.deque[tuple[_Row, futures.Future | None, int]] = collections.deque()
    waiting_bytes = 0
    try:
        for order, entry in itertools.chain(entries, [(None, None)]):
            if isinstance(entry, Skipped):
                queue.append(((order, entry.key, entry.reason), None, 0))
            elif entry is not None:
                try:
                    note = describe(entry)
                except UnusablePair as unusable:
                    queue.append(((order, entry.key, unusable.reason), None, 0))
                else:
                    work = pool.submit(decode, entry)
                    queue.append(((order, entry.key, note), work, len(entry.image)))
                    waiting_bytes += len(entry.image)
            while queue and (
                entry is None or len(queue) > window or waiting_bytes > _WAITING_BYTES
            ):
                row, work, size = queue.popleft()
                waiting_bytes -= size
                outcome = None if work is None else work.result()
                if isinstance(outcome, ImageError):
                    row, outcome = (*row[:2], f"image_{outcome.reason}"), None
                yield row, outcome
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
