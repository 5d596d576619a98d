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
        return _parquet({name: value for name, value in columns.items() if value is not None})

    def npz(self, **arrays: Any) -> bytes:
        """In the arrays that are expected, with some replaced, or left out for None."""
        arrays = {"key": np.array(self.keys), "image_emb": self.values} | arrays
        buffer = io.BytesIO()
        np.savez(buffer, **{name: value for name, value in arrays.items() if value is not None})
        return buffer.getvalue()

    def judge(
        self, name: str, data: bytes | None = None, has_checksums: bool = True, **verdict: bool
    ) -> str:
        """All rows as they are, or an error that names the file or the folder."""
        path = self.folder / name
        if data is not None:
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


def _parquet(columns: dict[str, pa.Array], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def check_other_good_schemas(draw: Draw, folder: pathlib.Path) -> str:
    """Other types of the same meaning, and more columns."""
    rows = _Rows(draw, folder)
    keys = [pa.array(rows.keys, kind) for kind in (pa.string(), pa.large_string(), pa.binary())]
    keys = draw(one([*keys, keys[0].dictionary_encode()]))
    types = [pa.list_(pa.float32()), pa.list_(pa.float16()), pa.large_list(pa.float64())]
    flat = pa.array(rows.values.reshape(-1))
    values = [pa.array(rows.values.astype(np.float16).tolist(), kind) for kind in types]
    values = draw(one([*values, pa.FixedSizeListArray.from_arrays(flat, _DIM)]))
    columns = {"key": keys, "image_emb": values, "text_emb": keys, "n": pa.nulls(rows.count)}
    names = draw(st.permutations(list(columns)))
    options = {"row_group_size": draw(one([1, 3, 100]))}
    options["compression"] = draw(one(["snappy", "zstd", "none"]))
    data = _parquet({name: columns[name] for name in names}, **options)
    return rows.judge("e.parquet", data, may_fail=False)


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


def check_other_arrays(draw: Draw, folder: pathlib.Path) -> str:
    """The same in npz files."""
    rows = _Rows(draw, folder)
    values, count = rows.values, rows.count
    bad_values = [
        *(None, values.reshape(-1), values[None], values[:-1], np.float32(3)),
        *(values.astype(dtype) for dtype in (np.int32, complex, str)),
        *(np.full(values.shape, value) for value in (np.nan, 1e39)),
        *(np.concatenate([values, values]), np.zeros(count, [("a", "f4")]), values[:, :0]),
    ]
    bad_keys = [
        *(None, np.array([rows.keys[0]] * count), np.array("key"), np.zeros((0,), "U1")),
        *(np.array([["a"], ["b"]]), np.array([draw(one(NOT_UTF8))] * count)),
    ]
    bad = draw(one([("image_emb", v) for v in bad_values] + [("key", v) for v in bad_keys]))
    return rows.judge("e.npz", rows.npz(**dict([bad])), must_fail=True)


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


def check_wrong_files(draw: Draw, folder: pathlib.Path) -> str:
    """One format under the other's name, files that are neither, and two that do not fit."""
    rows = _Rows(draw, folder)
    files = [("e.npz", data) for data in (rows.parquet(), b"", b"PK\5\6" + bytes(18), b"\x93NUMPY")]
    files += [("e.parquet", data) for data in (rows.npz(), b"", b"PAR1PAR1")]
    other = {"key": np.array(["z"]), "image_emb": np.zeros((1, _DIM + 1), np.float32)}
    several = [("b.parquet", rows.parquet()), ("b.npz", rows.npz(**other))]
    name, data = draw(one(files + several))
    if not name.startswith("b"):
        return rows.judge(name, data, must_fail=True)
    (folder / "a.npz").write_bytes(rows.npz())
    (folder / name).write_bytes(data)
    rows.keys.append("z")
    rows.lists.append([0.0] * _DIM)
    rows.count += 1
    return rows.judge("", must_fail=True)
