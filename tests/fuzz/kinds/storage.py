"""Disks that fail for a moment, outputs in an object store, and small files of giant contents."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import lzma
import os
import pathlib
import tarfile
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from data_prep.filtering.shard import _next_chunk
from diht_jax.data.tokenizer import tokenize
from diht_jax.evaluate import evaluate_model
from diht_jax.export import export_model
from diht_jax.readers import registry
from diht_jax.records.schema import Pair, encode_record
from diht_jax.records.tfrecord import TFRecordWriter
from tests.fuzz.damage import Draw, noise, words
from tests.fuzz.judge import ERROR, SKIP, SUCCESS, Refused, attempt, must_refuse, require
from tests.readers.failing_disk import FailingDisk

_ERRORS = (*(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN), errno.EACCES, errno.ENOMEM)
_URLS = ("s3://bucket/out", "gs://b/x/y.json", "memory://out", "file:///tmp/out", "hdfs://h:9/o")


class _Log:
    """As much of the filter's log as reading needs."""

    def clock(self, stage: str) -> Any:
        return contextlib.nullcontext()


def _write_source(draw: Draw, folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
    """A small source of any kind, and its pairs by caption."""
    pairs = {f"c{n} {draw(words(3))}": draw(noise(40_000, 1)) for n in range(draw(integers(1, 5)))}
    form = draw(one(["table", "tar", "tar.gz", "tar.xz", "parquet", "tfrecord", "classes"]))
    path = folder / f"a.{form}"
    if form == "table":
        path = folder / "a.jsonl"
        rows = []
        for number, (caption, image) in enumerate(pairs.items()):
            (folder / f"{number}.png").write_bytes(image)
            rows.append(json.dumps({"image": f"{number}.png", "caption": caption}))
        path.write_text("\n".join(rows))
    elif form.startswith("tar"):
        mode = form.partition(".")[2]
        path = path if mode != "xz" else folder / "a.tar"
        with tarfile.open(path, f"w:{mode}") as tar:
            for number, (caption, image) in enumerate(pairs.items()):
                for name, data in ((f"{number}.png", image), (f"{number}.txt", caption.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    elif form == "parquet":
        columns = {"jpg": list(pairs.values()), "txt": list(pairs)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    elif form == "tfrecord":
        with TFRecordWriter(path) as writer:
            for caption, image in pairs.items():
                writer.write(encode_record(Pair(caption, image, caption)))
    else:
        path = folder / "classes"
        pairs = {f"c{number}": image for number, image in enumerate(pairs.values())}
        for name, image in pairs.items():
            (path / name).mkdir(parents=True)
            (path / name / "a.png").write_bytes(image)
    return str(path), pairs


def check_transient_io(draw: Draw, folder: pathlib.Path) -> str:
    """Reads that fail a few times, or from then on: all pairs, or an error; never a loss."""
    spec, pairs = _write_source(draw, folder)
    failures, spared = draw(one([1, 2, 3, 4, 5, 9, 10**9])), draw(integers(0, 12))
    disk = FailingDisk(folder, failures, spared, draw(one(_ERRORS)))

    def read() -> Any:
        source = registry.open_source(spec)
        found = {pair.caption: pair.image for pair in source}
        require(not source.skipped, f"lost: {dict(source.skipped)}")
        return found

    with disk.mounted():
        result = attempt(read, folder)
    if isinstance(result, Refused):
        for wrong in ("damaged", "cut off", "write it again"):
            require(wrong not in result.message, f"the disk is called '{wrong}': {result.message}")
        return ERROR
    require(result == pairs, "other pairs")
    return SUCCESS


def check_url_outputs(draw: Draw, folder: pathlib.Path) -> str:
    """An output that is not written to object stores is refused before anything is done."""
    url = draw(one(_URLS)) + draw(one(["", "/deep", "?x=1"]))
    write = draw(
        one(
            [
                lambda: export_model("no model", "clip", url),
                lambda: evaluate_model("no model", [], url),
            ]
        )
    )
    with contextlib.chdir(folder):
        outcome = must_refuse(write, f"output={url}", f"output='{url}'")
    require(not os.listdir(folder), f"written to a local folder: {os.listdir(folder)}")
    return outcome


def check_byte_bombs(draw: Draw, folder: pathlib.Path) -> str:
    """A few kB that stand for gigabytes: read within the limits of a case, or refused."""
    size, count = draw(one([2**16, 2**22, 2**25])), draw(integers(1, 64))
    form = draw(one(["parquet", "png", "txt", "json", "caption"]))
    if form == "caption":
        text = draw(words()) * (size // 4)
        require(tokenize(text).shape == (1, 77), "shape")
        return SUCCESS
    if form == "parquet":
        path = folder / "bomb.parquet"
        table = pyarrow.table({"jpg": [bytes(size)], "txt": ["x"]}).take([0] * count)
        pyarrow.parquet.write_table(table, path, compression="zstd")
    else:
        path = folder / "bomb.tar"
        most = 2**22 if form == "json" else 2**24 - 64  # objects take twenty times their text
        unit = {"png": b"\0", "txt": b"dog ", "json": b"[],"}[form]
        data = unit * (min(size, most) // len(unit))
        if form == "json":
            data = b'{"a": [' + data + b"[]]}"
        with lzma.open(path, "wb", preset=0) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(min(count, 2 ** (23 if form == "json" else 25) // len(data))):
                members = [(f"{number}.{form}", data), (f"{number}.jpg", b"x")]
                for name, contents in members[: 1 if form == "png" else 2]:
                    info = tarfile.TarInfo(name)
                    info.size = len(contents)
                    tar.addfile(info, io.BytesIO(contents))

    def read() -> int:
        entries = iter(registry.read_pairs(registry.list_shards(str(path))[0]))
        total = 0
        while chunk := _next_chunk(entries, 256, _Log()):
            total += sum(isinstance(entry, Pair) for entry in chunk)
        return total

    result = attempt(read, path)
    if isinstance(result, Refused):
        return ERROR
    return SUCCESS if result else SKIP
