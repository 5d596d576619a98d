"""Recall and precision of the duplicate search on photos and drawings with planted copies.

    python -m benchmarks.duplicates --data runs/data

One copy of every photo of `photos.tar` is planted among the 4,000 photos of `cifar10_train.tar`,
with one set per edit: resized to half, re-encoded (JPEG, quality 50), cropped to 90% or 85% of each
side at a random position, or mirrored. Recall: planted copies that are dropped as copies of their
photo. Precision: share of these in all dropped photos and copies. Also, a copy of every tenth emoji
is planted among all 3,786, many of which are similar (hearts in nine colours, 24 clocks, coins,
flags). Their captions differ, so by default none is dropped as a copy of another; `other_captions`
is "drop" here. Correct are copies of the same emoji, or of one with the same pixels. Prints both
for cosines only, with verification by thumbnails, and with comparison of colours, and writes
`benchmarks/results/duplicates.json`. Embeddings are the descriptors; no model is needed.

    python -m benchmarks.duplicates --data runs/data --drawings stamps.tar

runs the second part on other drawings, and writes `benchmarks/results/duplicates_drawings.json`.

    python -m benchmarks.duplicates --data runs/data --model runs/emoji

compares the emoji by embeddings that `diht_jax.embed` computes with a model, and writes
`benchmarks/results/duplicates_model.json`. Here the emoji of one name in several skin tones or
directions count as duplicates of one another, and all others do not.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import io
import itertools
import pathlib
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
import pyarrow.parquet
from absl import flags
from PIL import Image

from benchmarks.record import write_result
from data_prep.duplicates import config as duplicates_config
from data_prep.duplicates import job
from diht_jax import command_line, load_model
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from diht_jax.input.transforms import decode_rgb
from diht_jax.readers.registry import open_source

EDITS = ("resized", "re-encoded", "cropped 90%", "cropped 85%", "flipped")
# Edits of the planted emoji; one of every `PLANTED` emoji is planted.
DRAWING_EDITS, PLANTED = ("resized", "cropped 90%"), 10


class Setting(NamedTuple):
    """Settings to compare; correlation None: no thumbnails; difference 1: grey values only."""

    threshold: float
    correlation: float | None
    probes: int
    difference: float = 1.0


SETTINGS = (
    *(Setting(threshold, None, 1) for threshold in (0.85, 0.9, 0.95, 0.98)),
    Setting(0.9, None, 2),
    Setting(0.7, 0.95, 1),
    *(Setting(0.7, correlation, 2) for correlation in (0.9, 0.93, 0.95, 0.97)),
    Setting(0.6, 0.95, 2),
    *(Setting(0.6, 0.95, 2, difference) for difference in (0.05, 0.08, 0.1)),
)
DRAWING_SETTINGS = SETTINGS[-4:]
# Settings for the embeddings of a model.
MODEL_SETTINGS = (
    *(Setting(threshold, None, 2) for threshold in (0.8, 0.9, 0.95, 0.98)),
    *(Setting(threshold, 0.95, 2) for threshold in (0.5, 0.7, 0.9)),
)
_TONE = re.compile(r"( facing right)?( with [\w, -]+ skin tone)?$")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("data", None, "Folder with photos.tar, cifar10_train.tar and emoji_*.tar.")
    flags.DEFINE_integer("seed", 0, "Of the crops.")
    flags.DEFINE_string("drawings", None, "A tar of other drawings, which are compared alone.")
    flags.DEFINE_string("model", None, "What diht_jax.load_model reads: emoji alone, by it.")


def main() -> None:
    """Measures, prints and writes the results."""
    command_line.require_flags("data")
    data = pathlib.Path(flags.FLAGS.data)
    values, photos, drawings = flags.FLAGS, [], []
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        if values.model is not None:
            emoji = list(_compare_by_model(values.model, data, work))
            write_result("duplicates_model", {"model": values.model, "emoji": emoji})
            return
        for edit in EDITS if values.drawings is None else ():
            path = work / f"{edit}.tar"
            plant(data / "photos.tar", path, edit, values.seed)
            inputs = f"{data / 'photos.tar'},{path},{data / 'cifar10_train.tar'}"
            config = _config(inputs, work / edit)
            config.embeddings.mirrored = edit == "flipped"
            for found in _run(config, SETTINGS):
                photos.append({"edit": edit} | _score_photos(found))
                print(photos[-1], flush=True)
        emoji = [data / f"{name}.tar" for name in ("emoji_google", "emoji_twitter")]
        for source in emoji if values.drawings is None else [pathlib.Path(values.drawings)]:
            for edit in DRAWING_EDITS:
                path = work / f"{source.stem} {edit}.tar"
                plant(source, path, edit, values.seed, PLANTED)
                config = _config(f"{source},{path}", work / f"{source.stem} {edit}")
                for found in _run(config, DRAWING_SETTINGS):
                    scores = _score_drawings(found, _hash_pixels(source))
                    drawings.append({"set": source.stem, "edit": edit} | scores)
                    print(drawings[-1], flush=True)
    if values.drawings is not None:
        write_result("duplicates_drawings", {"drawings": drawings})
    else:
        write_result("duplicates", {"photos": photos, "drawings": drawings})


def _compare_by_model(model: str, data: pathlib.Path, work: pathlib.Path) -> Iterator[dict]:
    """Yields the scores on the emoji of both artists, with the embeddings of a model."""
    loaded = load_model(model)
    for name in ("emoji_google", "emoji_twitter"):
        source, embedded = data / f"{name}.tar", work / "embedded" / name
        captions = _read_captions(source)
        embed_source(loaded, str(source), embedded, EmbedOptions(modalities=["image"]))
        for number, settings in enumerate(MODEL_SETTINGS):
            config = _config(str(source), work / f"{name}_{number}")
            config.embeddings.update({"kind": "files", "files": str(embedded)})
            for found in _run(config, [settings]):
                scores = {"set": name} | _score_emoji(found, captions)
                print(scores, flush=True)
                yield scores


def _read_captions(source: pathlib.Path) -> dict[str, str]:
    return {pair.key: pair.caption for pair in open_source(str(source))}


def plant(source: pathlib.Path, target: pathlib.Path, edit: str, seed: int, every: int = 1) -> None:
    """Writes a tar with edited copies of every `every`-th image, with the key "copy-KEY"."""
    generator = np.random.default_rng(seed)
    with tarfile.open(target, "w") as tar:
        for pair in itertools.islice(open_source(str(source)), 0, None, every):
            data = _edit(decode_rgb(pair.image), edit, generator)
            for suffix, content in (("jpg", data), ("txt", pair.caption.encode())):
                member = tarfile.TarInfo(f"copy-{pair.key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _edit(image: Image.Image, edit: str, generator: np.random.Generator) -> bytes:
    width, height = image.size
    if edit == "resized":
        image = image.resize((width // 2, height // 2), Image.Resampling.BICUBIC)
    elif edit == "flipped":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif edit.startswith("cropped"):
        share = int(edit.split()[1].removesuffix("%")) / 100
        size = round(share * width), round(share * height)
        left = int(generator.integers(0, width - size[0] + 1))
        top = int(generator.integers(0, height - size[1] + 1))
        image = image.crop((left, top, left + size[0], top + size[1]))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50 if edit == "re-encoded" else 90)
    return buffer.getvalue()


def _config(inputs: str, output: pathlib.Path) -> ml_collections.ConfigDict:
    config = duplicates_config.default_config()
    config.update({"input": inputs, "output": str(output), "keep": "first", "num_workers": 1})
    config.clusters.rows_per_cluster = 1000  # several clusters, as for large data sets
    config.report_pairs, config.other_captions = 0, "drop"
    return config


def _run(
    config: ml_collections.ConfigDict, settings: Sequence[Setting]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yields each setting with the rows of the table that it produces."""
    for setting in settings:
        config.threshold, config.verify.correlation = setting.threshold, setting.correlation
        config.clusters.probes, config.verify.difference = setting.probes, setting.difference
        duplicates_config.check_config(config)
        if job.run(config):
            raise ValueError("the search failed")
        files = sorted(pathlib.Path(config.output, "duplicates").glob("*.parquet"))
        rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
        yield setting._asdict(), rows


def _score_photos(found: tuple[dict[str, Any], list[dict[str, Any]]]) -> dict[str, Any]:
    setting, rows = found
    photos = {row["key"].removeprefix("copy-") for row in rows if row["key"].startswith("copy-")}
    copies = [row for row in rows if row["key"].startswith("copy-")]
    dropped = [
        row for row in rows if row["kind"] != "kept" and row["key"].removeprefix("copy-") in photos
    ]
    right = [row for row in dropped if _is_copy(row)]
    others = [row for row in rows if row["key"].removeprefix("copy-") not in photos]
    return setting | {
        "recall": round(sum(map(_is_copy, copies)) / len(copies), 4),
        "precision": round(len(right) / len(dropped), 4) if dropped else None,
        "copies": len(copies),
        "dropped": len(dropped),
        "cifar10_dropped": sum(row["kind"] != "kept" for row in others),
    }


def _is_copy(row: dict[str, Any]) -> bool:
    return row["key"] == f"copy-{row['duplicate_of']}"


@functools.cache
def _hash_pixels(source: pathlib.Path) -> dict[str, str]:
    """Returns key -> hash of the decoded image."""
    return {
        pair.key: hashlib.sha256(decode_rgb(pair.image).tobytes()).hexdigest()
        for pair in open_source(str(source))
    }


def _score_drawings(
    found: tuple[dict[str, Any], list[dict[str, Any]]], pixels: dict[str, str]
) -> dict[str, Any]:
    setting, rows = found

    def pixels_of(key: str) -> str:
        return pixels[key.removeprefix("copy-")]

    dropped = [row for row in rows if row["kind"] != "kept"]
    right = [row for row in dropped if pixels_of(row["key"]) == pixels_of(row["duplicate_of"])]
    copies = [row for row in rows if row["key"].startswith("copy-")]
    same = {
        row["key"]
        for row in copies
        if row["kept_key"] and pixels_of(row["kept_key"]) == pixels_of(row["key"])
    }
    return setting | {
        "recall": round(len(same) / len(copies), 4),
        "precision": round(len(right) / len(dropped), 4) if dropped else None,
        "pictures": len(rows),
        "copies": len(copies),
        "dropped": len(dropped),
    }


def _score_emoji(
    found: tuple[dict[str, Any], list[dict[str, Any]]], captions: dict[str, str]
) -> dict[str, Any]:
    setting, rows = found
    names = {key: _TONE.sub("", caption) for key, caption in captions.items()}
    sizes = collections.Counter(names.values())
    variants = sum(size - 1 for size in sizes.values())
    dropped = [row for row in rows if row["kind"] != "kept"]
    right = sum(names[row["key"]] == names[row["duplicate_of"]] for row in dropped)
    return setting | {
        "recall": round(right / variants, 4),
        "precision": round(right / len(dropped), 4) if dropped else None,
        "pictures": len(rows),
        "variants": variants,
        "dropped": len(dropped),
    }


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
