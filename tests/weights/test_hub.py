"""Round trip of models through the hub, against a stand-in for its API."""

import pathlib
import shutil

import jax
import pytest
from huggingface_hub import HfFileSystem, constants

from diht_jax import load_model
from diht_jax.export import export_model
from diht_jax.readers.registry import list_shards, read_pairs
from diht_jax.storage import hub, stores
from diht_jax.weights.source import choose_files, find_weight_file
from tests import make
from tests.storage import hub_server


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A simulated hub, with a login and an empty cache."""
    with hub_server.serving() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            found.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make.write_run(tmp_path_factory.mktemp("run"), make.tiny_config())


@pytest.mark.parametrize("format", ["safetensors", "huggingface"])
def test_a_model_comes_back_from_the_hub(server, run, tmp_path, format):
    export_model(run, format, tmp_path / "out", push="hf-hub:someone/tiny-clip")
    pushed = server.files["model", "someone/tiny-clip"]
    assert {n: d for n, d in pushed.items() if n != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
    }
    card = pushed["README.md"].decode()
    assert "# tiny-clip\n" in card and 'load_model("hf-hub:someone/tiny-clip")' in card
    shutil.rmtree(tmp_path / "out")
    # As in open_clip's repositories: torch's weights are not fetched in addition.
    server.files["model", "someone/tiny-clip"]["pytorch_model.bin"] = b"no weights"
    devices = jax.devices()[:1]
    model = load_model("hf-hub:someone/tiny-clip", devices=devices)
    assert model.fingerprint() == load_model(run, devices=devices).fingerprint()
    fetched = [path for method, path in server.requests if method == "GET" and "/resolve/" in path]
    assert fetched and not any(path.endswith((".bin", "README.md")) for path in fetched)


def test_a_data_set_of_the_hub_is_read(server, tmp_path, monkeypatch):
    path = make.write_pair_tar(tmp_path / "pairs-0.tar", ["a red car", "two dogs", "a tree"])
    data = pathlib.Path(path).read_bytes()
    server.files["dataset", "someone/pairs"] = {"train/pairs-0.tar": data, "README.md": b""}
    stores._file_system.cache_clear()
    HfFileSystem.clear_instance_cache()
    shards = list_shards("hf://datasets/someone/pairs/train/*.tar")
    assert [entry.caption for shard in shards for entry in read_pairs(shard)] == [
        "a red car",
        "two dogs",
        "a tree",
    ]
    size, version = stores.input_version("hf://datasets/someone/pairs/train/pairs-0.tar")
    assert size == len(data) and version is not None
    stores._file_system.cache_clear()


def test_the_cache_answers_without_a_network(server, run, tmp_path, monkeypatch):
    export_model(run, "safetensors", tmp_path / "out", push="hf-hub:someone/tiny")
    first = hub.download("hf-hub:someone/tiny", choose_files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = hub.download("hf-hub:someone/tiny", choose_files)
    assert again == first and find_weight_file(again).read_bytes()
    with pytest.raises(ValueError, match=r"hf-hub:someone/other cannot be read.*HF_HUB_OFFLINE"):
        hub.download("hf-hub:someone/other", choose_files)


def test_a_published_model_comes_by_its_name(server, run, tmp_path):
    export_model(run, "open_clip", tmp_path / "out", push="hf-hub:timm/PE-Core-B-16")
    devices = jax.devices()[:1]
    model = load_model("pe_core_vitb16_224px", devices=devices)
    assert model.fingerprint() == load_model(run, devices=devices).fingerprint()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:tiny", "expected hf-hub:OWNER/NAME"),
        ("hf-hub:../x", "expected hf-hub:OWNER/NAME"),
        ("hf-hub:a/b@", "expected hf-hub:OWNER/NAME"),
        ("hf-hub:someone/nothing", "hf-hub:someone/nothing cannot be read.*HF_TOKEN"),
    ],
)
def test_a_wrong_or_missing_model_is_named(server, name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_no_login_is_said_before_the_export(server, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"hf-hub:someone/tiny cannot be written.*hf auth login"):
        export_model(run, "safetensors", tmp_path / "out", push="hf-hub:someone/tiny")
    assert not (tmp_path / "out").exists() and not server.files
