"""Folders of TensorFlow Datasets: damaged records behind right checksums, damaged descriptions."""

from __future__ import annotations

import json
import pathlib

from absl import logging

from diht_jax.data.readers import registry
from diht_jax.data.records.dataset_info import FILES, shard_name, write_dataset_info
from tests.fuzz.cases import (
    DEEP_JSON,
    ERROR,
    NOT_UTF8,
    SUCCESS,
    Draw,
    Refused,
    attempt,
    judge_entries,
    require,
)
from tests.fuzz.framing import example, frame

_NAME = shard_name("pairs", "train", 0, 1)


def prepare(base: pathlib.Path) -> None:
    """Imports, which take seconds."""
    logging.set_verbosity(logging.ERROR)
    (base / "first").mkdir()
    examples = [example(_fields(n)) for n in range(3)]
    require(judge(_write(base / "first", examples), list(range(3))) == SUCCESS, "a good folder")


def _fields(number: int) -> dict:
    texts = {"key": b"key%d", "image": b"image %d", "caption": b"text %d"}
    return {name: text % number for name, text in texts.items()} | {"metadata": b"{}"}


def _write(folder: pathlib.Path, examples: list[bytes]) -> pathlib.Path:
    data = b"".join(map(frame, examples))
    (folder / _NAME).write_bytes(data)
    write_dataset_info(
        folder,
        dataset="pairs",
        split="train",
        shard_lengths=[len(examples)],
        num_bytes=len(data),
        image_formats=["JPEG"],
    )
    return folder


def judge(folder: pathlib.Path, good: list[int], *touched: str) -> str:
    """The good pairs, or an error that names a file of the folder."""

    def read():
        source = registry.open_source(f"tfds:{folder}:train")
        return [(p.key, (p.image, p.caption)) for p in source], source.skipped

    result = attempt(read, folder)
    if isinstance(result, Refused):
        return ERROR
    intact = {
        f"{_NAME}-{n:08d}": (_fields(n)["image"], _fields(n)["caption"].decode()) for n in good
    }
    return judge_entries(*result, intact, touched)


def _bad_record(draw: Draw, folder: pathlib.Path) -> str:
    """A record that is none, or lacks what the description promises."""
    examples = [example(_fields(n)) for n in range(4)]
    bad = draw.randrange(4)
    fields = _fields(bad)
    name = draw.choice(["key", "image", "caption", "metadata"])
    fields[name] = draw.choice([3, [b"a", b"b"], 0.5, [], b"", *NOT_UTF8])
    without = {key: value for key, value in _fields(bad).items() if key != name}
    examples[bad] = draw.choice(
        [example(fields), example(without), draw.damage(examples[bad]), b"", draw.randbytes(50)]
    )
    good = [n for n in range(4) if n != bad]
    return judge(_write(folder, examples), good, f"{_NAME}-{bad:08d}")


def _bad_description(draw: Draw, folder: pathlib.Path) -> str:
    _write(folder, [example(_fields(n)) for n in range(3)])
    path = folder / draw.choice(FILES)
    contents = path.read_bytes()
    odd = [b"{}", b"[]", b"3", b"", DEEP_JSON, *NOT_UTF8, draw.cut(contents), draw.flip(contents)]
    path.write_bytes(draw.choice(odd))
    return _judge_loosely(folder)


def _judge_loosely(folder: pathlib.Path) -> str:
    result = attempt(
        lambda: list(registry.open_source(f"tfds:{folder}:train")), folder, f"tfds:{folder}"
    )
    return ERROR if isinstance(result, Refused) else SUCCESS


def _other_lengths(draw: Draw, folder: pathlib.Path) -> str:
    """A description that counts other records than there are."""
    _write(folder, [example(_fields(n)) for n in range(3)])
    path = folder / FILES[0]
    info = json.loads(path.read_text())
    count = draw.choice([0, 1, 2, 4, 10**9, -1])
    info["splits"][0]["shardLengths"] = [str(count)]
    path.write_text(json.dumps(info))
    result = attempt(lambda: len(list(registry.open_source(f"tfds:{folder}:train"))), folder)
    require(isinstance(result, Refused) or result == count, f"{result} of {count} records")
    return ERROR if isinstance(result, Refused) else SUCCESS


MUTATIONS = {
    "bad record": _bad_record,
    "bad description": _bad_description,
    "other lengths": _other_lengths,
}
