"""The packaged model loads by its name and retrieves unseen images."""

import io
import tarfile
import types

import numpy as np
import pytest
import safetensors
from PIL import Image

import diht_jax
from diht_jax.config import load_recipe
from diht_jax.data.clipart_tiny import PICTURES
from diht_jax.loading import read_model
from diht_jax.models.zoo import get_architecture
from diht_jax.records.train_data import held_out_records
from tests.docs.pages import REPOSITORY, python_blocks

WEIGHTS = PICTURES.with_name("model.safetensors")


def read_tar(path):
    """Returns the contents of the members by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture(scope="module")
def pairs():
    """Images, and their names."""
    files = read_tar(PICTURES)
    keys = sorted(name.removesuffix(".png") for name in files if name.endswith(".png"))
    images = [Image.open(io.BytesIO(files[f"{key}.png"])) for key in keys]
    return images, [files[f"{key}.txt"].decode() for key in keys]


def test_unseen_pictures_are_found_by_their_names_from_any_folder(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = diht_jax.load_model("clipart_tiny")
    images, names = pairs
    similarities = model.encode_text(names) @ model.encode_image(images).T
    right = np.argmax(similarities, axis=1) == np.arange(len(names))
    assert len(names) == 60 and right.mean() > 0.4  # chance: 1 of 60


def test_the_block_of_its_page_prints_what_the_page_says(capsys):
    page = REPOSITORY / "docs/guides/evaluate/clipart_tiny.md"
    (block,) = python_blocks(page)
    exec(block, {})
    printed = capsys.readouterr().out
    assert printed.endswith(".png\n") and f"```\n\n    {printed}" in page.read_text("utf-8")


def test_file_holds_float16_in_4_mb():
    assert WEIGHTS.stat().st_size <= 4_000_000
    with safetensors.safe_open(WEIGHTS, "numpy") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}


def test_architecture_is_that_of_its_recipe():
    section = load_recipe("clipart_tiny").model
    expected = get_architecture(section.name, section.overrides.to_dict())
    assert read_model("clipart_tiny").arch == expected


def test_its_pictures_were_held_out_of_training(shared_data):
    """Records are numbered as in the tars, all in one shard; see the recipe's commands."""
    google, twitter = (
        list(read_tar(shared_data / f"emoji_{artist}.tar").items())
        for artist in ("google", "twitter")
    )
    keys = [(name, data) for name, data in (*google, *twitter) if name.endswith(".png")]
    records = types.SimpleNamespace(paths=["pairs-train-00000.tfrecord"], shard_lengths=[len(keys)])
    config = load_recipe("clipart_tiny")
    held_out = {keys[number] for number in held_out_records(records, config.data, config.seed)}
    assert held_out >= {item for item in read_tar(PICTURES).items() if item[0].endswith(".png")}
