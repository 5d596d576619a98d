"""Weight files of a very small CLIP: damaged, truncated, malicious."""

from __future__ import annotations

import functools
import io
import json
import pathlib
import pickle
import struct
import warnings
import zipfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.models.zoo import Architecture
from diht_jax.weights import clip_layout
from diht_jax.weights.source import read_weights
from diht_jax.weights.tensor_files import read_tensors
from tests import make
from tests.fuzz.damage import (
    DEEP_JSON,
    NOT_UTF8,
    Draw,
    cut,
    damaged,
    flipped,
)
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, must_refuse, require

_PICKLES = [
    b"\x80\x02" + b"N" + b"r" + struct.pack("<I", 2**31) + b".",  # a memo index in the billions
    b"\x80\x02" + b"X" + struct.pack("<I", 2**31 - 1) + b"x.",
    b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    b"\x80\x02]q\0h\0a.",  # a list that contains itself
    b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    b"\x80\x02cos\nsystem\nX\4\0\0\0true\x85R.",
    b"\x80\x02cbuiltins\neval\nX\1\0\0\0003\x85R.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    b"\x80\x02c__torch__\nModule\n)\x81q\0}X\1\0\0\0ah\0sb.",  # a module that contains itself
    b"\x80\x02c__torch__\nModule\n)\x81}X\1\0\0\0aK\3sb.",
    b"\x80\x02X\1\0\0\0aQ.",
    b"\x80\x02NQ.",
    pickle.dumps({"a": [1, 2]}, 2),
    b"",
    b".",
    b"\x80\xff.",
]


_FIELDS = {
    **{"image_size": 8, "patch_size": 4, "vision_layers": 1, "vision_width": 8, "vision_heads": 1},
    **{"text_layers": 1, "text_width": 8, "text_heads": 1, "embed_dim": 4},
    **{"context_length": 5, "vocab_size": 12},
}
_ARCH = Architecture(**_FIELDS)


@functools.cache
def _tensors() -> dict[str, np.ndarray]:
    """Returns random parameters under CLIP's names."""
    return make.clip_tensors(_ARCH)


@functools.cache
def _safetensors_file() -> bytes:
    """Returns the parameters as a safetensors file."""
    return safetensors.numpy.save(_tensors(), {"format": "pt"})


@functools.cache
def _torch_file(is_legacy: bool = False) -> bytes:
    """Returns the parameters as a torch state dict, in the zip format or the legacy one."""
    buffer = io.BytesIO()
    state = {name: torch.from_numpy(value.copy()) for name, value in _tensors().items()}
    torch.save(state, buffer, _use_new_zipfile_serialization=not is_legacy)
    return buffer.getvalue()


@functools.cache
def _torchscript_file() -> bytes:
    """Returns a TorchScript archive of two layers, the format of OpenAI's models."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


@functools.cache
def _torchscript_tensors() -> dict[str, np.ndarray]:
    """Returns the archive's tensors as torch itself reads them."""
    module = torch.jit.load(io.BytesIO(_torchscript_file()))
    return {name: value.numpy() for name, value in module.state_dict().items()}


def _require_equal(
    found: Any, expected: dict[str, np.ndarray], but: set[str] = frozenset()
) -> None:
    """Requires the same names and, except for `but`, the same values."""
    require(found.keys() == expected.keys(), f"names {sorted(found.keys() ^ expected.keys())[:5]}")
    for name, value in expected.items():
        same = np.array_equal(found[name], value)
        require(same or name in but, f"the values of {name} have changed")


def _judge_model(path: pathlib.Path, but: set[str] = frozenset()) -> str:
    """Requires the model's parameters, except for `but`, or an error that names the path."""
    weights = attempt(lambda: read_weights(path), path)
    if isinstance(weights, Refused):
        return ERROR
    _require_equal(clip_layout.to_clip(weights.params, weights.arch), _tensors(), but)
    return SUCCESS


def prepare(base: pathlib.Path) -> None:
    """Compiles and imports in advance what is slow the first time."""
    path = base / "model.safetensors"
    path.write_bytes(_safetensors_file())
    require(_judge_model(path) == SUCCESS, "the undamaged file")
    _torch_file(), _torch_file(True), _torchscript_tensors()


def check_damaged_safetensors(draw: Draw, folder: pathlib.Path) -> str:
    """Values have no checksum; names, shapes and offsets are checked."""
    data = _safetensors_file()
    size = struct.unpack("<Q", data[:8])[0] + 8
    length, header, values = data[:8], data[8:size], data[size:]
    path = folder / "model.safetensors"
    form = draw(integers(0, 3))
    if form < 2:
        path.write_bytes(draw(cut(data)) if form else draw(flipped(length, 3)) + header + values)
        return must_refuse(lambda: read_weights(path), path)
    if form == 2:
        path.write_bytes(length + draw(flipped(header, 2)) + values)
        return _judge_model(path)
    changed = draw(flipped(values))
    path.write_bytes(length + header + changed)
    hit = [i for i in range(len(values)) if values[i] != changed[i]]
    offsets = {n: e["data_offsets"] for n, e in json.loads(header).items() if n != "__metadata__"}
    touched = {name for name, (a, b) in offsets.items() if any(a <= i < b for i in hit)}
    require(_judge_model(path, but=touched) == SUCCESS, "damaged values were noticed")
    return SUCCESS


def check_hostile_safetensors(draw: Draw, folder: pathlib.Path) -> str:
    """Headers of gigabytes, tensors beyond the end or overlapping, odd types."""
    odd: list[dict[str, Any]] = [{"shape": [2**62, 4]}, {"shape": [-1, 4]}, {"shape": [2.5]}]
    odd += [{"data_offsets": value} for value in ([0, 2**60], [16, 0], [0, 16, 32])]
    types = ["F99", None, "F8_E4M3", "F8_E5M2", "BOOL", "C64", "F4", "U8", "I64"]
    odd += [{"dtype": value} for value in types]
    entries = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]} | draw(one(odd)),
    }
    header = json.dumps(entries).encode()
    header = draw(st.just(header) | one([DEEP_JSON, b"[]", b"{", *NOT_UTF8]))
    length = draw(st.just(len(header)) | one([2**63, 2**40, 0, len(header) + 40]))
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header + bytes(32))
    result = attempt(lambda: read_tensors(path), path)
    require(isinstance(result, Refused) or result.keys() == {"a", "b"}, f"tensors {result}")
    return must_refuse(lambda: read_weights(path), path)


def check_damaged_torch_files(draw: Draw, folder: pathlib.Path) -> str:
    """A damaged zip archive (with checksums) loads correctly or fails; the old format may not."""
    path = folder / draw(one(["model.pt", "model.ckpt", "model.bin", "model.pth"]))
    data, expected = _torch_file(), _tensors()
    form = draw(integers(0, 2))
    if form > 0:
        path = folder / "model.pt"
        data, expected = _torchscript_file(), _torchscript_tensors()
    path.write_bytes(draw(damaged(_torch_file(True) if form == 2 else data)))
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    if form < 2:
        _require_equal(result, expected)
        return SUCCESS
    _require_arrays(result)
    weights = attempt(lambda: read_weights(path), path)
    if isinstance(weights, Refused):
        return ERROR
    require(weights.arch == _ARCH, f"another architecture: {weights.arch}")
    return SUCCESS


def _require_arrays(found: dict[str, Any]) -> None:
    for name, value in found.items():
        require(isinstance(name, str) and isinstance(value, np.ndarray), f"{name!r}: {value!r:.80}")


def _write_changed(draw: Draw, folder: pathlib.Path, member: str, contents: Any) -> pathlib.Path:
    """Writes a torch file of either kind with one member changed and valid checksums.

    Args:
        contents: returns a strategy of new contents for the old ones.
    """
    path = folder / "model.pt"
    data = draw(one([_torch_file(), _torchscript_file()]))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            is_meant = info.filename.endswith(member)
            before = old.read(info)
            data = draw(contents(before)) if is_meant else before
            is_long = len(data) > 2**20
            new.writestr(
                info.filename, data, zipfile.ZIP_DEFLATED if is_long else zipfile.ZIP_STORED
            )
    return path


def check_damaged_pickle(draw: Draw, folder: pathlib.Path) -> str:
    """A damaged pickle with valid checksums gives an error or an array, and runs no code."""
    path = _write_changed(draw, folder, "/data.pkl", damaged)
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    _require_arrays(result)
    return SUCCESS


def check_hostile_torch_files(draw: Draw, folder: pathlib.Path) -> str:
    """Pickles that ask for memory, loop, or name something other than a tensor; zeroed members."""
    bombs = [("/data/0", bytes(2**25)), ("/data.pkl", bytes(2**25))]
    member, contents = draw(one([("/data.pkl", data) for data in _PICKLES] + bombs))
    path = _write_changed(draw, folder, member, lambda _: st.just(contents))
    result = attempt(lambda: read_tensors(path), path)
    require(isinstance(result, Refused) or not result, f"{result}")
    return ERROR
