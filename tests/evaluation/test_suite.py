"""Named tasks: DiHT's 29 numbers, DataComp's and CLIP_benchmark's, and classes of TFDS."""

import numpy as np
import pytest

from diht_jax.evaluation.protocols.matching import cue_prompt, jaccard_index
from diht_jax.evaluation.protocols.registry import PROTOCOLS
from diht_jax.evaluation.results import suite_means
from diht_jax.evaluation.suite import (
    DATACOMP,
    DATACOMP_MEANS,
    NO_SOURCE,
    SUITE,
    TASKS_BY_NAME,
    datacomp_folder,
    main_metrics,
)
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from tests import make


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
    # Split as a comma-separated flag splits it.
    (first, second) = parse_tasks([f"{source}?splits=1", "3", "voc2007=voc:/data"])
    assert first.source_options == {"splits": "1,3"}
    assert second.options == {"interpolation": "11"} and len(second.class_names) == 20
    (second,) = parse_tasks("voc2007=voc:/data?interpolation=all")
    assert second.options == {"interpolation": "all"}
    with pytest.raises(ValueError, match="splits=0: expected numbers, such as 1 or 1,2,3"):
        parse_tasks([f"{source}?splits=0"])


# Names that differ between clip-benchmark and TFDS; each line is one class.
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
    # Another source may number its labels differently.
    assert parse_tasks(f"{task}=/data/folder")[0].class_names is None


# The keys of DataComp's tasklist.yml (github.com/mlfoundations/datacomp, 4afedc4) with its
# `main_metric`, which is acc1 where it gives none; FairFace and UTKFace, which follow, have none.
_MAIN_METRICS = {
    "top1": """
        cifar10 vtab/cifar100 vtab/clevr_count_all vtab/clevr_closest_object_distance country211
        vtab/dtd vtab/eurosat food101 gtsrb imagenet1k imagenet_sketch imagenetv2 imagenet-a
        imagenet-o imagenet-r vtab/kitti_closest_vehicle_distance mnist objectnet voc2007 vtab/pcam
        renderedsst2 vtab/resisc45 cars stl10 sun397 vtab/svhn wilds/camelyon17
    """,
    "mean_per_class": "vtab/caltech101 fgvc_aircraft vtab/flowers vtab/pets",
    "t2i_r1 i2t_r1": """
        retrieval/flickr_1k_test_image_text_retrieval
        retrieval/mscoco_2014_5k_test_image_text_retrieval
    """,
    "jaccard_10_12": "misc/winogavil",
    "f1_macro": "wilds/iwildcam",
    "worst_group": "wilds/fmow fairness/geode",
    "worst_group_top5": "fairness/dollar_street",
}


def test_the_38_names_of_datacomp():
    expected = {name: m.split() for m, names in _MAIN_METRICS.items() for name in names.split()}
    assert set(expected) == set(DATACOMP) and len(set(DATACOMP.values())) == 38
    for theirs, ours in DATACOMP.items():
        assert list(main_metrics(ours)) == expected[theirs]
        assert set(main_metrics(ours)) <= set(PROTOCOLS[TASKS_BY_NAME[ours].kind].metrics)
    folders = [datacomp_folder(name) for name in ("fairness/geode", "wilds/fmow", "misc/winogavil")]
    assert folders == ["wds_geode_test", "wds_wilds-fmow_test", "winogavil"]


_WORDS = {
    "classnames.txt": "ant\nbee\nelk\n",
    "zeroshot_classification_templates.txt": "satellite photo of {c}.\n",
}


def test_a_folder_of_datacomp(tmp_path, photos, caplog):
    labels, regions = [0, 1, 2, 1, 0], [0, 3, 3, 0, 1]
    entries = [
        {"png": photo, "cls": str(label).encode(), "npy": make.npy([region, 14, label])}
        for photo, label, region in zip(photos, labels, regions, strict=True)
    ]
    make.write_benchmark_folder(tmp_path / "wds_wilds-fmow_test", entries, _WORDS)
    # An npy of another kind, such as features, does not affect a task without groups.
    entries = [{"png": photos[i], "cls": b"2", "npy": make.npy([[1, 2], [3, 4]])} for i in (0, 1)]
    make.write_benchmark_folder(tmp_path / "wds_imagenet-r_test", entries, _WORDS)
    entries = [{"png": photos[i], "txt": f"photo {i}\nno {i}".encode()} for i in range(5)]
    files = {"dataset_type.txt": "retrieval\n", "classnames.txt": ""}
    make.write_benchmark_folder(tmp_path / "wds_mscoco_captions", entries, files)
    tasks = {task.name: task for task in parse_tasks([f"datacomp:{tmp_path}"])}
    assert list(tasks) == ["coco_retrieval", "imagenet_r", "fmow"]
    assert "35 folders are missing" in caplog.text and "wds_geode_test" in caplog.text
    # Not ImageNet's 1,000 names: the labels of a folder index its own classes.
    assert tasks["imagenet_r"].class_names == ("ant", "bee", "elk")
    assert tasks["imagenet_r"].templates == ("satellite photo of {}.",)
    assert tasks["coco_retrieval"].caption_template == "{caption}"

    results = [evaluate_task(make.HashedModel(), task, batch_size=8) for task in tasks.values()]
    fmow = results[2]
    assert fmow["reported"] == ["worst_group", "top1", "mean_per_class"]
    groups = {row["group"]: row for row in fmow["per_group"]}
    assert {group: row["images"] for group, row in groups.items()} == {0: 2, 1: 1, 3: 2}
    assert fmow["metrics"]["worst_group"] == min(row["top1"] for row in groups.values())
    total = sum(row["top1"] * row["images"] for row in groups.values())
    assert total / 5 == pytest.approx(fmow["metrics"]["top1"])

    by_task = {result["task"]: result for result in results}
    means = {mean.name: (mean.values, mean.missing) for mean in suite_means([by_task])}
    retrieval = results[0]["metrics"]
    assert means["DataComp: mean of 3 retrieval"] == (
        [pytest.approx((retrieval["t2i_r1"] + retrieval["i2t_r1"]) / 2)],
        "2 missing",
    )
    assert means["DataComp: mean of all 38"][1] == "35 missing"
    assert means["DataComp: mean of 6 ImageNet shifts"][1] == "5 missing"
    # Without any task that only DataComp has, DataComp's means are left out.
    del by_task["fmow"]
    assert not any("DataComp" in mean.name for mean in suite_means([by_task]))

    with pytest.raises(ValueError, match="none of DataComp's folders is in '/none', such as wds_c"):
        parse_tasks(["datacomp:/none"])


def test_means_of_datacomp_are_over_its_groups():
    assert [len(group) for group in DATACOMP_MEANS.values()] == [6, 13, 3, 38]
    vtab = {task for task, _ in DATACOMP_MEANS["DataComp: mean of 13 VTAB"]}
    assert {"sun397", "caltech101", "svhn"} <= vtab and "cifar10" not in vtab

    def means(source):
        sun = {"kind": "classification", "metrics": {"top1": 0.5}, "source": source}
        return {mean.name: mean.values for mean in suite_means([{"sun397": sun, "fmow": {}}])}

    # A different split than DataComp's: 19,850 of its 108,754 images.
    assert "DataComp: mean of all 38" not in means("tfds:sun397/standard-part1-120k:test")
    assert means("clip_benchmark:wds_sun397_test")["DataComp: mean of all 38"] == [0.5]


def test_the_jaccard_index():
    rng = np.random.default_rng(0)
    for size in (5, 6, 10, 12):
        similarities = rng.normal(size=size)
        right = set(rng.choice(size, 3, replace=False).tolist())
        chosen = set(sorted(range(size), key=lambda i: similarities[i])[-3:])
        is_association = np.isin(np.arange(size), list(right))
        expected = len(right & chosen) / len(right | chosen)
        assert jaccard_index(similarities, is_association) == pytest.approx(expected)
    # Among equal similarities the wrong candidates rank first.
    assert jaccard_index(np.ones(5), np.array([True, True, False, False, True])) == 1 / 5
    assert (cue_prompt("Oven"), cue_prompt("hubble")) == ("An oven", "A hubble")


def test_winogavil_from_its_csv(tmp_path, photos):
    (tmp_path / "winogavil_images").mkdir()
    names = ["eagle", "teepee", "ash", "tea party", "metal"]
    for name, data in zip(names[:4], photos, strict=False):
        (tmp_path / "winogavil_images" / f"{name}.jpg").write_bytes(data)
    quoted = [f'""{name}""' for name in names]
    rows = [
        f'0,"[{", ".join(quoted[:4])}]",bald,"[{quoted[0]}, {quoted[2]}]",0,2,4,1.0,0.0,0',
        f'1,"[{", ".join(quoted[1:4])}]",old,"[{quoted[3]}]",67,1,3,1.0,0.0,1',
        f'2,"[{", ".join(quoted)}]",plush,"[{quoted[4]}]",67,1,5,1.0,0.0,2',
    ]
    header = ",candidates,cue,associations,score_fool_the_ai,num_associations,num_candidates,"
    file = tmp_path / "winogavil_dataset.csv"
    file.write_text(f"{header}solvers_jaccard_mean,solvers_jaccard_std,ID\n" + "\n".join(rows))
    (task,) = parse_tasks([f"winogavil={file}"])
    assert task.source == f"winogavil:{file}"
    result = evaluate_task(make.HashedModel(), task, batch_size=8)
    # The last game lacks the image of "metal".
    assert result["counts"]["games"] == 2 and result["counts"]["incomplete_games"] == 1
    assert result["counts"]["images"] == 4 and result["counts"]["dropped"] == {"no_image": 1}
    assert set(result["metrics"]) == {"jaccard", "jaccard_5_6"}
    file.write_text(f'{header}\n0,"[{quoted[0]}, {quoted[1]}]",bald,"[{quoted[2]}]"')
    with pytest.raises(ValueError, match="row 0: expected a cue, and associations that are some"):
        evaluate_task(make.HashedModel(), task)
    file.write_text(f"{header}\n0,eagle,bald,eagle")
    with pytest.raises(ValueError, match="row 0: expected a JSON list of images as 'candidates'"):
        evaluate_task(make.HashedModel(), task)
