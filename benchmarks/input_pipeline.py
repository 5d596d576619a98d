"""Images per second and core: our input pipeline, open_clip's, and the bare JPEG decoders.

    python -m benchmarks.input_pipeline --photos runs/data/photos.tar

Both sides read the same JPEG files and captions. open_clip reads webdataset tars with its own
`get_wds_dataset` (webdataset, `image_transform(is_train=True)`, its tokenizer, collated float32
batches). `TrainIterator` reads TFRecord shards that `data_prep.filter` makes of these tars (uint8
batches; the device normalises). One process on one core measures them alternately. Every round
starts a new iterator, skips its first batches, and times a fixed number of batches. The decoders
only decode the bytes to full-size RGB pixels.

There are three data sets: the original photos (at most 384 px), and the photos re-encoded with a
longer side of 512 px, and of 256 to 1,024 px.

The results are images per second of processor time, over all threads of the process. On an idle
core this equals wall time (also recorded), and it stays valid when others use the core as well.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
from collections.abc import Callable, Generator
from importlib import metadata
from typing import Any

import jax
import numpy as np
import open_clip
import simplejpeg
import torch
from absl import flags
from open_clip_train.data import get_wds_dataset
from PIL import Image

from benchmarks.record import write_result
from diht_jax import command_line
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import Mixture, Source
from diht_jax.input.order import GlobalOrder
from diht_jax.input.pipeline import TrainIterator
from diht_jax.records import schema
from diht_jax.records.train_data import open_records
from diht_jax.terminal import ProgressBar
from diht_jax.training.recipe import default_config

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
OURS, EXACT, OPEN_CLIP = "diht_jax", "diht_jax_exact", "open_clip"
AIM_RATIO = 2.0
AS_IS = "384 px"
# Name -> range of the longer side to which the photos are scaled.
DATA_SETS = {AS_IS: None, "512 px": (512, 512), "256 to 1024 px": (256, 1024)}


def decode_with_pillow(data: bytes) -> Image.Image:
    """Decodes bytes to RGB pixels like webdataset."""
    return Image.open(io.BytesIO(data)).convert("RGB")


DECODERS = {"simplejpeg": simplejpeg.decode_jpeg, "pillow": decode_with_pillow}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Values of the flags."""

    photos: str
    copies: int
    rounds: int
    batches: int
    warmup_batches: int
    batch_size: int
    image_size: int
    crop_scale: tuple[float, float]


def define_flags() -> None:
    """Defines the flags of this command."""
    photos = str(REPOSITORY / "runs/data/photos.tar")
    flags.DEFINE_string("photos", photos, "Webdataset tar of JPEGs.")
    # With 1,500 records, grain's shuffle takes 22 us per index (it walks a domain of 65,536 until
    # it hits a record); with 6,000 records it takes 8, and with millions 4.
    flags.DEFINE_integer("copies", 40, "Of the tar: shards on both sides.")
    flags.DEFINE_integer("rounds", 7, "Rounds; medians are over these.")
    flags.DEFINE_integer("batches", 8, "Batches that are timed in a round.")
    flags.DEFINE_integer("warmup_batches", 3, "Batches that are left out in a round.")
    flags.DEFINE_integer("batch_size", 64, "Images a batch.")
    flags.DEFINE_integer("image_size", 224, "Pixels, of both sides.")
    flags.DEFINE_list("crop_scale", ["0.9", "1.0"], "Least and largest share of the area: 0.9,1.0.")


def read_settings() -> Settings:
    """Reads the settings from the flags.

    Raises:
        ValueError: there is no such tar, or a range does not have two numbers.
    """
    given = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    if not pathlib.Path(given["photos"]).is_file():
        raise ValueError(
            f"--photos={given['photos']}: no such file; expected a webdataset tar of JPEGs"
        )
    try:
        low, high = map(float, given["crop_scale"])
    except ValueError as error:
        raise ValueError(
            f"--crop_scale={','.join(given['crop_scale'])}: expected two numbers, such as 0.9,1.0"
        ) from error
    return Settings(**{**given, "crop_scale": (low, high)})


def main() -> None:
    """Measures, prints a table and writes `benchmarks/results/input_pipeline.json`."""
    settings = read_settings()
    jax.config.update("jax_platforms", "cpu")  # sufficient for the record of the machine
    cores = os.sched_getaffinity(0)
    payloads = {}
    for name, sides in DATA_SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            photos = settings.photos
            if sides is not None:
                photos = f"{folder}/scaled/photos.tar"
                os.mkdir(os.path.dirname(photos))
                scale_photos(settings.photos, photos, sides)
            tars, records = prepare_data(photos, settings.copies, pathlib.Path(folder))
            os.sched_setaffinity(0, {max(cores)})
            torch.set_num_threads(1)
            rounds = measure(make_sides(settings, tars, records), settings)
            os.sched_setaffinity(0, cores)
        payloads[name] = summarize(rounds, settings)
        print_table(name, payloads[name])
    others = {name: payload for name, payload in payloads.items() if name != AS_IS}
    payload = payloads[AS_IS] | {"other_data_sets": others}
    print("written:", write_result("input_pipeline", payload))
    if payload["ratio_to_open_clip"] < AIM_RATIO:
        sys.exit(f"below the aim of {AIM_RATIO} x open_clip")


def scale_photos(source: str, target: str, sides: tuple[int, int]) -> None:
    """Copies a tar with every photo scaled and re-encoded at quality 90.

    Args:
        source: webdataset tar of JPEGs.
        target: tar to write.
        sides: range of the longer side in pixels; drawn for each photo.
    """
    rng = random.Random(0)
    with tarfile.open(source) as tar, tarfile.open(target, "w") as written:
        for member in filter(tarfile.TarInfo.isfile, tar):
            data = tar.extractfile(member).read()
            if member.name.endswith((".jpg", ".jpeg")):
                image = decode_with_pillow(data)
                factor = rng.randint(*sides) / max(image.size)
                size = tuple(max(1, round(side * factor)) for side in image.size)
                buffer = io.BytesIO()
                image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                data = buffer.getvalue()
            entry = tarfile.TarInfo(member.name)
            entry.size = len(data)
            written.addfile(entry, io.BytesIO(data))


def prepare_data(photos: str, copies: int, folder: pathlib.Path) -> tuple[str, str]:
    """Copies the tar to several shards, and filters these to TFRecords like a user would.

    Several copies make shards and epochs as large as shuffling expects.

    Returns:
        The tars as a brace pattern, and the folder of the TFRecords.
    """
    for number in range(copies):
        (folder / f"{number:05d}.tar").symlink_to(pathlib.Path(photos).resolve())
    records = folder / "records"
    command = [
        *(sys.executable, "-m", "data_prep.filter"),
        f"--config={REPOSITORY / 'configs/prep/convert.py'}",
        f"--config.input={folder}/*.tar",
        f"--config.output={records}",
    ]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=sys.stderr)
    return f"{folder}/{{00000..{copies - 1:05d}}}.tar", str(records)


def make_sides(
    settings: Settings, tars: str, records: str
) -> dict[str, Callable[[], Generator[int]]]:
    """Returns name -> function that starts an iterator over the image counts of its batches."""
    source = open_records(records)
    files = [schema.decode_record(source[index]).image for index in range(len(source))]
    sides = {
        OURS: lambda: iterate_ours(settings, source, fast_decode=True),
        OPEN_CLIP: lambda: iterate_open_clip(settings, tars, len(source)),
        EXACT: lambda: iterate_ours(settings, source, fast_decode=False),
    }
    for name, decode in DECODERS.items():
        sides[name] = functools.partial(iterate_decoder, decode, files, settings.batch_size)
    return sides


def iterate_ours(settings: Settings, source: Any, *, fast_decode: bool) -> Generator[int]:
    """Iterates over batches of `TrainIterator`, decoded in threads of this process."""
    decode = DecodeExample(
        settings.image_size, 77, settings.crop_scale, "{caption}", fast_decode=fast_decode
    )
    mixture = Mixture([Source("", source, GlobalOrder(len(source), seed=0), decode)])
    data = default_config().data
    data.update(batch_size=settings.batch_size, num_workers=0)
    batches = TrainIterator(mixture, data, seed=0)
    try:
        for batch in batches:
            assert batch["images"].shape[1:] == (settings.image_size, settings.image_size, 3)
            assert batch["images"].dtype == np.uint8 and batch["tokens"].shape[1] == 77
            yield len(batch["images"])
    finally:
        batches.close()


def iterate_open_clip(settings: Settings, tars: str, num_samples: int) -> Generator[int]:
    """Iterates over batches of open_clip's training data, loaded in this process."""
    open_clip_settings = types.SimpleNamespace(
        train_data=tars,
        train_num_samples=num_samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=settings.batch_size,
        workers=0,
        world_size=1,
    )
    transform = open_clip.image_transform(
        settings.image_size, is_train=True, aug_cfg={"scale": settings.crop_scale}
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = get_wds_dataset(open_clip_settings, transform, is_train=True, tokenizer=tokenizer)
    for images, texts in data.dataloader:
        assert images.shape[1:] == (3, settings.image_size, settings.image_size)
        assert images.dtype == torch.float32 and texts.shape[1] == 77
        yield len(images)


def iterate_decoder(
    decode: Callable[[bytes], Any], files: list[bytes], batch_size: int
) -> Generator[int]:
    """Decodes the files one after another to full-size RGB pixels, and counts them in batches."""
    endless = itertools.cycle(files)
    while True:
        for data in itertools.islice(endless, batch_size):
            decode(data)
        yield batch_size


def measure(
    sides: dict[str, Callable[[], Generator[int]]], settings: Settings
) -> dict[str, list[dict[str, float]]]:
    """Times all sides alternately, with the order rotated by one in each round.

    Returns:
        For each side one dict per round: images per second of wall time and of processor time.
    """
    names = list(sides)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in ProgressBar(range(settings.rounds), desc="rounds", unit="round"):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            rounds[name].append(
                time_batches(sides[name](), settings.warmup_batches, settings.batches)
            )
    return rounds


def time_batches(batches: Generator[int], warmup: int, count: int) -> dict[str, float]:
    """Measures images per second of `count` batches after `warmup` others.

    The buffers are full both when the timer starts and when it stops, so batches decoded ahead of
    the start are balanced by those decoded ahead of the end.
    """
    for _ in range(warmup):
        next(batches)
    wait_until_idle()
    wall, processor = time.perf_counter(), time.process_time()
    images = sum(itertools.islice(batches, count))
    wall = time.perf_counter() - wall
    wait_until_idle()
    processor = time.process_time() - processor
    batches.close()
    wait_until_idle()
    return {"wall": images / wall, "processor": images / processor}


def wait_until_idle() -> None:
    """Waits until no other thread of this process has been busy for a while."""
    idle = 0
    while idle < 4:
        time.sleep(0.02)
        idle = 0 if any(map(is_running, pathlib.Path("/proc/self/task").iterdir())) else idle + 1


def is_running(task: pathlib.Path) -> bool:
    """Returns whether a thread, given as a folder of /proc/self/task, is running or runnable."""
    try:
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # the thread has ended in the meantime
        return False
    return state == "R" and int(task.name) != threading.get_native_id()


def summarize(rounds: dict[str, list[dict[str, float]]], settings: Settings) -> dict[str, Any]:
    """Computes the medians, and the ratios of interest."""

    def median(name: str, clock: str) -> float:
        return statistics.median(figures[clock] for figures in rounds[name])

    def ratio(other: str, clock: str) -> float:
        return round(median(OURS, clock) / median(other, clock), 3)

    best_decoder = max(DECODERS, key=lambda name: median(name, "processor"))
    return {
        "settings": dataclasses.asdict(settings) | {"photos": pathlib.Path(settings.photos).name},
        "load_average": os.getloadavg(),
        "simplejpeg": metadata.version("simplejpeg"),
        "images_per_sec_and_core": {name: round(median(name, "processor"), 1) for name in rounds},
        "images_per_wall_sec": {name: round(median(name, "wall"), 1) for name in rounds},
        "ratio_to_open_clip": ratio(OPEN_CLIP, "processor"),
        "ratio_to_open_clip_wall": ratio(OPEN_CLIP, "wall"),
        "decode_limit": best_decoder,
        "share_of_decode_limit": ratio(best_decoder, "processor"),
        "share_of_pillow_limit": ratio("pillow", "processor"),
        "rounds": rounds,
    }


def print_table(data_set: str, payload: dict[str, Any]) -> None:
    """Prints the result as a table."""
    print(f"{data_set:16s}{'images/s and core':>18s}{'by the clock':>14s}")
    for name, speed in payload["images_per_sec_and_core"].items():
        print(f"{name:16s}{speed:18,.0f}{payload['images_per_wall_sec'][name]:14,.0f}")
    print(
        f"{payload['ratio_to_open_clip']:.2f} x open_clip; "
        f"{payload['share_of_decode_limit']:.0%} of the bare decode limit "
        f"({payload['decode_limit']})"
    )


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
