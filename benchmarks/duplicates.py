"""What the search for duplicates finds: photos with planted copies, emoji in several skin tones.

    python -m benchmarks.duplicates --data ../shared/data

Of every photo of `photos.tar` a copy is planted: resized to half, re-encoded (JPEG, quality 50),
cropped to 90% or 85% of each side somewhere, or mirrored; one set for each edit, among the 4,000
photos of `cifar10_train.tar`. Recall: planted copies that are dropped as copies of their photo.
Precision: share of these in all dropped photos and copies. The emoji of one name in several skin
tones or directions count as duplicates of one another, all others do not. Prints both, for cosines
alone and for thumbnails that verify what the cosines find, and writes
`benchmarks/results/duplicates.json`. Embeddings are the descriptor's; no model is needed.

    python -m benchmarks.duplicates --data ../shared/data --model runs/emoji

compares the emoji by the embeddings that `diht_jax.embed` makes of them by a model, and writes
`benchmarks/results/duplicates_model.json`.
"""

from __future__ import annotations

import collections
import io
import pathlib
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

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
from diht_jax.input.decode import decode_rgb
from diht_jax.readers.registry import open_source

EDITS = ("resized", "re-encoded", "cropped 90%", "cropped 85%", "flipped")
# Least cosine, least correlation of thumbnails (None: they are not compared), clusters of a row.
SETTINGS = (
    *((threshold, None, 1) for threshold in (0.85, 0.9, 0.95, 0.98)),
    (0.9, None, 2),
    (0.7, 0.95, 1),
    *((0.7, correlation, 2) for correlation in (0.9, 0.93, 0.95, 0.97)),
    (0.6, 0.95, 2),
)
# The same for the embeddings of a model.
MODEL_SETTINGS = (
    tuple((threshold, None, 2) for threshold in (0.8, 0.9, 0.95, 0.98)),
    tuple((threshold, 0.95, 2) for threshold in (0.5, 0.7, 0.9)),
)
_TONE = re.compile(r"( facing right)?( with [\w, -]+ skin tone)?$")


def define_flags() -> None:
    """The command line of `main`."""
    flags.DEFINE_string("data", None, "Folder with photos.tar, cifar10_train.tar and emoji_*.tar.")
    flags.DEFINE_integer("seed", 0, "Of the crops.")
    flags.DEFINE_string("model", None, "What diht_jax.load_model reads: emoji alone, by it.")


def main() -> None:
    """Measures, prints and writes."""
    command_line.require_flags("data")
    data = pathlib.Path(flags.FLAGS.data)
    photos, emoji = [], []
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        if flags.FLAGS.model is not None:
            emoji = list(_compare_by_model(flags.FLAGS.model, data, work))
            write_result("duplicates_model", {"model": flags.FLAGS.model, "emoji": emoji})
            return
        for edit in EDITS:
            path = work / f"{edit}.tar"
            plant(data / "photos.tar", path, edit, flags.FLAGS.seed)
            inputs = f"{data / 'photos.tar'},{path},{data / 'cifar10_train.tar'}"
            for found in _run(_config(inputs, work / edit)):
                photos.append({"edit": edit} | _score_photos(found))
                print(photos[-1], flush=True)
        for name in ("emoji_google", "emoji_twitter"):
            captions = _read_captions(data / f"{name}.tar")
            for found in _run(_config(str(data / f"{name}.tar"), work / name)):
                emoji.append({"set": name} | _score_emoji(found, captions))
                print(emoji[-1], flush=True)
    write_result("duplicates", {"photos": photos, "emoji": emoji})


def _compare_by_model(model: str, data: pathlib.Path, work: pathlib.Path) -> Iterator[dict]:
    """The scores of the emoji of both artists, by the embeddings of a model."""
    loaded = load_model(model)
    for name in ("emoji_google", "emoji_twitter"):
        source, embedded = data / f"{name}.tar", work / "embedded" / name
        captions = _read_captions(source)
        embed_source(loaded, str(source), embedded, EmbedOptions(modalities=["image"]))
        for number, settings in enumerate(MODEL_SETTINGS):
            config = _config(str(source), work / f"{name}_{number}")
            config.embeddings.update({"kind": "files", "files": str(embedded)})
            for found in _run(config, settings):
                scores = {"set": name} | _score_emoji(found, captions)
                print(scores, flush=True)
                yield scores


def _read_captions(source: pathlib.Path) -> dict[str, str]:
    return {pair.key: pair.caption for pair in open_source(str(source))}


def plant(source: pathlib.Path, target: pathlib.Path, edit: str, seed: int) -> None:
    """Writes a tar with an edited copy of every picture, its key "copy-KEY"."""
    generator = np.random.default_rng(seed)
    with tarfile.open(target, "w") as tar:
        for pair in open_source(str(source)):
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
    config.clusters.rows_per_cluster = 1000  # several clusters, as large sets have
    config.report_pairs = 0
    return config


def _run(
    config: ml_collections.ConfigDict,
    settings: Sequence[tuple[float, float | None, int]] = SETTINGS,
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each of some settings, and the rows of the table that it makes."""
    for threshold, correlation, probes in settings:
        config.threshold, config.verify.correlation = threshold, correlation
        config.clusters.probes = probes
        duplicates_config.check_config(config)
        if job.run(config):
            raise ValueError("the search failed")
        files = sorted(pathlib.Path(config.output, "duplicates").glob("*.parquet"))
        setting = {"threshold": threshold, "correlation": correlation, "probes": probes}
        rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
        yield setting, rows


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
