"""The 29 zero-shot numbers of DiHT by name, and the names of classes as TFDS has them."""

import pytest

from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.suite import NO_SOURCE, SUITE
from diht_jax.evaluation.task_parsing import parse_tasks


def test_seventeen_ten_and_two():
    def numbers(*kinds):
        return sum(entry.numbers for entry in SUITE.values() if entry.kind in kinds)

    assert numbers("classification", "multilabel", "binary") == 17
    assert numbers("retrieval", "winoground") == 10
    assert numbers("entailment", "vqa") == 2
    assert numbers(*PROTOCOLS) == 29


def test_every_task_with_a_source_can_be_named():
    pytest.importorskip("clip_benchmark")
    for name, entry in SUITE.items():
        if entry.source != NO_SOURCE:
            (task,) = parse_tasks([name])
            assert (task.name, task.kind, task.source) == (name, entry.kind, entry.source)
    assert len(parse_tasks("dtd")[0].templates) == 8
    assert len(parse_tasks("country211=/data/x")[0].class_names) == 211


def test_options_of_a_task_by_name(tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"testlist0{number}.txt").write_text("YoYo/v_YoYo_g01_c01.avi\n")
    source = f"ucf101=list:{tmp_path}/testlist{{:02}}.txt"
    assert parse_tasks([source])[0].source_options == {"splits": "1,2,3"}
    assert parse_tasks([f"{source}?splits=1"])[0].source_options == {"splits": "1"}
    # As a comma-separated flag cuts it apart.
    (first, second) = parse_tasks([f"{source}?splits=1", "3", "voc2007=voc:/data"])
    assert first.source_options == {"splits": "1,3"}
    assert second.options == {"interpolation": "11"} and len(second.class_names) == 20
    (second,) = parse_tasks("voc2007=voc:/data?interpolation=all")
    assert second.options == {"interpolation": "all"}
    with pytest.raises(ValueError, match="splits=0: expected numbers, such as 1 or 1,2,3"):
        parse_tasks([f"{source}?splits=0"])


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
    zip(_RENAMED, ("caltech101", "oxford_flowers102", "oxford_iiit_pet"), strict=True),
)
def test_names_of_clip_benchmark_have_the_order_of_tfds(task, builder, tmp_path):
    pytest.importorskip("clip_benchmark")
    tfds = pytest.importorskip("tensorflow_datasets")
    names = tfds.builder(builder, data_dir=tmp_path).info.features["label"].names
    expected = [_RENAMED[task].get(name, name.replace("_", " ")) for name in names]
    found = [name.casefold() for name in parse_tasks(task)[0].class_names]
    assert found == [name.casefold() for name in expected]
    # Another source numbers its labels as it likes.
    assert parse_tasks(f"{task}=/data/folder")[0].class_names is None
