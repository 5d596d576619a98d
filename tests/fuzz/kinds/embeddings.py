"""Embeddings in parquet and npz files of any schema, through `data_prep.teachers.precomputed`."""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from data_prep.teachers.precomputed import EmbeddingTable
from tests.fuzz.damage import NOT_UTF8, Draw, damaged, seeds, words
from tests.fuzz.judge import judge_read, require

_DIM = 4


class _Rows:
    """Keys with their vectors, of numbers that every type holds exactly."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        self.folder = folder
        self.count = draw(integers(2, 9))
        self.keys = [f"k{n} {draw(words(2))}" for n in range(self.count)]
        rng = np.random.default_rng(draw(seeds))
        self.values = (rng.integers(-8, 8, (self.count, _DIM)) / 4 + 1 / 8).astype(np.float32)
        self.lists = self.values.tolist()

    def parquet(self, **columns: Any) -> bytes:
        """In the columns that are expected, with some replaced, or left out for None."""
        columns = {"key": pa.array(self.keys), "image_emb": pa.array(self.lists)} | columns
        table = pa.table({name: value for name, value in columns.items() if value is not None})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()

    def npz(self) -> bytes:
        """In the arrays that are expected."""
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array(self.keys), image_emb=self.values)
        return buffer.getvalue()

    def judge(self, name: str, data: bytes, has_checksums: bool = True, **verdict: bool) -> str:
        """All rows as they are, or an error that names the file."""
        path = self.folder / name
        path.write_bytes(data)

        def read() -> Any:
            table = EmbeddingTable(str(path), "key", "image_emb")
            found = [(key, table.get(key)) for key in self.keys]
            if not has_checksums:  # values may differ, or keys
                require(all(v is None or np.isfinite(v).all() for _, v in found), "no numbers")
                return [], {}
            require(len(table) == self.count, f"{len(table)} of {self.count} rows")
            return [(key, None if v is None else v.tolist()) for key, v in found], {}

        rows = dict(zip(self.keys, self.lists, strict=True)) if has_checksums else {}
        return judge_read(read, path, rows, **verdict)


def check_other_schemas(draw: Draw, folder: pathlib.Path) -> str:
    """Columns that are missing, or are no keys and no embeddings."""
    rows = _Rows(draw, folder)
    count, lists = rows.count, rows.lists
    bad_values = [
        None,
        pa.array([lists[0][:2], *lists[1:]]),
        pa.array([None, *lists[1:]]),
        pa.array([[None, *row[1:]] for row in lists]),
        pa.array([[str(v) for v in row] for row in lists]),
        pa.array([[int(v * 9) for v in row] for row in lists]),
        pa.array([[row] for row in lists]),
        pa.array([[]] * count, pa.list_(pa.float32())),
        pa.array([[float("nan")] * _DIM] * count),
        pa.array([[1e39] * _DIM] * count),
        pa.nulls(count),
        *(pa.array([value] * count) for value in (7, "text", b"\0" * 16, {"a": 1.0}, True)),
    ]
    bad_keys = [
        None,
        pa.array([None, *rows.keys[1:]]),
        pa.array([rows.keys[0]] * count),
        pa.array([draw(one(NOT_UTF8)), *(k.encode() for k in rows.keys[1:])]),
        pa.array([[k] for k in rows.keys]),
        pa.nulls(count),
    ]
    bad = draw(one([("image_emb", v) for v in bad_values] + [("key", v) for v in bad_keys]))
    return rows.judge(
        "e.parquet", rows.parquet(**dict([bad]), other=pa.array(lists)), must_fail=True
    )


def check_damaged(draw: Draw, folder: pathlib.Path) -> str:
    """A zip archive has checksums; parquet has none by default: values may differ, nothing else."""
    rows = _Rows(draw, folder)
    if draw(st.booleans()):
        return rows.judge("e.npz", draw(damaged(rows.npz())))
    return rows.judge("e.parquet", draw(damaged(rows.parquet())), has_checksums=False)


def check_hostile_npz(draw: Draw, folder: pathlib.Path) -> str:
    """Pickled objects, and headers of arrays that no memory holds."""
    rows = _Rows(draw, folder)
    shape = draw(one(["(1099511627776, 4)", "(2, 4611686018427387904)", "(-1, 4)", "(1,", "4"]))
    descr = draw(one(["'<f4'", "'|O'", "'<U1000000000'", "[('a', '<f4')]", "None"]))
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(range(64))
    bad = draw(one(["key", "image_emb"]))
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(rows.npz())) as good,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in good.namelist():
            archive.writestr(name, array if name == f"{bad}.npy" else good.read(name))
    return rows.judge("e.npz", buffer.getvalue(), must_fail=True)
