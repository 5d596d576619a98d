"""TFRecord shards, their indices and records, and folders of TensorFlow Datasets.

`diht_jax.readers` reads in order, `TFRecordSource` reads at random, and `schema` decodes.
"""

from __future__ import annotations

import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, integers
from hypothesis.strategies import sampled_from as one

from diht_jax.data.index import update_index
from diht_jax.readers import registry
from diht_jax.records import schema
from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.shard_files import shard_name
from diht_jax.records.train_data import fingerprint_records
from tests.fuzz.damage import (
    NO_OBJECT,
    NOT_UTF8,
    Draw,
    cut,
    damaged,
    flipped,
    noise,
    seeds,
    words,
)
from tests.fuzz.framing import dataset_index, example, frame, index, with_preamble
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, judge_source, require
from tests.make import png

_NAME = "pairs-train-00000.tfrecord"
_IDS = ("object_ids", "attribute_ids")
_PROBS = ("object_probs", "attribute_probs")
_NO_METADATA = [text for text in NO_OBJECT if text] + [b"\0", b"{} {}", b'{"a":' * 100_000]
_METADATA = [b"{}", b"", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"": null}']
_INDEX_HEADER_BYTES = 24


def _fields(draw: Draw, number: int) -> dict:
    """Returns the fields of one good record."""
    found = {
        "key": f"key{number}".encode(),
        "image": png(draw(seeds), draw(st.tuples(integers(1, 9), integers(1, 9)))),
        "caption": draw(words()).encode(),
        "metadata": b'{"label": %d}' % draw(integers(0, 9)),
    }
    if draw(st.booleans()):
        found["concepts"] = _concepts(draw)
    return found


def _concepts(draw: Draw) -> bytes:
    """Returns packed objects and attributes."""
    packed = b""
    for _ in range(2):
        k = draw(integers(0, 5))
        ids = draw(noise(3 * k, 3 * k))
        packed += bytes([k]) + ids + np.array([1 / (k + 1)] * k, "<f2").tobytes()
    return packed


class _Shard:
    """A shard of good records, with or without an index; a case damages one record."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.records = [example(_fields(draw, n)) for n in range(draw(integers(3, 7)))]
        self.frames = [frame(data) for data in self.records]
        self.path = folder / _NAME
        self.bad = draw(integers(0, len(self.records) - 1))

    def write(self, frames_of_index: Sequence[bytes] | None) -> None:
        """Writes the file and, unless None, the index of the given frames."""
        self.path.write_bytes(b"".join(self.frames))
        if frames_of_index is not None:
            pathlib.Path(f"{self.path}.idx").write_bytes(index(frames_of_index))

    def read_in_order(self) -> str:
        """Requires the records before the damaged one, and then an error with its index."""
        found: list[str] = []

        def read() -> None:
            for shard in registry.list_shards(str(self.path)):
                for pair in registry.read_pairs(shard):
                    found.append(pair.key)

        result = attempt(read, self.path)
        require(isinstance(result, Refused), "a damaged record was not noticed")
        require(f"record {self.bad}" in result.message, f"names another: {result.message}")
        keys = [f"key{number}" for number in range(self.bad)]
        require(found == keys, f"{found} came before the damaged record")
        return ERROR


def _refused(target: pathlib.Path, records: Sequence[bytes], *names: Any) -> set[int]:
    """Requires that each read record is correct; returns the numbers of those that are refused.

    Every error has one of the names, by default that of the record. A refused source means all.
    """
    source = attempt(lambda: TFRecordSource(str(target)), *(names or [target]))
    if isinstance(source, Refused):
        return set(range(len(records)))
    refused = set()
    for number in range(len(source)):
        data = attempt(lambda number=number: source[number], *(names or [f"record {number}"]))
        if isinstance(data, Refused):
            refused.add(number)
        else:
            known = number < len(records) and data == records[number]
            require(known, f"record {number} is another one")
    require(bool(refused) or len(source) == len(records), "records are lost or made up")
    return refused


def check_damaged_frame(draw: Draw, folder: pathlib.Path) -> str:
    """With the shard's index, only the damaged record cannot be read."""
    shard = _Shard(draw, folder)
    own, has_index, is_flip = list(shard.frames), draw(st.booleans()), draw(integers(0, 2)) > 0
    if is_flip:
        head, body = own[shard.bad][:12], own[shard.bad][12:]
        in_head = flipped(head, 1).map(lambda head: head + body)
        shard.frames[shard.bad] = draw(in_head | flipped(head + body, 2))
    else:  # a length beyond the end, with a valid checksum
        length = draw(one([2**63, 2**64 - 1, 2**40, 2**31, 10**7]))
        shard.frames[shard.bad] = frame(shard.records[shard.bad], length)
    shard.write(own if has_index else None)
    allowed = [{shard.bad}] if has_index and is_flip else [{shard.bad}, set(range(len(own)))]
    refused = _refused(shard.path, shard.records)
    require(refused in allowed, f"damage was not noticed, or spread: {refused}")
    return shard.read_in_order()


_payloads = st.lists(one([1, 20, 20, 35]).flatmap(lambda n: noise(n, n)), min_size=2, max_size=8)


def check_index(draw: Draw, folder: pathlib.Path) -> str:
    """An index that is damaged or another shard's is detected before it returns wrong bytes."""
    # Few lengths, so that two shards often share some offsets.
    records = draw(_payloads)
    frames = [frame(data) for data in records]
    path = folder / _NAME
    path.write_bytes(b"".join(frames))
    own = index(frames)
    counts = [0, 1, len(frames) - 1, len(frames) + 1, 2**32, 2**61, 2**64 - 1]
    odd = [2**64 - 1, 2**63, 2**40, len(own) + 10**6, 0, 1, *range(2, 60)]
    at_offset = integers(0, len(frames) - 1).map(lambda n: _INDEX_HEADER_BYTES + 8 * n)
    changed = draw(
        st.one_of(
            _payloads.map(lambda others: index(list(map(frame, others)))),
            st.permutations(frames).map(index),
            flipped(own, 2),
            damaged(own),
            st.builds(_patched, st.just(own), at_offset, one(odd)),
            one(counts).map(lambda n: _patched(own, 16, n)[: _INDEX_HEADER_BYTES + 8 * n]),
            st.just(path.read_bytes()),
        )
    )
    index_path = pathlib.Path(f"{path}.idx")
    index_path.write_bytes(changed)
    refused = _refused(path, records, index_path)
    require(bool(refused) or changed == own, "an index of another shard was believed")
    index_path.unlink()  # the fix that the message suggests
    require(not _refused(path, records), "the built index is wrong")
    return ERROR if refused else SUCCESS


def _patched(data: bytes, at: int, value: int) -> bytes:
    """Replaces eight bytes at an offset by a number."""
    return data[:at] + struct.pack("<Q", value) + data[at + 8 :]


def check_dataset_index(draw: Draw, folder: pathlib.Path) -> str:
    """With a damaged `dataset.index`, no read returns another record's bytes."""
    shards = {
        f"pairs-train-{n:05d}.tfrecord": draw(_payloads) * draw(one([0, 1, 9])) for n in (0, 1)
    }
    shards["pairs-train-00002.tfrecord"] = [b"last"]
    frames = {name: [frame(data) for data in records] for name, records in shards.items()}
    for name in shards:
        (folder / name).write_bytes(b"".join(frames[name]))
    rows = fingerprint_records(TFRecordSource(str(folder))).shards
    head, offsets = dataset_index(frames, [int(digest, 16) for *_, digest in rows])
    own = with_preamble(head) + offsets
    odd = [0, 1, 16, 2**32, 2**40, 2**62, 2**63, 2**64 - 1, *map(len, frames.values())]

    def repacked(data: bytes) -> SearchStrategy[bytes]:
        at = integers(0, len(data) // 8 - 1).map(lambda n: 8 * n)
        return st.builds(_patched, st.just(data), at, one(odd) | integers(0, 4000))

    changed = draw(
        st.one_of(
            flipped(own, 2),
            damaged(own),
            repacked(offsets).map(lambda d: with_preamble(head) + d),
            # With a valid checksum, so that the numbers themselves are checked.
            (repacked(head) | flipped(head, 2)).map(lambda d: with_preamble(d) + offsets),
        )
    )
    path = folder / "dataset.index"
    path.write_bytes(changed)
    records = [data for own_records in shards.values() for data in own_records]
    refused = _refused(folder, records, path, *shards)
    update_index(folder, overwrite=True)  # the fix that the message suggests
    require(not _refused(folder, records), "the index made again is wrong")
    return ERROR if refused else SUCCESS


def _decode(data: bytes) -> schema.Record | Refused:
    decoded = attempt(lambda: schema.decode_record(data), "record '", "tf.train.Example")
    if not isinstance(decoded, Refused) and decoded.key and decoded.image:
        _require_usable(decoded)
    return decoded


def _require_usable(record: schema.Record) -> None:
    """Requires what every user of an accepted record relies on."""
    require(isinstance(record.key, str) and isinstance(record.caption, str), "no texts")
    require(isinstance(record.metadata, dict), "metadata is no object")
    largest = 0
    for ids_name, probs_name in zip(_IDS, _PROBS, strict=True):
        ids, probs = getattr(record, ids_name), getattr(record, probs_name)
        require((ids is None) == (probs is None), f"{ids_name} without {probs_name}")
        if ids is not None:
            require(ids.shape == probs.shape, f"{ids.shape} ids, {probs.shape} probabilities")
            require(bool(np.all(ids >= 0) and ids.dtype == np.int32), f"ids {ids}")
            fine = np.isfinite(probs) & (probs >= 0) & (probs <= 1.01)
            require(bool(np.all(fine)), f"probabilities {probs}")
            largest = max(largest, *ids, 0)
    if largest < 2**24:
        require(bool(schema.encode_record(record)), "cannot be written again")


def check_payload(draw: Draw, folder: pathlib.Path) -> str:
    """Wrong contents in an intact frame give an error or a usable record, never another record's.

    Fields may be missing, repeated, of another type, not UTF-8, no JSON object, no probabilities.
    """
    values = _fields(draw, 77)
    packed = values.get("concepts", b"\1abc\0\x38\0")
    others = [3, [1, 2], 0.5, [0.5, 1.5], -1, [b"a", b"b"], [b""] * 3, [], b"", *NOT_UTF8]
    concepts = [struct.pack("<B3se", 1, b"abc", p) * 2 for p in (np.nan, np.inf, -1.0, 7.0)]
    ids = [[1, 2], [], [-1], [2**24], [2**40], [2**63], [1.5], [b"a"], list(range(300))]
    probs = [[0.5, 0.25], [], [0.5], [float("nan")], [-1.0], [9.0], [1, 2]]
    changes = {
        "key": one(others),
        "image": one(others),
        "caption": one(others),
        "metadata": one([*_NO_METADATA, *_METADATA, b'{"a": ' + b"1" * 5000 + b"}", 3, [1.5]]),
        "concepts": one([*concepts, packed + b"x"]) | flipped(packed) | cut(packed),
        _IDS[0]: one(ids),
        "": st.just(b"a field of another program"),
    }
    name = draw(one(list(changes)))
    value = values[name] = draw(changes[name])
    if name == _IDS[0]:
        values |= {_PROBS[0]: draw(one(probs)), _IDS[1]: [3, 4], _PROBS[1]: [0.5, 0.25]}
        values.pop("concepts", None)
    if draw(integers(0, 9)) == 9:
        del values[draw(one(list(values)))]
    data = draw(st.just(example(values)) | st.just(example(values)) | damaged(example(values)))
    decoded = _decode(data)
    if data == example(values) and name in values and name in ("key", "image", "caption"):
        is_text = value in NOT_UTF8 or value in (b"", [])
        require(is_text or isinstance(decoded, Refused), f"a record with {name}={value!r:.80}")
    shard = _Shard(draw, folder)
    shard.frames[shard.bad] = frame(data)
    shard.write(shard.frames)
    if isinstance(decoded, Refused):
        return shard.read_in_order()
    pairs = attempt(lambda: list(registry.open_source(str(shard.path))), shard.path)
    require(isinstance(pairs, Refused) or len(pairs) == len(shard.records), "a record is lost")
    return SUCCESS


def check_folder_of_tfds(draw: Draw, folder: pathlib.Path) -> str:
    """A record that is broken or lacks a promised feature is skipped or an error."""
    logging.set_verbosity(logging.ERROR)
    rows = [_fields(draw, number) for number in range(4)]
    for fields in rows:
        fields.pop("concepts", None)
    examples, bad = list(map(example, rows)), draw(integers(0, 3))
    fields = rows[bad]
    name = draw(one(list(fields)))
    others = [example(fields | {name: value}) for value in (3, [b"a"] * 2, 0.5, [], b"", *NOT_UTF8)]
    others += [b"", example({key: value for key, value in fields.items() if key != name})]
    examples[bad] = draw(one(others) | damaged(examples[bad]) | noise(50))
    shard, data = shard_name("pairs", "train", 0, 1), b"".join(map(frame, examples))
    (folder / shard).write_bytes(data)
    lengths = {"shard_lengths": [len(examples)], "num_bytes": len(data)}
    names = {"dataset": "pairs", "split": "train", "image_formats": ["JPEG"]}
    write_dataset_info(folder, **names, **lengths)
    values = {
        f"{shard}-{number:08d}": (fields["image"], fields["caption"].decode())
        for number, fields in enumerate(rows)
    }
    value_of = lambda pair: (pair.image, pair.caption)  # noqa: E731
    touched = list(values)[bad]
    return judge_source(f"tfds:{folder}:train", folder, value_of, values, touched)
