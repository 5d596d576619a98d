"""Folders of TensorFlow Datasets: damaged records behind right checksums."""

from __future__ import annotations

import pathlib

from absl import logging
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.shard_files import shard_name
from tests.fuzz.damage import NOT_UTF8, Draw, damaged, noise
from tests.fuzz.framing import example, frame
from tests.fuzz.judge import SUCCESS, judge_source, require

_NAME = shard_name("pairs", "train", 0, 1)
_COUNT = 4
_FIELDS = [
    {"key": b"key%d" % n, "image": b"image %d" % n, "caption": b"text %d" % n, "metadata": b"{}"}
    for n in range(_COUNT)
]
_VALUES = {f"{_NAME}-{n:08d}": (b"image %d" % n, f"text {n}") for n in range(_COUNT)}


def prepare(base: pathlib.Path) -> None:
    """Imports, which take seconds."""
    logging.set_verbosity(logging.ERROR)
    _write(base, list(map(example, _FIELDS)))
    require(_judge(base) == SUCCESS, "a good folder")


def _write(folder: pathlib.Path, examples: list[bytes]) -> None:
    data = b"".join(map(frame, examples))
    (folder / _NAME).write_bytes(data)
    lengths = {"shard_lengths": [len(examples)], "num_bytes": len(data)}
    names = {"dataset": "pairs", "split": "train", "image_formats": ["JPEG"]}
    write_dataset_info(folder, **names, **lengths)


def _judge(folder: pathlib.Path, *touched: str) -> str:
    value_of = lambda pair: (pair.image, pair.caption)  # noqa: E731
    return judge_source(f"tfds:{folder}:train", folder, value_of, _VALUES, *touched)


def check_bad_record(draw: Draw, folder: pathlib.Path) -> str:
    """A record that is broken, or lacks what the description promises, is skipped or an error."""
    examples = list(map(example, _FIELDS))
    bad = draw(integers(0, _COUNT - 1))
    fields = _FIELDS[bad]
    name = draw(one(list(fields)))
    others = [example(fields | {name: value}) for value in (3, [b"a"] * 2, 0.5, [], b"", *NOT_UTF8)]
    others += [b"", example({key: value for key, value in fields.items() if key != name})]
    examples[bad] = draw(one(others) | damaged(examples[bad]) | noise(50))
    _write(folder, examples)
    return _judge(folder, list(_VALUES)[bad])
