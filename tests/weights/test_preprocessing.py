"""Images are preprocessed as in transformers and open_clip, wherever the model is used."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from diht_jax.input.transforms import Preprocessing, eval_transform, normalize
from diht_jax.loading import read_model
from diht_jax.models.zoo import get_architecture
from diht_jax.weights.export import write_model
from diht_jax.weights.settings import (
    make_preprocessor,
    read_preprocess_cfg,
    read_preprocessor,
)
from diht_jax.weights.source import choose_files
from tests import make
from tests.weights import conftest as reference

SIDE = 48
SIZES = [(48, 48), (20, 31), (97, 60), (640, 41), (33, 500)]
FORMS = [
    Preprocessing((0.5,) * 3, (0.5,) * 3, "squash", "bicubic"),
    Preprocessing((0.5,) * 3, (0.5,) * 3, "squash", "bilinear"),
    Preprocessing((0.1, 0.2, 0.3), (0.9, 0.8, 0.7), "crop", "bilinear"),
    Preprocessing(),
]
PICTURES = Preprocessing((0.5, 0.4, 0.3), (0.5, 0.6, 0.7), "squash", "bilinear")


def pixels_of(preprocessing, image):
    pixels = eval_transform(image, SIDE, preprocessing)
    return normalize(pixels, mean=preprocessing.mean, std=preprocessing.std)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.resize}-{form.interpolation}")
def test_pixels_are_those_of_transformers(form):
    transformers = pytest.importorskip("transformers")
    config = make_preprocessor(reference.SMALL, form)
    side = {"height": SIDE, "width": SIDE}
    if form.resize == "crop":
        kind = transformers.CLIPImageProcessorPil
        config |= {"size": {"shortest_edge": SIDE}, "crop_size": side}
    else:
        kind, config["size"] = transformers.SiglipImageProcessorPil, side
    other = kind(**config)
    assert read_preprocessor(other.to_dict(), "preprocessor_config.json") == form
    for size in SIZES:
        if form.resize == "crop" and (SIDE * max(size) // min(size) - SIDE) % 4 == 3:
            continue  # transformers rounds the crop's offset differently
        image = make.noise(3, size, cell=3)
        expected = other(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        np.testing.assert_allclose(pixels_of(form, image), expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.resize}-{form.interpolation}")
def test_pixels_are_those_of_open_clip(form):
    transform = pytest.importorskip("open_clip.transform")
    config = {
        "mean": form.mean,
        "std": form.std,
        "interpolation": form.interpolation,
        "resize_mode": "squash" if form.resize == "squash" else "shortest",
    }
    assert read_preprocess_cfg(config, "open_clip_config.json") == form
    other = transform.image_transform(SIDE, is_train=False, **config)
    for size in SIZES:
        image = make.noise(4, size, cell=3)
        expected = other(image).numpy().transpose(1, 2, 0)
        np.testing.assert_allclose(pixels_of(form, image), expected, atol=1e-5)


def test_what_a_file_leaves_out_is_as_in_its_image_processor():
    siglip = read_preprocessor({"image_processor_type": "SiglipImageProcessor"}, "a")
    assert siglip == FORMS[0]
    assert read_preprocessor({"feature_extractor_type": "CLIPFeatureExtractor"}, "a") == FORMS[3]
    assert read_preprocess_cfg({}, "a") == FORMS[3]


@pytest.mark.parametrize(
    "config",
    [
        {"resample": 1},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"size": {"height": 224, "width": 336}},
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
        {"size": {"shortest_edge": 256}, "do_center_crop": False},
        {"size": {"longest_edge": 256}},
        {"image_std": [0.5, 0.5, 0.0]},
    ],
)
def test_other_steps_are_refused_by_the_name_of_the_file(config):
    with pytest.raises(ValueError, match=r"^some/preprocessor_config\.json: "):
        read_preprocessor(config, "some/preprocessor_config.json")


@pytest.fixture(scope="module")
def arch():
    config = make.tiny_config()
    return get_architecture(config.model.name, config.model.overrides.to_dict())


@pytest.fixture(scope="module")
def model(arch, tmp_path_factory):
    """A directory in transformers' layout whose images are squashed."""
    folder = tmp_path_factory.mktemp("weights") / "model"
    write_model(folder, "huggingface", make.drawn_model(arch, preprocessing=PICTURES), card="")
    assert json.loads((folder / "preprocessor_config.json").read_text())["resample"] == 2
    return folder


@pytest.mark.parametrize(
    ("format", "name"),
    [("huggingface", "preprocessor_config.json"), ("open_clip", "open_clip_config.json")],
)
def test_an_export_keeps_them_and_settings_of_another_model_next_to_it_are_refused(
    model, arch, format, name, tmp_path
):
    source = read_model(model)
    for folder, preprocessing in (("own", PICTURES), ("other", Preprocessing())):
        other = dataclasses.replace(source, preprocessing=preprocessing)
        write_model(tmp_path / folder, format, other, card="")
    assert read_model(tmp_path / "own").preprocessing == PICTURES
    shutil.copy(tmp_path / "other" / name, tmp_path / "own")
    with pytest.raises(ValueError, match=name):
        read_model(tmp_path / "own")
    (tmp_path / "own" / name).unlink()
    with pytest.raises(ValueError, match=name):
        read_model(tmp_path / "own")


def test_a_processor_of_transformers_keeps_them_in_one_file(model, arch, tmp_path):
    transformers = pytest.importorskip("transformers", "5")
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    own = transformers.SiglipImageProcessorPil(**make_preprocessor(arch, PICTURES))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    transformers.SiglipProcessor(own, tokenizer).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    assert read_model(folder).preprocessing == PICTURES
    assert "processor_config.json" in choose_files([path.name for path in folder.iterdir()])
