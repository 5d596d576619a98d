"""Weight files are read as data: code is refused, and damage is named."""

import collections
import copy
import dataclasses
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from diht_jax import load_model
from diht_jax.weights.tensor_files import (
    is_torchscript,
    read_tensors,
    write_safetensors,
    write_torch,
)
from tests.weights import conftest as reference


class Malicious:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def replace_pickle(source, target, data, member="data.pkl"):
    """Copies a zip archive with another pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith(f"/{member}") else old.read(name))


@pytest.mark.parametrize("form", ["bare", "zip", "torch", "torchscript"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path, form):
    marker, path = tmp_path / "marker", tmp_path / "model.ckpt"
    payload = {"visual.proj": Malicious(marker)}
    if form == "bare":
        path.write_bytes(pickle.dumps(payload))
    elif form == "torch":
        torch.save(payload, path)
    elif form == "zip":
        torch.save({"a": torch.zeros(2)}, tmp_path / "good")
        replace_pickle(tmp_path / "good", path, pickle.dumps(payload, protocol=2))
    else:
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "good")
        replace_pickle(tmp_path / "good", path, pickle.dumps(payload, protocol=2))
        assert is_torchscript(path)
    with pytest.raises(ValueError, match=r"model\.ckpt.*refused.*could run code"):
        load_model(path)
    assert not marker.exists()
    # The payload works: unpickling it creates the marker.
    if form == "bare":
        with open(path, "rb") as file:
            pickle.load(file)
        assert marker.exists()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.inner[0].weight.data = torch.randn(4, 6)[:, ::2]  # strided in its storage
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (torch.jit.script, torch.float32),
        (torch.jit.script, torch.bfloat16),
        (lambda module: torch.jit.trace(module, torch.ones(1, 3)), torch.float16),
    ],
)
def test_torchscript_archive_is_read_as_torch_reads_it(tmp_path, make, dtype):
    torch.manual_seed(0)
    module = make(Attention().eval()).to(dtype)
    module.save(tmp_path / "module.pt")
    expected = torch.jit.load(tmp_path / "module.pt").state_dict()
    found = read_tensors(tmp_path / "module.pt")
    assert found.keys() == expected.keys() and len(found) == 5
    for name, value in expected.items():
        assert found[name].shape == tuple(value.shape)
        np.testing.assert_array_equal(
            found[name].astype(np.float64), value.to(torch.float64).numpy()
        )


def test_openai_archives_have_quick_gelu(tmp_path):
    """TorchScript in half precision with the three scalars, the format of OpenAI's models."""
    model = copy.deepcopy(reference.open_clip_model(reference.SMALL))
    for name, value in (("input_resolution", 32), ("context_length", 12), ("vocab_size", 600)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    images, tokens = reference.inputs(reference.SMALL)
    example = (reference.pixel_values(images[:1]), torch.from_numpy(tokens[:1]))
    torch.jit.trace(model.half().float(), example, check_trace=False).half().save(tmp_path / "a.pt")
    loaded = load_model(tmp_path / "a.pt")
    assert loaded.config.model.overrides.activation == "quick_gelu"
    quick = reference.open_clip_model(dataclasses.replace(reference.SMALL, activation="quick_gelu"))
    quick = copy.deepcopy(quick).half().float()
    expected = reference.open_clip_embeddings(quick, images, tokens)
    np.testing.assert_allclose(loaded.encode_image(images), expected[0], atol=1e-5)
    np.testing.assert_allclose(loaded.encode_text(tokens), expected[1], atol=1e-5)


def test_torchscript_tensor_beyond_its_storage_is_refused(tmp_path):
    """A forged shape must not read memory beyond the file's bytes."""
    module = torch.jit.script(nn.Linear(2, 3))
    module.save(tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        data = archive.read(name)
    # The weight's shape (3, 2): a mark, two one-byte integers, a tuple.
    assert data.count(b"(K\x03K\x02t") == 1
    forged = data.replace(b"(K\x03K\x02t", b"(K\xf0K\x02t")
    replace_pickle(tmp_path / "good.pt", tmp_path / "bad.pt", forged)
    with pytest.raises(ValueError, match=r"bad\.pt: not a whole torch file"):
        read_tensors(tmp_path / "bad.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_written_arrays_come_back_bit_for_bit(tmp_path, suffix, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        "a.transposed": rng.standard_normal((5, 3)).astype(dtype).T,
        "b.scalar": np.array(4.6, dtype),
    }
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        write_torch(path, tensors)
    else:
        write_safetensors(path, tensors)
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()


@pytest.mark.parametrize("place", [-1, -100, -167])
def test_a_flipped_bit_in_a_safetensors_file_is_named(tmp_path, place):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.ones((10, 4), np.float32), "b": np.zeros(3, np.float16)})
    data = bytearray(path.read_bytes())
    data[place] ^= 1  # in a value of either tensor, or at the end of the header
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: (damaged|not a whole)"):
        read_tensors(path)


def test_equal_tensors_give_equal_bytes_of_safetensors(tmp_path):
    tensors = {"a": np.ones(3, np.float32), "z": np.zeros((2, 2), np.float16)}
    written = set()
    for number in range(8):  # the library shuffles the metadata
        write_safetensors(tmp_path / f"{number}.safetensors", tensors)
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1


def test_ordered_dicts_and_nested_state_dicts(tmp_path):
    inner = collections.OrderedDict(a=torch.ones(2))
    for content in (inner, {"model": inner}, {"state_dict": {"_orig_mod.module.a": torch.ones(2)}}):
        torch.save(content, tmp_path / "a.pt")
        np.testing.assert_array_equal(read_tensors(tmp_path / "a.pt")["a"], np.ones(2))


@pytest.mark.parametrize("is_torchscript_file", [True, False])
def test_tensors_that_share_a_storage_are_bound_by_bytes(tmp_path, is_torchscript_file):
    """Views of a storage are cheap for torch, but become copies on a device."""
    base = torch.arange(2.0**20)  # 4 MiB
    for count in (3, 40):
        views = {f"b{start}": base[start:] for start in range(count)}
        path = tmp_path / f"{count}.pt"
        if is_torchscript_file:
            module = nn.Module()
            for name, view in views.items():
                module.register_buffer(name, view)
            torch.jit.script(module).save(path)
        else:
            torch.save(views, path)
        assert path.stat().st_size < 2**23
        if count == 3:
            np.testing.assert_array_equal(read_tensors(path)["b2"], views["b2"].numpy())
        else:
            with pytest.raises(ValueError, match=r"40\.pt: .*share their storage.* over 8\d MiB"):
                read_tensors(path)


def test_shared_modules_and_packed_pickles_do_not_multiply(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "plain.pt")
    # 2**40 paths lead through 40 modules, each of which has the next one twice.
    module = b"}"
    for level in range(40):
        module = (
            b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00a"
            + module
            + b"q%cX\x01\x00\x00\x00bh%cub" % (level, level)
        )
    replace_pickle(tmp_path / "plain.pt", tmp_path / "deep.pt", b"\x80\x02" + module + b".")
    with pytest.raises(ValueError, match="modules that are shared"):
        read_tensors(tmp_path / "deep.pt")
    replace_pickle(tmp_path / "plain.pt", tmp_path / "large.pt", b"")
    with zipfile.ZipFile(tmp_path / "large.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more/data.pkl", bytes(2**26 + 1))
    with pytest.raises(ValueError, match="'more/data.pkl' is compressed"):
        read_tensors(tmp_path / "large.pt")


def test_other_names_and_missing_files(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a weight file; expected a name ending in .safetens"):
        load_model(tmp_path / "a.h5")
    for name in ("a.pt", "b.pt"):
        write_torch(tmp_path / name, {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="weight files found: a.pt, b.pt; name one of them"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no model of this name; did you mean 'diht_vitb32_224px'"):
        load_model("diht_vitb32_224")
