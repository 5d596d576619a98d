"""Images per second from an object store with 50 ms latency, compared with the local disk.

    python -m benchmarks.input_store

A host with 8 decoding workers reads photos for training (copies of `photos.tar`, with the shorter
side scaled to 256 px). The sides are: `TrainIterator` with the block-shuffled order, from the store
(`slow_store.py`) and from local disk; with the former order, one request per record, from the
store; open_clip's webdataset loader from tars (streams: one request per shard); and grain over
ArrayRecord files with grain's own shuffle, one read per record. Blocks, streams and windows are
small, like the data set. Sides are measured alternately, over whole epochs after the first batches.

The main result is images per second of wall time, which depends on other users of the machine.
Images per second of processor time, over all processes of a side, hardly depend on them.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import os
import pathlib
import statistics
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Generator
from typing import Any

import grain
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from benchmarks import slow_store
from benchmarks.record import write_result
from diht_jax import command_line
from diht_jax.data.index import update_index
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import Mixture, Source
from diht_jax.input.order import BlockOrder, GlobalOrder
from diht_jax.input.pipeline import TrainIterator
from diht_jax.records.formats import TFRecordSource, TFRecordWriter
from diht_jax.records.schema import Record, decode_record, encode_record
from diht_jax.terminal import ProgressBar

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
STORE, LOCAL, GLOBAL = "diht_jax, store", "diht_jax, local disk", "diht_jax, global order, store"
OPEN_CLIP, OPEN_CLIP_LOCAL = "open_clip, store", "open_clip, local disk"
ARRAY_RECORD, ARRAY_RECORD_LOCAL = "grain + ArrayRecord, store", "grain + ArrayRecord, local disk"
AIM_SHARE_OF_LOCAL, AIM_REQUESTS = 0.9, 1.1
# Each thread of a grain worker makes a whole batch, so a worker delivers batches in such bursts.
GRAIN_THREADS, GRAIN_BURSTS = 16, 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """Values of the flags."""

    photos: str
    copies: int
    shards: int
    picture_size: int
    image_size: int
    batch_size: int
    num_workers: int
    latency_secs: float
    block_records: int
    num_streams: int
    window_blocks: int
    read_threads: int
    rounds: int
    epochs: float


def define_flags() -> None:
    """Defines the flags of this command."""
    photos = str(REPOSITORY / "runs/data/photos.tar")
    flags.DEFINE_string("photos", photos, "Webdataset tar of JPEGs.")
    flags.DEFINE_integer("copies", 128, "Of the tar's photos.")
    flags.DEFINE_integer("shards", 8, "Of each format.")
    flags.DEFINE_integer("picture_size", 256, "Pixels of a picture's shorter side.")
    flags.DEFINE_integer("image_size", 224, "Pixels of a crop.")
    flags.DEFINE_integer("batch_size", 64, "Images a batch.")
    flags.DEFINE_integer("num_workers", 8, "Decoding processes.")
    flags.DEFINE_float("latency_secs", 0.05, "Of the store.")
    flags.DEFINE_integer("block_records", 64, "K.")
    flags.DEFINE_integer("num_streams", 8, "V.")
    flags.DEFINE_integer("window_blocks", 4, "W.")
    flags.DEFINE_integer("read_threads", 8, "Blocks that are requested at the same time.")
    flags.DEFINE_integer("rounds", 3, "In which the store and the disk are measured in turn.")
    flags.DEFINE_float("epochs", 0.5, "Of a measurement.")


@dataclasses.dataclass
class Measured:
    """One measurement of a side."""

    images: int
    secs: float
    processor_secs: float
    requests: dict[str, int]
    first_batch_secs: float
    peak_cache_bytes: int = 0


def main() -> None:
    """Measures, prints a table and writes `benchmarks/results/input_pipeline_store.json`."""
    settings = Settings(
        **{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    )
    os.environ["JAX_PLATFORMS"] = "cpu"  # sufficient for the record of the machine
    os.environ[slow_store.LATENCY_SECS] = str(settings.latency_secs)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        num_records = prepare_data(settings, folder)
        rounds = measure(settings, folder, num_records)
    payload = summarize(settings, num_records, rounds)
    print_table(payload)
    print("written:", write_result("input_pipeline_store", payload))
    if payload["share_of_local_disk"] < AIM_SHARE_OF_LOCAL:
        sys.exit(f"below {AIM_SHARE_OF_LOCAL:.0%} of the local disk")
    if payload["requests_per_record_times_k"] > AIM_REQUESTS:
        sys.exit(f"more than {AIM_REQUESTS}/K requests a record")


def prepare_data(settings: Settings, folder: pathlib.Path) -> int:
    """Writes the photos as TFRecord, tar and ArrayRecord shards; returns their number."""
    pairs = list(read_photos(settings.photos, settings.picture_size))
    for name in ("tfrecord", "tar", "array_record"):
        (folder / name).mkdir()
    numbers = list(range(settings.copies * len(pairs)))
    for shard in ProgressBar(range(settings.shards), desc="shards", unit="shard"):
        mine = numbers[shard :: settings.shards]
        array_path = folder / f"array_record/{shard}.array_record"
        array = ArrayRecordWriter(str(array_path), "group_size:1")
        with (
            TFRecordWriter(folder / f"tfrecord/a-{shard:05d}.tfrecord") as writer,
            tarfile.open(folder / f"tar/{shard:05d}.tar", "w") as tar,
        ):
            for number in mine:
                image, caption = pairs[number % len(pairs)]
                element = encode_record(Record(f"{number:06d}", image, caption))
                writer.write(element)
                array.write(element)
                for suffix, data in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        array.close()
    update_index(folder / "tfrecord")
    return len(numbers)


def read_photos(path: str, size: int) -> Generator[tuple[bytes, str]]:
    """Yields JPEGs with a shorter side of `size` pixels, and captions, from a webdataset tar."""
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            if not member.name.endswith(".jpg"):
                continue
            with Image.open(tar.extractfile(member)) as image:
                scale = size / min(image.size)
                shape = [max(size, round(scale * length)) for length in image.size]
                buffer = io.BytesIO()
                image.convert("RGB").resize(shape, Image.Resampling.BICUBIC).save(buffer, "JPEG")
            yield buffer.getvalue(), tar.extractfile(f"{member.name[:-4]}.txt").read().decode()


def measure(
    settings: Settings, folder: pathlib.Path, num_records: int
) -> dict[str, list[Measured]]:
    """Measures all sides; store and disk alternate, so both see the same state of the machine."""
    images = int(settings.epochs * num_records)
    sides: list[tuple[str, Callable[[], Generator[Any]], int]] = []
    for number in range(settings.rounds):
        pair = [
            (STORE, lambda: ours(settings, f"slow://{folder}/tfrecord"), images),
            (LOCAL, lambda: ours(settings, f"{folder}/tfrecord"), images),
        ]
        sides += pair if number % 2 == 0 else pair[::-1]
    tars = f"{folder}/tar/{{00000..{settings.shards - 1:05d}}}.tar"
    pipe = f"pipe:sleep {settings.latency_secs}; cat {tars}"
    bursts = GRAIN_BURSTS * GRAIN_THREADS * settings.num_workers * settings.batch_size
    arrays = [str(path) for path in sorted((folder / "array_record").iterdir())]
    sides += [
        (OPEN_CLIP, lambda: of_open_clip(settings, pipe, num_records), images // 4),
        (OPEN_CLIP_LOCAL, lambda: of_open_clip(settings, tars, num_records), images // 4),
        (ARRAY_RECORD, lambda: of_grain(settings, arrays, slow=True), bursts),
        (ARRAY_RECORD_LOCAL, lambda: of_grain(settings, arrays, slow=False), bursts),
        (GLOBAL, lambda: ours(settings, f"slow://{folder}/tfrecord", blocks=False), 512),
    ]
    rounds: dict[str, list[Measured]] = {}
    for number, (name, start, count) in enumerate(ProgressBar(sides, desc="sides", unit="side")):
        counts = folder / f"counts_{number}"
        counts.mkdir()
        os.environ[slow_store.COUNTS] = str(counts)
        rounds.setdefault(name, []).append(time_side(start(), settings, count, counts))
    return rounds


def ours(settings: Settings, data: str, *, blocks: bool = True) -> Generator[Any]:
    """Iterates over batches of `TrainIterator`."""
    # Imported here because the decoding processes of the other sides import this module.
    from diht_jax.training.recipe import default_config

    source = (slow_store.SlowRecords if data.startswith("slow:") else TFRecordSource)(data)
    order = GlobalOrder(len(source), seed=0)
    if not blocks:
        source.make_offsets_local()  # as `open_mixture` does
    else:
        order = BlockOrder(
            source.block_starts(settings.block_records),
            0,
            num_streams=settings.num_streams,
            window_blocks=settings.window_blocks,
        )
    mixture = Mixture([Source("", source, order, decode_example(settings))])
    data = default_config().data
    data.update(
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        read_threads=settings.read_threads,
    )
    batches = TrainIterator(mixture, data, seed=0)
    try:
        for batch in batches:
            yield len(batch["images"]), cached_bytes(batches)
    finally:
        batches.close()


def cached_bytes(batches: TrainIterator) -> int:
    """Returns the bytes of the blocks cached by a host."""
    folders = [store.folder for store in batches.block_stores]
    sizes = (path.stat().st_size for folder in folders for path in folder.glob("*.block"))
    return sum(sizes)


def decode_example(settings: Settings) -> DecodeExample:
    """Returns the decoder of training."""
    return DecodeExample(settings.image_size, 77, (0.9, 1.0), "{caption}")


def _decode(decode: DecodeExample, data: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return decode.plan(decode_record(data), rng)()


def of_open_clip(settings: Settings, tars: str, num_records: int) -> Generator[Any]:
    """Iterates over batches of open_clip's training data."""
    # Imported here because the decoding processes of the other sides import this module.
    import open_clip
    from open_clip_train.data import get_wds_dataset

    given = types.SimpleNamespace(
        train_data=tars,
        train_num_samples=num_records,
        train_data_upsampling_factors=None,
        dataset_resampled=True,  # endless, as its documentation recommends for large data
        seed=0,
        batch_size=settings.batch_size,
        workers=settings.num_workers,
        world_size=1,
    )
    transform = open_clip.image_transform(
        settings.image_size, is_train=True, aug_cfg={"scale": (0.9, 1.0)}
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(given, transform, is_train=True, tokenizer=tokenizer)
    while True:
        for images, _ in data.dataloader:
            yield len(images), 0


def of_grain(settings: Settings, paths: list[str], *, slow: bool) -> Generator[Any]:
    """Iterates over batches of grain from ArrayRecord files, decoded like ours."""
    source = grain.sources.ArrayRecordDataSource(paths)
    dataset = grain.MapDataset.source(slow_store.SlowSequence(source) if slow else source)
    decode = functools.partial(_decode, decode_example(settings))
    dataset = dataset.seed(0).shuffle().repeat().random_map(decode)
    dataset = dataset.batch(settings.batch_size, drop_remainder=True)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=GRAIN_THREADS))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=settings.num_workers)
    batches = iter(dataset.mp_prefetch(options))
    try:
        for batch in batches:
            yield len(batch["images"]), 0
    finally:
        batches.close()


def time_side(
    batches: Generator[Any], settings: Settings, images: int, counts: pathlib.Path
) -> Measured:
    """Times a number of images of a side, after the images that were decoded ahead."""
    began = time.perf_counter()
    next(batches)
    first_batch_secs = time.perf_counter() - began
    # All workers together hold this many: timed batches were not decoded before the start.
    ahead = min(images, 4 * settings.num_workers * settings.batch_size)
    for _ in itertools.islice(batches, ahead // settings.batch_size):
        pass
    before, secs, processor_secs = slow_store.read_counts(counts), time.perf_counter(), cpu_secs()
    taken = list(itertools.islice(batches, images // settings.batch_size))
    timed, cache_bytes = sum(size for size, _ in taken), max(size for _, size in taken)
    secs, processor_secs = time.perf_counter() - secs, cpu_secs() - processor_secs
    after = slow_store.read_counts(counts)
    batches.close()
    requests = {kind: after[kind] - before.get(kind, 0) for kind in after}
    requests["before"] = sum(before.values()) - before.get("total_bytes", 0)
    if requests.get("bytes"):  # blocks that were fetched ahead belong to later records
        more = (taken[-1][1] - taken[0][1]) * requests["bytes"] / requests["total_bytes"]
        requests["bytes"] -= round(more)
    return Measured(timed, secs, processor_secs, requests, first_batch_secs, cache_bytes)


def cpu_secs() -> float:
    """Returns the processor time of this process and its descendants, running or ended."""
    children: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for path in pathlib.Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.name))
        # Its own time, and the time of its ended children.
        times[int(path.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        total += times.get(pid, 0.0)
        waiting += children.get(pid, [])
    return total


def summarize(
    settings: Settings, num_records: int, rounds: dict[str, list[Measured]]
) -> dict[str, Any]:
    """Computes the medians, and the figures of interest."""

    def median(name: str, figure: Callable[[Measured], float]) -> float:
        return statistics.median(map(figure, rounds[name]))

    speeds = {n: round(median(n, lambda m: m.images / m.secs), 1) for n in rounds}
    processor = {n: round(median(n, lambda m: m.images / m.processor_secs), 1) for n in rounds}
    requests = {n: median(n, lambda m: m.requests.get("bytes", 0) / m.images) for n in rounds}
    for name in (OPEN_CLIP, OPEN_CLIP_LOCAL):
        requests[name] = settings.shards / num_records if name == OPEN_CLIP else 0
    return {
        "settings": dataclasses.asdict(settings) | {"photos": pathlib.Path(settings.photos).name},
        "records": num_records,
        "load_average": os.getloadavg(),
        "images_per_sec": speeds,
        "images_per_processor_sec": processor,
        "requests_per_record": {n: round(value, 5) for n, value in requests.items()},
        "requests_before_the_timed_part": rounds[STORE][0].requests["before"],
        "share_of_local_disk": round(speeds[STORE] / speeds[LOCAL], 3),
        "share_of_local_disk_by_processor": round(processor[STORE] / processor[LOCAL], 3),
        "requests_per_record_times_k": round(requests[STORE] * settings.block_records, 3),
        "first_batch_secs": {n: round(median(n, lambda m: m.first_batch_secs), 2) for n in rounds},
        "cache_peak_bytes": max(m.peak_cache_bytes for m in rounds[STORE]),
        "rounds": {n: [dataclasses.asdict(m) for m in listed] for n, listed in rounds.items()},
    }


def print_table(payload: dict[str, Any]) -> None:
    """Prints the result as a table."""
    print(f"{'':32s}{'images/s':>10s}{'of a core':>11s}{'requests/record':>17s}")
    for name, speed in payload["images_per_sec"].items():
        print(
            f"{name:32s}{speed:10,.0f}{payload['images_per_processor_sec'][name]:11,.0f}"
            f"{payload['requests_per_record'][name]:17.4f}"
        )
    print(
        f"{payload['share_of_local_disk']:.0%} of the local disk, by processor time "
        f"{payload['share_of_local_disk_by_processor']:.0%}; "
        f"{payload['requests_per_record_times_k']:.3f}/K requests a record; cache: "
        f"{payload['cache_peak_bytes'] / 1e6:.1f} MB at most"
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
