"""Embeddings in parquet and npz files of any schema, through `data_prep.teachers.precomputed`.

The training set's own formats are `records.py`; this is the one place where tables of numbers of
others are read.
"""

from __future__ import annotations

import io
import pathlib
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.teachers.precomputed import EmbeddingTable
from tests.fuzz.cases import ERROR, NOT_UTF8, SUCCESS, Draw, Refused, attempt, require

_DIM = 4


class Rows:
    """Keys with their vectors."""

    def __init__(self, draw: Draw):
        count = draw.randint(2, 9)
        self.keys = [f"k{n} {draw.text(2)}" for n in range(count)]
        rng = np.random.default_rng(draw.randrange(2**32))
        self.values = rng.normal(size=(count, _DIM)).astype(np.float32)

    def parquet(self) -> bytes:
        """In the columns that are expected."""
        return _parquet({"key": pa.array(self.keys), "image_emb": pa.array(self.values.tolist())})

    def npz(self) -> bytes:
        """In the arrays that are expected."""
        return _npz({"key": np.array(self.keys), "image_emb": self.values})

    def judge(self, path: pathlib.Path, must_fail: bool = False, may_fail: bool = True) -> str:
        """All rows as they are, or an error that names the file."""

        def read():
            table = EmbeddingTable(str(path), "key", "image_emb")
            return len(table), [table.get(key) for key in self.keys]

        result = attempt(read, path)
        if isinstance(result, Refused):
            require(may_fail, f"refused: {result.message}")
            return ERROR
        require(not must_fail, "embeddings that are none were accepted")
        count, found = result
        require(count == len(self.keys), f"{count} of {len(self.keys)} rows")
        for key, vector, expected in zip(self.keys, found, self.values, strict=True):
            require(vector is not None, f"the row of '{key}' is lost")
            require(np.allclose(vector, expected, rtol=1e-3), f"the row of '{key}' has changed")
        return SUCCESS


def _parquet(columns: dict[str, pa.Array], **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


def _npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def _write(folder: pathlib.Path, name: str, data: bytes) -> pathlib.Path:
    path = folder / name
    path.write_bytes(data)
    return path


def _other_good_schema(draw: Draw, folder: pathlib.Path) -> str:
    """Other types of the same meaning, and more columns."""
    rows = Rows(draw)
    keys = draw.choice(
        [
            pa.array(rows.keys, pa.large_string()),
            pa.array([key.encode() for key in rows.keys]),
            pa.array(rows.keys).dictionary_encode(),
            pa.array(rows.keys, pa.string()),
        ]
    )
    flat = pa.array(rows.values.reshape(-1))
    values = draw.choice(
        [
            pa.FixedSizeListArray.from_arrays(flat, _DIM),
            pa.array(rows.values.tolist(), pa.large_list(pa.float64())),
            pa.array(rows.values.tolist(), pa.list_(pa.float32())),
            pa.array(rows.values.astype(np.float16).tolist(), pa.list_(pa.float16())),
        ]
    )
    columns = {"key": keys, "image_emb": values, "text_emb": keys, "n": pa.nulls(len(keys))}
    names = draw.sample(list(columns), 4)
    data = _parquet(
        {n: columns[n] for n in names},
        row_group_size=draw.choice([1, 3, 100]),
        compression=draw.choice(["snappy", "zstd", "none"]),
    )
    return rows.judge(_write(folder, "e.parquet", data), may_fail=False)


def _other_schema(draw: Draw, folder: pathlib.Path) -> str:
    """Columns that are missing, or are no keys and no embeddings."""
    rows = Rows(draw)
    count = len(rows.keys)
    lists = rows.values.tolist()
    ragged = [lists[0][:2], *lists[1:]]
    bad_values = [
        pa.array(ragged),
        pa.array([None, *lists[1:]]),
        pa.array([[None, *row[1:]] for row in lists]),
        pa.array([[str(v) for v in row] for row in lists]),
        pa.array([[int(v * 9) for v in row] for row in lists]),
        pa.array(range(count)),
        pa.array(["text"] * count),
        pa.array([b"\0" * 16] * count),
        pa.array([[row] for row in lists]),
        pa.array([[]] * count, pa.list_(pa.float32())),
        pa.array([{"a": 1.0}] * count),
        pa.array([[float("nan")] * _DIM] * count),
        pa.array([[1e39] * _DIM] * count),
        pa.nulls(count),
        pa.array([True] * count),
    ]
    bad_keys = [
        pa.array([None, *rows.keys[1:]]),
        pa.array([rows.keys[0]] * count),
        pa.array([draw.choice(NOT_UTF8), *(k.encode() for k in rows.keys[1:])]),
        pa.array([[k] for k in rows.keys]),
        pa.nulls(count),
    ]
    columns = {"key": pa.array(rows.keys), "image_emb": pa.array(lists)}
    form = draw.randrange(3)
    if form == 0:
        columns["image_emb"] = draw.choice(bad_values)
    elif form == 1:
        columns["key"] = draw.choice(bad_keys)
    else:
        del columns[draw.choice(list(columns))]
        columns["other"] = pa.array(lists)
    path = _write(folder, "e.parquet", _parquet(columns))
    return rows.judge(path, must_fail=True)


def _damaged_parquet(draw: Draw, folder: pathlib.Path) -> str:
    """Parquet keeps no checksum of its pages by default: values may differ, nothing else."""
    rows = Rows(draw)
    data = draw.damage(rows.parquet())
    path = _write(folder, "e.parquet", data)

    def read():
        table = EmbeddingTable(str(path), "key", "image_emb")
        return [table.get(key) for key in rows.keys]

    result = attempt(read, path)
    if isinstance(result, Refused):
        return ERROR
    for vector in result:
        require(vector is None or bool(np.isfinite(vector).all()), "values that are not finite")
    return SUCCESS


def _damaged_npz(draw: Draw, folder: pathlib.Path) -> str:
    """A zip archive has checksums: everything is right, or an error."""
    rows = Rows(draw)
    data = draw.damage(rows.npz())
    return rows.judge(_write(folder, "e.npz", data))


def _other_arrays(draw: Draw, folder: pathlib.Path) -> str:
    rows = Rows(draw)
    count = len(rows.keys)
    bad_values = [
        rows.values.astype(np.int32),
        rows.values.reshape(-1),
        rows.values[None],
        rows.values[:-1],
        np.concatenate([rows.values, rows.values]),
        np.full_like(rows.values, np.nan),
        np.full(rows.values.shape, 1e39),
        np.float32(3),
        rows.values.astype(complex),
        rows.values.astype(str),
        np.zeros(count, [("a", "f4")]),
        np.zeros((count, 0), np.float32),
    ]
    bad_keys = [
        np.array([rows.keys[0]] * count),
        np.array("key"),
        np.zeros((0,), "U1"),
        np.array([["a"], ["b"]]),
        np.array([draw.choice(NOT_UTF8)] * count),
    ]
    arrays = {"key": np.array(rows.keys), "image_emb": rows.values}
    form = draw.randrange(3)
    if form == 0:
        arrays["image_emb"] = draw.choice(bad_values)
    elif form == 1:
        arrays["key"] = draw.choice(bad_keys)
    else:
        del arrays[draw.choice(list(arrays))]
    return rows.judge(_write(folder, "e.npz", _npz(arrays)), must_fail=True)


def _hostile_npz(draw: Draw, folder: pathlib.Path) -> str:
    """Pickled objects, and headers of arrays that no memory holds."""
    rows = Rows(draw)
    shape = draw.choice(["(1099511627776, 4)", "(2, 4611686018427387904)", "(-1, 4)", "(1,", "4"])
    descr = draw.choice(["'<f4'", "'|O'", "'<f4'", "'<U1000000000'", "[('a', '<f4')]", "None"])
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + draw.randbytes(64)
    bad = draw.choice(["key", "image_emb"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in (("key", np.array(rows.keys)), ("image_emb", rows.values)):
            inner = io.BytesIO()
            np.save(inner, value)
            archive.writestr(f"{name}.npy", array if name == bad else inner.getvalue())
    return rows.judge(_write(folder, "e.npz", buffer.getvalue()), must_fail=True)


def _wrong_name(draw: Draw, folder: pathlib.Path) -> str:
    """One format under the other's name, and files that are neither."""
    rows = Rows(draw)
    name, data = draw.choice(
        [
            ("e.npz", rows.parquet()),
            ("e.parquet", rows.npz()),
            ("e.npz", b""),
            ("e.parquet", b""),
            ("e.npz", b"PK\5\6" + bytes(18)),
            ("e.parquet", b"PAR1PAR1"),
            ("e.npz", b"\x93NUMPY"),
        ]
    )
    return rows.judge(_write(folder, name, data), must_fail=True)


def _several_files(draw: Draw, folder: pathlib.Path) -> str:
    """Keys in two files, or vectors of two sizes."""
    rows = Rows(draw)
    _write(folder, "a.npz", rows.npz())
    if draw.random() < 0.5:
        _write(folder, "b.parquet", rows.parquet())
    else:
        other = {"key": np.array(["z"]), "image_emb": np.zeros((1, _DIM + 1), np.float32)}
        _write(folder, "b.npz", _npz(other))
        rows.keys.append("z")
        rows.values = np.concatenate([rows.values, np.zeros((1, _DIM), np.float32)])
    return rows.judge(folder, must_fail=True)


MUTATIONS = {
    "other good schema": _other_good_schema,
    "other schema": _other_schema,
    "damaged parquet": _damaged_parquet,
    "damaged npz": _damaged_npz,
    "other arrays": _other_arrays,
    "hostile npz": _hostile_npz,
    "wrong name": _wrong_name,
    "several files": _several_files,
}
