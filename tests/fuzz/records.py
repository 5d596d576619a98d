"""TFRecord shards and the records in them: damaged frames, and contents that are no record.

Read in order by `diht_jax.data.readers`, at random by `TFRecordSource`, decoded by `schema`.
"""

from __future__ import annotations

import io
import pathlib
import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

from diht_jax.data.readers import registry
from diht_jax.data.records import schema
from diht_jax.data.records.tfrecord import TFRecordSource
from tests.fuzz.cases import (
    DEEP_JSON,
    ERROR,
    NOT_UTF8,
    SUCCESS,
    Draw,
    Refused,
    attempt,
    require,
)
from tests.fuzz.framing import example, feature, frame, index

_IDS = ("object_ids", "attribute_ids")
_PROBS = ("object_probs", "attribute_probs")


def fields(draw: Draw, number: int) -> dict:
    """The fields of one good record."""
    image = io.BytesIO()
    color = tuple(draw.randbytes(3))
    Image.new("RGB", (draw.randint(1, 9), draw.randint(1, 9)), color).save(image, "PNG")
    found = {
        "key": f"key{number}".encode(),
        "image": image.getvalue(),
        "caption": draw.text().encode(),
        "metadata": b'{"label": %d}' % draw.randint(0, 9),
    }
    if draw.random() < 0.5:
        found["concepts"] = concepts(draw)
    return found


def concepts(draw: Draw) -> bytes:
    """Packed objects and attributes."""
    packed = b""
    for _ in range(2):
        k = draw.randint(0, 5)
        ids = b"".join(draw.randrange(2**24).to_bytes(3, "little") for _ in range(k))
        packed += bytes([k]) + ids + np.array([1 / (k + 1)] * k, "<f2").tobytes()
    return packed


def good_examples(draw: Draw) -> list[bytes]:
    """Three to seven serialised records."""
    return [example(fields(draw, number)) for number in range(draw.randint(3, 7))]


def write_shard(folder: pathlib.Path, frames: Sequence[bytes], with_index: bool) -> pathlib.Path:
    """A shard, with its own index or without one."""
    path = folder / "pairs-train-00000.tfrecord"
    path.write_bytes(b"".join(frames))
    if with_index:
        (folder / f"{path.name}.idx").write_bytes(index(frames))
    return path


def _check_random_access(path: pathlib.Path, expected: dict[int, bytes], count: int) -> int:
    """Every record is the expected one or an error with its place; returns how many are errors."""
    source = attempt(lambda: TFRecordSource(str(path)), path)
    if isinstance(source, Refused):
        return count
    require(len(source) == count, f"{len(source)} of {count} records")
    refused = 0
    for number in range(count):
        data = attempt(lambda number=number: source[number], path)
        if isinstance(data, Refused):
            require(f"record {number}" in data.message, f"names no record: {data.message}")
            require(number not in expected, f"the good record {number} is lost: {data.message}")
            refused += 1
        elif number in expected:
            require(data == expected[number], f"record {number} has other bytes")
    return refused


def _flipped_frame(draw: Draw, folder: pathlib.Path) -> str:
    """With the shard's index, a damaged record is the only one that cannot be read."""
    examples = good_examples(draw)
    frames = [frame(data) for data in examples]
    bad = draw.randrange(len(frames))
    own_index = index(frames)
    size = len(frames[bad])
    at = draw.choice([range(8), range(8, 12), range(12, size - 4), range(size - 4, size)])
    damaged = bytearray(frames[bad])
    damaged[draw.choice(at)] ^= 1 << draw.randrange(8)
    frames[bad] = bytes(damaged)
    path = write_shard(folder, frames, False)
    pathlib.Path(f"{path}.idx").write_bytes(own_index)
    expected = {n: data for n, data in enumerate(examples) if n != bad}
    refused = _check_random_access(path, expected, len(examples))
    require(refused == 1, f"{refused} of 1 damaged records were refused")
    return _read_in_order(path, examples, bad)


def _read_in_order(path: pathlib.Path, examples: Sequence[bytes], bad: int) -> str:
    """The records before a damaged one come, then an error with its number."""
    found: list[str] = []

    def read():
        for shard in registry.list_shards(str(path)):
            for pair in registry.read_pairs(shard):
                found.append(pair.key)

    result = attempt(read, path)
    require(isinstance(result, Refused), "a damaged record was not noticed")
    require(f"record {bad}" in result.message, f"names another record: {result.message}")
    keys = [schema.decode_record(data).key for data in examples[:bad]]
    require(found == keys, f"{found} came before the damaged record")
    return ERROR


def _flipped_without_index(draw: Draw, folder: pathlib.Path) -> str:
    examples = good_examples(draw)
    frames = [frame(data) for data in examples]
    bad = draw.randrange(len(frames))
    frames[bad] = draw.flip(frames[bad], 2)
    path = write_shard(folder, frames, False)
    source = attempt(lambda: TFRecordSource(str(path)), path)
    if not isinstance(source, Refused):
        expected = {n: data for n, data in enumerate(examples) if n != bad}
        require(_check_random_access(path, expected, len(examples)) == 1, "damage not noticed")
    else:
        require(f"record {bad}" in source.message, source.message)
    return ERROR


def _cut_off(draw: Draw, folder: pathlib.Path) -> str:
    examples = good_examples(draw)
    frames = [frame(data) for data in examples]
    path = write_shard(folder, frames, draw.random() < 0.5)
    whole = path.read_bytes()
    starts = [sum(map(len, frames[:n])) for n in range(len(frames))]
    size = draw.randrange(1, len(whole))
    path.write_bytes(whole[:size])
    opened = attempt(lambda: TFRecordSource(str(path)), path)
    if size in starts and not pathlib.Path(f"{path}.idx").exists():
        return SUCCESS  # a shorter shard, as far as anybody can tell
    require(isinstance(opened, Refused), f"cut off at {size} of {len(whole)} bytes, unnoticed")
    return ERROR


def _giant_length(draw: Draw, folder: pathlib.Path) -> str:
    """A length beyond the end, with a right checksum."""
    examples = good_examples(draw)
    frames = [frame(data) for data in examples]
    bad = draw.randrange(len(frames))
    length = draw.choice([2**63, 2**64 - 1, 2**40, 2**31, len(frames[bad]) + 10**6])
    frames[bad] = frame(examples[bad], length)
    path = write_shard(folder, frames, draw.random() < 0.5)
    count = len(frames)
    expected = {n: data for n, data in enumerate(examples) if n != bad}
    require(_check_random_access(path, expected, count) in (1, count), "a length of nothing")
    return _read_in_order(path, examples, bad)


def _not_a_shard(draw: Draw, folder: pathlib.Path) -> str:
    path = folder / "pairs-train-00000.tfrecord"
    data = [b"", b"x", b"\x1f\x8b" + draw.randbytes(99), draw.randbytes(500), bytes(500)]
    path.write_bytes(draw.choice(data))
    source = attempt(lambda: TFRecordSource(str(path)), path)
    if not isinstance(source, Refused):
        require(path.stat().st_size == 0 and len(source) == 0, "this is no shard")
        return SUCCESS
    return ERROR


def _decode(data: bytes, key: str) -> schema.Record | Refused:
    return attempt(lambda: schema.decode_record(data), f"'{key}'", "tf.train.Example", "'?'")


def _check_bad_payload(draw: Draw, folder: pathlib.Path, data: bytes, key: str) -> str:
    """A record of whole frames and wrong contents: an error, or a record that can be used."""
    decoded = _decode(data, key)
    examples = good_examples(draw)
    bad = draw.randrange(len(examples))
    examples[bad] = data
    path = write_shard(folder, [frame(payload) for payload in examples], True)
    if isinstance(decoded, Refused):
        return _read_in_order(path, examples, bad)
    _require_usable(decoded)
    pairs = [p for s in registry.list_shards(str(path)) for p in registry.read_pairs(s)]
    require(len(pairs) == len(examples), "a record is lost")
    return SUCCESS


def _require_usable(record: schema.Record) -> None:
    """What every record that was accepted must be, whoever uses it."""
    require(isinstance(record.key, str) and isinstance(record.caption, str), "no texts")
    require(isinstance(record.metadata, dict), "metadata is no object")
    for ids_name, probs_name in zip(_IDS, _PROBS, strict=True):
        ids, probs = getattr(record, ids_name), getattr(record, probs_name)
        require((ids is None) == (probs is None), f"{ids_name} without {probs_name}")
        if ids is not None:
            require(ids.shape == probs.shape, f"{ids.shape} ids, {probs.shape} probabilities")
            require(bool(np.all(ids >= 0) and ids.dtype == np.int32), f"ids {ids}")
            fine = np.isfinite(probs) & (probs >= 0) & (probs <= 1.01)
            require(bool(np.all(fine)), f"probabilities {probs}")
    ids = [
        i for name in _IDS for i in (() if getattr(record, name) is None else getattr(record, name))
    ]
    if max(ids, default=0) < 2**24:
        require(bool(schema.encode_record(record)), "cannot be written again")


def _damaged_payload(draw: Draw, folder: pathlib.Path) -> str:
    data = draw.damage(example(fields(draw, 77)))
    decoded = attempt(lambda: schema.decode_record(data), "record '", "tf.train.Example")
    if isinstance(decoded, Refused):
        return ERROR
    if decoded.key and decoded.image:
        _require_usable(decoded)
    return SUCCESS


def _wrong_fields(draw: Draw, folder: pathlib.Path) -> str:
    """Fields that are missing, of another type, twice, empty, or under each other's names."""
    values = fields(draw, 77)
    name = draw.choice(["key", "image", "caption", "metadata", "concepts"])
    form = draw.randrange(5)
    if form == 0:
        values.pop(name, None)
    elif form == 1:
        values[name] = draw.choice([3, [1, 2], 0.5, [0.5, 1.5], -1])
    elif form == 2:
        values[name] = draw.choice([[b"a", b"b"], [], [b""] * 3])
    elif form == 3:
        other = draw.choice(["key", "image", "caption", "metadata"])
        values[name], values[other] = values[other], values.get(name, b"")
    else:
        values[name] = b""
    data = example(values)
    decoded = attempt(lambda: schema.decode_record(data), "record '")
    if form <= 2 and name in ("key", "image", "caption") and values.get(name) != []:
        require(isinstance(decoded, Refused), f"a record without a proper {name}")
    if isinstance(decoded, Refused):
        require("'key77'" in decoded.message or name == "key" or form == 3, decoded.message)
        return ERROR
    if decoded.key and decoded.image:
        _require_usable(decoded)
    return SUCCESS


def _bad_texts(draw: Draw, folder: pathlib.Path) -> str:
    """Texts that are no UTF-8 become readable texts; the rest of the record stays."""
    values = fields(draw, 77)
    name = draw.choice(["caption", "caption", "metadata", "key"])
    values[name] = draw.choice(NOT_UTF8) + values[name] + draw.choice([b"", *NOT_UTF8])
    data = example(values)
    decoded = attempt(lambda: schema.decode_record(data), "key77")
    if name == "metadata":
        require(isinstance(decoded, Refused), "metadata that is no JSON")
        return ERROR
    require(not isinstance(decoded, Refused), "a text that is no UTF-8 costs the record")
    require(decoded.image == values["image"], "the image has changed")
    _require_usable(decoded)
    return SUCCESS


def _bad_metadata(draw: Draw, folder: pathlib.Path) -> str:
    values = fields(draw, 77)
    bad = [b"{", b"[]", b"3", b"null", b'"x"', DEEP_JSON, b'{"a":' * 100_000, b"\0", b"{} {}"]
    usable = [b"{}", b"", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"": null}']
    chosen = draw.choice([*bad, *usable, b'{"a": ' + b"1" * 5000 + b"}"])
    values["metadata"] = chosen
    decoded = _decode(example(values), "key77")
    require(isinstance(decoded, Refused) or chosen not in bad, "metadata that is no JSON object")
    require(not isinstance(decoded, Refused) or chosen not in usable, f"refused {chosen!r:.60}")
    return _check_bad_payload(draw, folder, example(values), "key77")


def _bad_concepts(draw: Draw, folder: pathlib.Path) -> str:
    """Labels, packed or in lists, that do not belong together or are no probabilities."""
    values = fields(draw, 77)
    values.pop("concepts", None)
    if draw.random() < 0.5:
        packed = concepts(draw)
        half = struct.pack("<B3se", 1, b"abc", draw.choice([np.nan, np.inf, -1.0, 7.0]))
        values["concepts"] = draw.choice(
            [draw.flip(packed), draw.cut(packed), packed + b"x", b"", b"\xff", half + half]
        )
    else:
        ids = [
            draw.choice(
                [[1, 2], [], [-1], [2**24], [2**40], [2**63], [1.5], [b"a"], list(range(300))]
            )
        ]
        ids += [[3, 4]]
        probs = [draw.choice([[0.5, 0.25], [], [0.5], [float("nan")], [-1.0], [9.0], [1, 2]])]
        probs += [[0.5, 0.25]]
        for name, value in zip(_IDS, ids, strict=True):
            values[name] = value
        for name, value in zip(_PROBS, probs, strict=True):
            values[name] = value
        if draw.random() < 0.3:
            del values[draw.choice([*_IDS, *_PROBS])]
    return _check_bad_payload(draw, folder, example(values), "key77")


def _other_examples(draw: Draw, folder: pathlib.Path) -> str:
    """Examples of other programs, with other fields; unknown ones do no harm."""
    values = fields(draw, 77)
    extra = {"image/encoded": b"x", "width": 3, "scores": [0.5], b"\xff\xfe": b"x", "": [1]}
    name = draw.choice(list(extra))
    values = {name: extra[name]} | (values if draw.random() < 0.5 else {})
    data = example(values)
    if draw.random() < 0.2:
        data = feature([b"a"]) + data
    decoded = attempt(lambda: schema.decode_record(data), "record '", "tf.train.Example")
    if isinstance(decoded, Refused):
        return ERROR
    require(decoded.key == "key77", "another key")
    _require_usable(decoded)
    return SUCCESS


MUTATIONS = {
    "bit flipped in a frame": _flipped_frame,
    "bits flipped, no index": _flipped_without_index,
    "cut off": _cut_off,
    "giant length": _giant_length,
    "no shard": _not_a_shard,
    "damaged payload": _damaged_payload,
    "wrong fields": _wrong_fields,
    "texts that are no UTF-8": _bad_texts,
    "bad metadata": _bad_metadata,
    "bad concepts": _bad_concepts,
    "other examples": _other_examples,
}
