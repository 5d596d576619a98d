"""Weight files: damaged, cut short, hostile; and model directories, see `model_directories.py`."""

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

from diht_jax.weights.source import read_weights
from diht_jax.weights.tensor_files import read_tensors
from tests.fuzz import model_directories
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
from tests.fuzz.weight_files import (
    ARCH,
    read_both,
    require_equal,
    safetensors_file,
    tensors,
    torch_file,
    torchscript_file,
    torchscript_tensors,
)


def prepare(base: pathlib.Path) -> None:
    """Compiles and imports what is slow the first time."""
    path = base / "model.safetensors"
    path.write_bytes(safetensors_file())
    read_weights(path)
    torch_file(), torch_file(True), torchscript_tensors()


def _damaged_safetensors(draw: Draw, folder: pathlib.Path) -> str:
    """Values have no checksum; names, shapes and places are checked."""
    data = safetensors_file()
    size = struct.unpack("<Q", data[:8])[0] + 8
    form = draw.randrange(4)
    if form == 0:
        damaged = draw.cut(data)
    elif form == 1:
        damaged = draw.flip(data[:8], 3) + data[8:]
    elif form == 2:
        damaged = data[:8] + draw.flip(data[8:size], 2) + data[size:]
    else:
        damaged = data[:size] + draw.flip(data[size:])
    path = folder / "model.safetensors"
    path.write_bytes(damaged)
    found = read_both(path)
    if isinstance(found, Refused):
        require(form != 3, "damaged values cannot be told, and were")
        return ERROR
    require(form >= 2, "a file that was cut off or has another header was read")
    touched: set[str] = set()
    if form == 3:
        header = json.loads(data[8:size])
        changed = [i for i in range(len(data) - size) if data[size + i] != damaged[size + i]]
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                touched |= {name for i in changed if start <= i < stop}
    require_equal(found, tensors(), touched)
    return SUCCESS


def _hostile_safetensors(draw: Draw, folder: pathlib.Path) -> str:
    """Headers of gigabytes, tensors beyond the end or on top of each other, odd types."""
    entries = {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]},
    }
    odd = [
        {"shape": [2**62, 4]},
        {"shape": [-1, 4]},
        {"shape": [2.5]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [16, 0]},
        {"data_offsets": [0, 16, 32]},
        {"dtype": "F99"},
        {"dtype": None},
        {"dtype": draw.choice(["F8_E4M3", "F8_E5M2", "BOOL", "C64", "F4", "U8", "I64"])},
    ]
    entries["b"] = {**entries["b"], **draw.choice(odd)}
    header = json.dumps(entries).encode()
    header = draw.choice([header, header, header, DEEP_JSON, b"[]", b"{", *NOT_UTF8])
    length = draw.choice([len(header)] * 4 + [2**63, 2**40, 0, len(header) + 40])
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + header + bytes(32))
    result = attempt(lambda: read_tensors(path), path)
    require(isinstance(result, Refused) or result.tensors.keys() == {"a", "b"}, f"tensors {result}")
    require(isinstance(attempt(lambda: read_weights(path), path), Refused), "this is no CLIP")
    return ERROR


def _damaged_torch(draw: Draw, folder: pathlib.Path) -> str:
    """A zip archive has checksums: everything is right, or an error."""
    data = torch_file()
    path = folder / draw.choice(["model.pt", "model.ckpt", "model.bin", "model.pth"])
    path.write_bytes(draw.damage(data))
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    require_equal(result.tensors, tensors())
    return SUCCESS


def _damaged_legacy_torch(draw: Draw, folder: pathlib.Path) -> str:
    """The format before it has none."""
    data = torch_file(True)
    damaged = draw.damage(data)
    path = folder / "model.pt"
    path.write_bytes(damaged)
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    for name, value in result.tensors.items():
        require(isinstance(value, np.ndarray), f"{name} is {type(value)}")
    weights = attempt(lambda: read_weights(path), path)
    if isinstance(weights, Refused):
        return ERROR
    require(weights.arch == ARCH, f"another architecture: {weights.arch}")
    return SUCCESS


def _damaged_torchscript(draw: Draw, folder: pathlib.Path) -> str:
    path = folder / "model.pt"
    path.write_bytes(draw.damage(torchscript_file()))
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    require_equal(result.tensors, torchscript_tensors())
    return SUCCESS


def _rewritten(data: bytes, member: str, change: Any, compression: int = 0) -> bytes:
    """A zip archive with one member changed and right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            contents = old.read(info)
            is_meant = info.filename.endswith(member)
            method = compression if is_meant else zipfile.ZIP_STORED
            new.writestr(info.filename, change(contents) if is_meant else contents, method)
    return buffer.getvalue()


def _damaged_pickle(draw: Draw, folder: pathlib.Path) -> str:
    """Damage in a pickle behind right checksums: an error or an array, and no code is run."""
    script = draw.random() < 0.6
    data = torchscript_file() if script else torch_file()
    path = folder / "model.pt"
    path.write_bytes(_rewritten(data, "/data.pkl", draw.damage))
    result = attempt(lambda: read_tensors(path), path)
    if isinstance(result, Refused):
        return ERROR
    for name, value in result.tensors.items():
        require(isinstance(name, str) and isinstance(value, np.ndarray), f"{name!r}: {value!r:.80}")
    return SUCCESS


def _hostile_pickle(draw: Draw, folder: pathlib.Path) -> str:
    """Pickles that ask for memory, run in circles, or name what is no tensor."""
    pickles = [
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
    script = draw.random() < 0.5
    data = torchscript_file() if script else torch_file()
    path = folder / "model.pt"
    chosen = draw.choice(pickles)
    path.write_bytes(_rewritten(data, "/data.pkl", lambda _: chosen))
    result = attempt(lambda: read_tensors(path), path)
    require(isinstance(result, Refused) or not result.tensors, f"{result}")
    return ERROR


def _bomb(draw: Draw, folder: pathlib.Path) -> str:
    """A member that unpacks to gigabytes."""
    data = draw.choice([torchscript_file(), torch_file()])
    path = folder / "model.pt"
    name = draw.choice(["/data/0", "/data.pkl", "/constants.pkl"])
    path.write_bytes(_rewritten(data, name, lambda _: bytes(2**25), zipfile.ZIP_DEFLATED))
    result = attempt(lambda: read_tensors(path), path)
    require(isinstance(result, Refused) or name == "/constants.pkl", "a bomb was unpacked")
    return ERROR if isinstance(result, Refused) else SUCCESS


def _other_contents(draw: Draw, folder: pathlib.Path) -> str:
    """State dicts of other things: lists, numbers, nested and sparse tensors, other models."""
    values = [
        {"a": 3},
        [torch.zeros(2)],
        torch.zeros(2),
        {},
        {"state_dict": {"state_dict": {}}},
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
    torch.save(draw.choice(values), path)
    attempt(lambda: read_tensors(path), path)
    require(isinstance(attempt(lambda: read_weights(path), path), Refused), "this is no CLIP")
    return ERROR


def _other_parameters(draw: Draw, folder: pathlib.Path) -> str:
    """A CLIP with parameters missing, added, swapped, of another shape or type."""
    changed = dict(tensors())
    name, other = draw.sample(sorted(changed), 2)
    form = draw.randrange(6)
    if form == 0:
        del changed[name]
    elif form == 1:
        changed[f"{name}.extra"] = changed[name]
    elif form == 2:
        while changed[name].shape == changed[other].shape:
            name, other = draw.sample(sorted(changed), 2)
        changed[name], changed[other] = changed[other], changed[name]
    elif form == 3:
        value = changed[name]
        changed[name] = draw.choice(
            [value[None], value.reshape(-1)[:0], np.repeat(value[None], 2, 0)]
        )
        if name == "logit_scale" and changed[name].shape == (1,):
            return SUCCESS
    elif form == 4:
        changed[name] = changed[name].astype(draw.choice([np.int64, np.uint8, np.bool_]))
    else:
        changed = {f"visual.{name}": value for name, value in changed.items()}
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.numpy.save(changed))
    found = attempt(lambda: read_weights(path), path)
    require(isinstance(found, Refused), f"other parameters (form {form}, {name}) were accepted")
    return ERROR


MUTATIONS = {
    "damaged safetensors": _damaged_safetensors,
    "hostile safetensors": _hostile_safetensors,
    "damaged torch file": _damaged_torch,
    "damaged old torch file": _damaged_legacy_torch,
    "damaged torchscript": _damaged_torchscript,
    "damaged pickle": _damaged_pickle,
    "hostile pickle": _hostile_pickle,
    "bomb": _bomb,
    "other contents": _other_contents,
    "other parameters": _other_parameters,
    **model_directories.MUTATIONS,
}
