"""Released weights are downloaded over HTTP once, with the right hash, or not at all."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

import diht_jax.weights.releases as releases
from diht_jax import load_model
from diht_jax.models.zoo import ARCHITECTURES
from diht_jax.weights.open_clip_layout import read_architecture
from diht_jax.weights.releases import HUB_MODELS, RELEASES, download
from tests.serving import FileServer
from tests.weights import conftest as reference

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server():
    with FileServer({"model.ckpt": CONTENT}) as started:
        yield started


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_goes_on(server, tmp_path, ranges):
    server.breaks, server.ranges = 1, ranges
    download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt", SHA256)
    assert (tmp_path / "model.ckpt").read_bytes() == CONTENT
    assert server.asked_ranges == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_later_call_goes_on_where_an_interrupted_one_was(server, tmp_path):
    server.breaks = 3
    with pytest.raises(ValueError, match=r"bytes are kept in .*\.part and the next call goes on"):
        download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt", SHA256)
    assert not (tmp_path / "model.ckpt").exists()
    assert 0 < (tmp_path / "model.ckpt.part").stat().st_size < len(CONTENT)
    download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt", SHA256)
    assert (tmp_path / "model.ckpt").read_bytes() == CONTENT
    assert len(server.asked_ranges) == 4 and server.asked_ranges[-1] != "bytes=0-"
    assert not (tmp_path / "model.ckpt.part").exists()


def test_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(ValueError, match=f"expected SHA-256 {'0' * 64}, got {SHA256}"):
        download(f"{server.url}/model.ckpt", tmp_path / "model.ckpt", "0" * 64)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == []


def test_damaged_cache_is_replaced(server, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(CONTENT[:-1] + b"x")
    download(f"{server.url}/model.ckpt", path, SHA256)
    assert path.read_bytes() == CONTENT


@pytest.fixture
def small_release(server, tmp_path, monkeypatch):
    """'diht_vitb32_224px' as a small model on the local server."""
    name = "diht_vitb32_224px"
    torch.save(reference.open_clip_model(reference.SMALL).state_dict(), tmp_path / "state.ckpt")
    content = (tmp_path / "state.ckpt").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    server.files = {f"{name}_{sha256}.ckpt": content}
    monkeypatch.setattr(releases, "ADDRESS", server.url)
    monkeypatch.setitem(RELEASES, name, sha256)
    monkeypatch.setitem(ARCHITECTURES, name, reference.SMALL)
    monkeypatch.setenv(releases.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(releases.WEIGHTS_VARIABLE, raising=False)
    return name


def test_load_model_by_name_downloads_once(small_release, server):
    images, tokens = reference.inputs(reference.SMALL)
    expected = reference.open_clip_embeddings(
        reference.open_clip_model(reference.SMALL), images, tokens
    )
    for _ in range(2):
        model = load_model(small_release)
        np.testing.assert_allclose(model.encode_image(images), expected[0], atol=1e-5)
    assert server.asked_ranges == [None]
    assert model.config.model.name == small_release


@pytest.mark.parametrize("place", ["file", "published", "model_directory"])
def test_environment_variable_names_a_local_copy(
    small_release, server, tmp_path, monkeypatch, place
):
    folder = tmp_path / "local"
    path = {
        "file": folder / "anything.pt",
        "published": folder / f"{small_release}_{RELEASES[small_release]}.ckpt",
        "model_directory": folder / "model.pt",
    }[place]
    path.parent.mkdir(parents=True)
    path.write_bytes((tmp_path / "state.ckpt").read_bytes())
    monkeypatch.setenv(releases.WEIGHTS_VARIABLE, str(path if place == "file" else folder))
    assert load_model(small_release).image_size == 32
    assert server.asked_ranges == []


def test_environment_variable_with_a_wrong_place_or_model(small_release, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diht_vitl14_224px.ckpt").write_bytes(b"")
    monkeypatch.setenv(releases.WEIGHTS_VARIABLE, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="holds no 'diht_vitb32_224px'; expected diht_"):
        load_model(small_release)
    published = tmp_path / "other" / f"{small_release}_{RELEASES[small_release]}.ckpt"
    published.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="its SHA-256 is not the one in its name"):
        load_model(small_release)
    monkeypatch.setitem(ARCHITECTURES, small_release, ARCHITECTURES["diht_vitb16_224px"])
    monkeypatch.setenv(releases.WEIGHTS_VARIABLE, str(tmp_path / "state.ckpt"))
    with pytest.raises(ValueError, match="expected the architecture of 'diht_vitb32_224px'"):
        load_model(small_release)


# The same architectures in open_clip, whose SigLIP towers compute GELU unlike the original.
IN_OPEN_CLIP = {
    "diht_vitb32_224px": "ViT-B-32",
    "diht_vitb16_224px": "ViT-B-16",
    "diht_vitl14_224px": "ViT-L-14",
    "diht_vitl14_336px": "ViT-L-14-336",
    "siglip_vitb16_224px": "ViT-B-16-SigLIP",
    "siglip_so400m14_384px": "ViT-SO400M-14-SigLIP-384",
    "siglip2_vitb16_224px": "ViT-B-16-SigLIP2",
    "siglip2_vitl16_256px": "ViT-L-16-SigLIP2-256",
    "siglip2_so400m14_384px": "ViT-SO400M-14-SigLIP2-378",
    "pe_core_vitb16_224px": "PE-Core-B-16",
    "pe_core_vitl14_336px": "PE-Core-L-14-336",
    "metaclip2_vith14_224px": "ViT-H-14-worldwide-quickgelu",
    "dfn2b_vitb16_224px": "ViT-B-16-quickgelu",
    "dfn2b_vitl14_224px": "ViT-L-14-quickgelu",
    "dfn5b_vith14_378px": "ViT-H-14-378-quickgelu",
}


@pytest.mark.parametrize("name", [*RELEASES, *HUB_MODELS])
def test_the_architecture_of_a_published_model_is_that_of_open_clip(name):
    open_clip = pytest.importorskip("open_clip")
    arch, other = ARCHITECTURES[name], IN_OPEN_CLIP[name]
    found = read_architecture(open_clip.get_model_config(other), other)
    if name.startswith("siglip"):
        size = arch.image_size
        found = dataclasses.replace(
            found, activation="gelu_tanh", text_activation=None, image_size=size
        )
    assert found == arch
