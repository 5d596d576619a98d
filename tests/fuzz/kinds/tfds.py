"""Folders of TensorFlow Datasets: damaged records behind right checksums, damaged descriptions."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import logging
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.data.readers import registry
from diht_jax.data.records.dataset_info import FILES, shard_name, write_dataset_info
from tests.fuzz.damage import NO_OBJECT, NOT_UTF8, Draw, cut, damaged, flipped, noise
from tests.fuzz.framing import example, frame
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, judge_read, require

_NAME = shard_name("pairs", "train", 0, 1)


def prepare(base: pathlib.Path) -> None:
    """Imports, which take seconds."""
    logging.set_verbosity(logging.ERROR)
    require(_judge(_write(base, _examples(3))) == SUCCESS, "a good folder")


def _fields(number: int) -> dict:
    texts = {"key": b"key%d", "image": b"image %d", "caption": b"text %d"}
    return {name: text % number for name, text in texts.items()} | {"metadata": b"{}"}


def _examples(count: int) -> list[bytes]:
    return [example(_fields(number)) for number in range(count)]


def _write(folder: pathlib.Path, examples: list[bytes]) -> pathlib.Path:
    data = b"".join(map(frame, examples))
    (folder / _NAME).write_bytes(data)
    lengths = {"shard_lengths": [len(examples)], "num_bytes": len(data)}
    names = {"dataset": "pairs", "split": "train", "image_formats": ["JPEG"]}
    write_dataset_info(folder, **names, **lengths)
    return folder


def _read(folder: pathlib.Path) -> Any:
    source = registry.open_source(f"tfds:{folder}:train")
    return [(p.key, (p.image, p.caption)) for p in source], source.skipped


def _judge(folder: pathlib.Path, count: int = 3, bad: int | None = None) -> str:
    """The good pairs, or an error that names the folder."""
    keys = [f"{_NAME}-{number:08d}" for number in range(count)]
    values = [(b"image %d" % number, f"text {number}") for number in range(count)]
    intact = dict(zip(keys, values, strict=True))
    touched = [] if bad is None else [keys[bad]]
    intact = {key: value for key, value in intact.items() if key not in touched}
    return judge_read(lambda: _read(folder), folder, intact, touched)


def check_bad_record(draw: Draw, folder: pathlib.Path) -> str:
    """A record that is none, or lacks what the description promises."""
    examples = _examples(4)
    bad = draw(integers(0, 3))
    fields = _fields(bad)
    name = draw(one(list(fields)))
    changes = [3, [b"a", b"b"], 0.5, [], b"", *NOT_UTF8]
    others = [example(fields | {name: value}) for value in changes]
    others += [b"", example({key: value for key, value in fields.items() if key != name})]
    examples[bad] = draw(one(others) | damaged(examples[bad]) | noise(50))
    return _judge(_write(folder, examples), 4, bad)


def check_bad_description(draw: Draw, folder: pathlib.Path) -> str:
    """A description that is no JSON, or lost a part: an error that names it, or none."""
    _write(folder, _examples(3))
    path = folder / draw(one(FILES))
    contents = path.read_bytes()
    path.write_bytes(draw(one([*NO_OBJECT, b"{}"]) | cut(contents) | flipped(contents)))
    result = attempt(lambda: _read(folder), folder)
    return ERROR if isinstance(result, Refused) else SUCCESS


def check_other_lengths(draw: Draw, folder: pathlib.Path) -> str:
    """A description that counts other records than there are."""
    _write(folder, _examples(3))
    path = folder / FILES[0]
    info = json.loads(path.read_text())
    count = draw(one([0, 1, 2, 4, 10**9, -1]))
    info["splits"][0]["shardLengths"] = [str(count)]
    path.write_text(json.dumps(info))
    result = attempt(lambda: _read(folder), folder)
    if isinstance(result, Refused):
        return ERROR
    require(len(result[0]) == count, f"{len(result[0])} of {count} records")
    return SUCCESS
