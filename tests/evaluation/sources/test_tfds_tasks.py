"""Names of classes as TFDS has them."""

import pytest

from diht_jax.evaluation.task_parsing import parse_tasks

tfds = pytest.importorskip("tensorflow_datasets")


def _label_names(name, tmp_path):
    return tfds.builder(name, data_dir=tmp_path).info.features["label"].names


# What clip-benchmark calls otherwise than TFDS; each line is one class.
_RENAMED = {
    "caltech101": {
        "airplanes": "airplane",
        "background_google": "background",
        "car_side": "side of a car",
        "cougar_body": "body of a cougar cat",
        "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a  crocodile",
        "faces": "off-center face",
        "faces_easy": "centered face",
        "flamingo_head": "head of a flamingo",
        "leopards": "leopard",
        "motorbikes": "motorbike",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": "yin and yang symbol",
    },
    "flowers102": {
        "globe-flower": "globe flower",
        "pink-yellow dahlia?": "pink and yellow dahlia",
        "ball moss": "air plant",
    },
    "oxford_pets": {},
}


@pytest.mark.parametrize(
    ("task", "builder"),
    [
        ("caltech101", "caltech101"),
        ("flowers102", "oxford_flowers102"),
        ("oxford_pets", "oxford_iiit_pet"),
    ],
)
def test_names_of_clip_benchmark_have_the_order_of_tfds(task, builder, tmp_path):
    pytest.importorskip("clip_benchmark")
    names = _label_names(builder, tmp_path)
    expected = [_RENAMED[task].get(name, name.replace("_", " ")) for name in names]
    found = [name.casefold() for name in parse_tasks(task)[0].class_names]
    assert found == [name.casefold() for name in expected]
    # Another source numbers its labels as it likes.
    assert parse_tasks(f"{task}=/data/folder")[0].class_names is None
