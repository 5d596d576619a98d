"""Weight files: damaged, cut short, hostile."""

from __future__ import annotations

import io
import json
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.weights.source import read_weights
from diht_jax.weights.tensor_files import read_tensors
from tests.fuzz.damage import DEEP_JSON, NOT_UTF8, Draw, cut, damaged, flipped
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, must_refuse, require
from tests.fuzz.kinds import small_clip
from tests.fuzz.kinds.small_clip import require_equal, safetensors_file, tensors, torch_file

_PICKLES = [
    b"\x80\x02" + b"N" + b"r" + struct.pack("<I", 2**31) + b".",  # memo of billions
    b"\x80\x02" + b"X" + struct.pack("<I", 2**31 - 1) + b"x.",
    b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    b"\x80\x02]q\0h\0a.",  # a list that holds itself
    b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    b"\x80\x02cos\nsystem\nX\4\0\0\0true\x85R.",
    b"\x80\x02cbuiltins\neval\nX\1\0\0\0003\x85R.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    b"\x80\x02c__torch__\nModule\n)\x81q\0}X\1\0\0\0ah\0sb.",  # a module that holds itself
    b"\x80\x02c__torch__\nModule\n)\x81}X\1\0\0\0aK\3sb.",
    b"\x80\x02X\1\0\0\0aQ.",
    b"\x80\x02NQ.",
    pickle.dumps({"a": [1, 2]}, 2),
    b"",
    b".",
    b"\x80\xff.",
]


def prepare(base: pathlib.Path) -> None:
    """Compiles and imports what is slow the first time."""
    path = base / "model.safetensors"
    path.write_bytes(safetensors_file())
    require(small_clip.judge_model(path) == SUCCESS, "the undamaged file")
    torch_file(), torch_file(True), small_clip.torchscript_tensors()


def check_damaged_safetensors(draw: Draw, folder: pathlib.Path) -> str:
    """Values have no checksum; names, shapes and offsets are checked."""
    data = safetensors_file()
    size = struct.unpack("<Q", data[:8])[0] + 8
    length, header, values = data[:8], data[8:size], data[size:]
    path = folder / "model.safetensors"
    form = draw(integers(0, 3))
    if form < 2:
        path.write_bytes(draw(cut(data)) if form else draw(flipped(length, 3)) + header + values)
        return must_refuse(lambda: read_weights(path), path)
    if form == 2:
        path.write_bytes(length + draw(flipped(header, 2)) + values)
        return small_clip.judge_model(path)
    changed = draw(flipped(values))
    path.write_bytes(length + header + changed)
    hit = [i for i in range(len(values)) if values[i] != changed[i]]
    offsets = {n: e["data_offsets"] for n, e in json.loads(header).items() if n != "__metadata__"}
    touched = {name for name, (a, b) in offsets.items() if any(a <= i < b for i in hit)}
    require(small_clip.judge_model(path, but=touched) == SUCCESS, "damaged values were noticed")
    return SUCCESS


def check_hostile_safetensors(draw: Draw, folder: pathlib.Path) -> str:
    """Headers of gigabytes, tensors beyond the end or on top of each other, odd types."""
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
    require(isinstance(result, Refused) or result.tensors.keys() == {"a", "b"}, f"tensors {result}")
    return must_refuse(lambda: read_weights(path), path)


def check_damaged_torch_files(draw: Draw, folder: pathlib.Path) -> str:
    """Zip archives have checksums: everything is right, or an error. The old format has none."""
    name = draw(one(["model.pt", "model.ckpt", "model.bin", "model.pth"]))
    data, expected = draw(
        one(
            [
                (torch_file(), tensors()),
                (small_clip.torchscript_file(), small_clip.torchscript_tensors()),
                (torch_file(True), None),
            ]
        )
    )
    path = folder / ("model.pt" if expected is not tensors() else name)
    path.write_bytes(draw(damaged(data)))
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    if expected is not None:
        require_equal(result.tensors, expected)
        return SUCCESS
    _require_arrays(result.tensors)
    weights = attempt(lambda: read_weights(path), path)
    if isinstance(weights, Refused):
        return ERROR
    require(weights.arch == small_clip.ARCH, f"another architecture: {weights.arch}")
    return SUCCESS


def _require_arrays(found: dict[str, Any]) -> None:
    for name, value in found.items():
        require(isinstance(name, str) and isinstance(value, np.ndarray), f"{name!r}: {value!r:.80}")


def _write_changed(
    draw: Draw, folder: pathlib.Path, member: str, contents: Any, compression: int = 0
) -> pathlib.Path:
    """A torch file of either kind with one member changed and right checksums.

    Args:
        contents: a strategy of the new contents, given the old ones.
    """
    path = folder / "model.pt"
    data = draw(one([torch_file(), small_clip.torchscript_file()]))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            is_meant = info.filename.endswith(member)
            before = old.read(info)
            method = compression if is_meant else zipfile.ZIP_STORED
            new.writestr(info.filename, draw(contents(before)) if is_meant else before, method)
    return path


def check_damaged_pickle(draw: Draw, folder: pathlib.Path) -> str:
    """Damage in a pickle behind right checksums: an error or an array, and no code is run."""
    path = _write_changed(draw, folder, "/data.pkl", damaged)
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    _require_arrays(result.tensors)
    return SUCCESS


def check_hostile_pickle(draw: Draw, folder: pathlib.Path) -> str:
    """Pickles that ask for memory, run in circles, or name what is no tensor."""
    path = _write_changed(draw, folder, "/data.pkl", lambda _: one(_PICKLES))
    result = attempt(lambda: read_tensors(path), path)
    require(isinstance(result, Refused) or not result.tensors, f"{result}")
    return ERROR


def check_bomb(draw: Draw, folder: pathlib.Path) -> str:
    """A member that unpacks to many megabytes."""
    name = draw(one(["/data/0", "/data.pkl", "/constants.pkl"]))
    zeros = st.builds(bytes, st.just(2**25))
    path = _write_changed(draw, folder, name, lambda _: zeros, zipfile.ZIP_DEFLATED)
    result = attempt(lambda: read_tensors(path), path)
    require(isinstance(result, Refused) or name == "/constants.pkl", "a bomb was unpacked")
    return ERROR if isinstance(result, Refused) else SUCCESS


def check_other_contents(draw: Draw, folder: pathlib.Path) -> str:
    """State dicts of other things: lists, numbers, nested and sparse tensors, other models."""
    values = [
        *({"a": 3}, [torch.zeros(2)], torch.zeros(2), {}, {"state_dict": {"state_dict": {}}}),
        {"model": {"a": torch.zeros(2), "b": "text"}},
        {3: torch.zeros(2)},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(2, dtype=torch.complex64)},
        {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)},
        {"a": torch.zeros(2, device="meta")},
        {"a": torch.zeros(1).expand(10**9)},
        {"module.a": torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"visual.conv1.weight": torch.zeros(8, 3, 4, 4), "visual.proj": torch.zeros(0)},
    ]
    path = folder / "model.pt"
    torch.save(values[draw(integers(0, len(values) - 1))], path)
    attempt(lambda: read_tensors(path), path)
    return must_refuse(lambda: read_weights(path), path)


def check_other_parameters(draw: Draw, folder: pathlib.Path) -> str:
    """A CLIP with parameters missing, added, swapped, of another shape or type."""
    changed = dict(tensors())
    name, other = draw(st.permutations(sorted(changed)))[:2]
    value, form = changed[name], draw(integers(0, 5))
    if form == 0:
        del changed[name]
    elif form == 1:
        changed[f"{name}.extra"] = value
    elif form == 2:
        assume(value.shape != changed[other].shape)
        changed[name], changed[other] = changed[other], value
    elif form == 3:
        changed[name] = [value[None], value.reshape(-1)[:0], np.stack([value] * 2)][
            draw(integers(0, 2))
        ]
        assume(name != "logit_scale" or changed[name].shape != (1,))
    elif form == 4:
        changed[name] = value.astype(draw(one([np.int64, np.uint8, np.bool_])))
    else:
        changed = {f"visual.{name}": value for name, value in changed.items()}
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(changed))
    return must_refuse(lambda: read_weights(path), path)
