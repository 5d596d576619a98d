"""Folders of TensorFlow Datasets: damaged records behind right checksums, damaged descriptions."""

from __future__ import annotations

import pathlib
from typing import Any

from absl import logging
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.readers import registry
from diht_jax.records.dataset_info import FILES, shard_name, write_dataset_info
from tests.fuzz.damage import NOT_UTF8, Draw, damage_folder, damaged, noise
from tests.fuzz.framing import example, frame
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, judge_read, require

_NAME = shard_name("pairs", "train", 0, 1)
_COUNT = 4


def prepare(base: pathlib.Path) -> None:
    """Imports, which take seconds."""
    logging.set_verbosity(logging.ERROR)
    _write(base, [example(_fields(number)) for number in range(_COUNT)])
    outcome = judge_read(lambda: _read(base), base, {_key(n): _value(n) for n in range(_COUNT)})
    require(outcome == SUCCESS, "a good folder")


def _fields(number: int) -> dict:
    texts = {"key": b"key%d", "image": b"image %d", "caption": b"text %d"}
    return {name: text % number for name, text in texts.items()} | {"metadata": b"{}"}


def _key(number: int) -> str:
    return f"{_NAME}-{number:08d}"


def _value(number: int) -> Any:
    return b"image %d" % number, f"text {number}"


def _write(folder: pathlib.Path, examples: list[bytes]) -> None:
    data = b"".join(map(frame, examples))
    (folder / _NAME).write_bytes(data)
    lengths = {"shard_lengths": [len(examples)], "num_bytes": len(data)}
    names = {"dataset": "pairs", "split": "train", "image_formats": ["JPEG"]}
    write_dataset_info(folder, **names, **lengths)


def _read(folder: pathlib.Path) -> Any:
    source = registry.open_source(f"tfds:{folder}:train")
    return [(p.key, (p.image, p.caption)) for p in source], source.skipped


def check_bad_record(draw: Draw, folder: pathlib.Path) -> str:
    """A record that is broken, or lacks what the description promises, is skipped or an error."""
    examples = [example(_fields(number)) for number in range(_COUNT)]
    bad = draw(integers(0, _COUNT - 1))
    fields = _fields(bad)
    name = draw(one(list(fields)))
    others = [example(fields | {name: value}) for value in (3, [b"a"] * 2, 0.5, [], b"", *NOT_UTF8)]
    others += [b"", example({key: value for key, value in fields.items() if key != name})]
    examples[bad] = draw(one(others) | damaged(examples[bad]) | noise(50))
    _write(folder, examples)
    intact = {_key(number): _value(number) for number in range(_COUNT) if number != bad}
    return judge_read(lambda: _read(folder), folder, intact, [_key(bad)])


def check_description(draw: Draw, folder: pathlib.Path) -> str:
    """A damaged description: an error that names the folder, or as many records as it counts."""
    examples = [example(_fields(number)) for number in range(_COUNT)]
    _write(folder, examples)
    shard = (folder / _NAME).read_bytes()
    damage_folder(draw, folder)
    (folder / _NAME).write_bytes(shard)
    result = attempt(lambda: _read(folder), folder)
    if isinstance(result, Refused):
        return ERROR
    counts = f'"{len(result[0]) + sum(result[1].values())}"'
    require(counts in (folder / FILES[0]).read_text(), f"{counts} records")
    return SUCCESS
