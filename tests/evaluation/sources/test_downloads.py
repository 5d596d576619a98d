"""The commands of docs/reference/evaluation_sets.md, on small archives with the published names.

Programs that fetch a file are replaced by one that copies it from a folder. Everything else runs
as written, but for our own command: its tasks are parsed, and its sources' entries are read.
"""

import json
import os
import pathlib
import random
import re
import shlex
import stat
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest

from diht_jax.evaluation.protocols.class_names import name_index, raw_label, resolve_label
from diht_jax.evaluation.sources.labels import VOC_CLASSES
from diht_jax.evaluation.task_parsing import open_source, parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from diht_jax.input.transforms import decode_rgb
from tests.make import HashedModel, encoded, plain, write_tar

_PAGE = pathlib.Path(__file__).parents[3] / "docs" / "reference" / "evaluation_sets.md"
_FETCH = 'for last; do :; done; cp "$DOWNLOADS/${last##*/}" .'
# Maps a program to its replacement.
_PROGRAMS = {
    "wget": _FETCH,
    "aws": 'cp "$DOWNLOADS/$(basename "$4")" .',
    "unrar": 'unzip -q "$2"',
    "git": 'cp -r "$DOWNLOADS/$(basename "$2")" .',
    "gdown": 'cp "$DOWNLOADS/$3" .',
    "python": f'exec "{sys.executable}" "$@"',
}


def _jpeg(value):
    return encoded(plain((value, 0, 0), (8, 8)), "JPEG")


def _zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _lines(*rows):
    return ("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)).encode()


def _clip(folder, frames):
    """Writes an .avi whose frames are red 0, 40, 80, ..."""
    cv2 = pytest.importorskip("cv2")
    path = str(folder / "clip.avi")
    video = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 25, (32, 32))
    for number in range(frames):
        video.write(np.full((32, 32, 3), (0, 0, 40 * number), np.uint8))
    video.release()
    return pathlib.Path(path).read_bytes()


def _ucf101(folder):
    clips = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01", "YoYo/v_YoYo_g07_c03"]
    # The folder and the clips of this class are spelt differently.
    clips.append("HandstandPushups/v_HandStandPushups_g01_c01")
    _zip(folder / "UCF101.rar", {f"UCF-101/{clip}.avi": _clip(folder, 5) for clip in clips})
    lists = {
        f"ucfTrainTestlist/testlist0{number}.txt": _lines(*(f"{clips[i]}.avi" for i in members))
        for number, members in ((1, (0, 1)), (2, (1, 2)), (3, (2,)))
    }
    _zip(folder / "UCF101TrainTestSplits-RecognitionTask.zip", lists)


def _voc2007(folder):
    root = "VOCdevkit/VOC2007"
    states = {"aeroplane": (1, -1), "dog": (0, 1), "tvmonitor": (-1, 0)}
    members = {f"{root}/JPEGImages/{name}.jpg": _jpeg(1) for name in ("000001", "000002")}
    for name in VOC_CLASSES:
        first, second = states.get(name, (-1, -1))
        text = f"000001 {first:2d}\n000002 {second:2d}\n"
        members[f"{root}/ImageSets/Main/{name}_test.txt"] = text.encode()
    write_tar(folder / "VOCtest_06-Nov-2007.tar", members)


def _open_images(folder):
    rows = [
        "ImageID,Source,LabelName,Confidence",
        "0001eeaf4aed83f9,verification,/m/0cmf2,1",
        "0001eeaf4aed83f9,verification,/m/01g317,0",
        "0004886b7d043cfd,crowdsource-verification,/m/01g317,1",
        "0004886b7d043cfd,verification,/m/not_boxable,1",
    ]
    name = "validation-annotations-human-imagelabels-boxable.csv"
    (folder / name).write_bytes(_lines(*rows))
    names = _lines("/m/011k07,Tortoise", "/m/01g317,Person", "/m/0cmf2,Airplane")
    (folder / "class-descriptions-boxable.csv").write_bytes(names)
    images = ("0001eeaf4aed83f9", "0004886b7d043cfd")
    pictures = {f"validation/{name}.jpg": _jpeg(1) for name in images}
    write_tar(folder / "validation.tar.gz", pictures, "w:gz")


def _flickr30k(folder):
    names = ("1007129816", "1009434119")
    pictures = {f"flickr30k-images/{name}.jpg": _jpeg(1) for name in names}
    write_tar(folder / "flickr30k-images.tar.gz", pictures, "w:gz")


def _objectnet(folder):
    mappings = {
        "folder_to_objectnet_label": {"air_freshener": "Air freshener", "tv": "TV", "axe": "Axe"},
        "objectnet_to_imagenet_1k": {"TV": "television, television system", "Axe": "hatchet"},
    }
    members = {f"mappings/{name}.json": json.dumps(m).encode() for name, m in mappings.items()}
    pictures = ("air_freshener/0a.png", "axe/1b.png", "tv/2c.png", "tv/3d.png")
    members |= {f"images/{name}": _jpeg(1) for name in pictures}
    _zip(folder / "objectnet-1.0.zip", {f"objectnet-1.0/{k}": v for k, v in members.items()})


# Replaces spaCy and NLTK: words are split at spaces, and each has its tag as a suffix.
_SPACY = """
class load:
    def __init__(self, name):
        assert name == "en_core_web_sm"
    def __call__(self, text):
        return [type("Token", (), dict(text=w, tag_=w.rpartition("_")[2])) for w in text.split()]
"""
_ORDER_CAPTION = "A_DT Red_JJ dog_NN sees_VBZ big_JJ cats_NNS, near_IN it_PRP!"


def _aro_order(folder):
    _flickr30k(folder)
    _zip(folder / "val2014.zip", {"val2014/COCO_val2014_000000391895.jpg": _jpeg(1)})
    pictures = {
        "coco_karpathy_test": "val2014/COCO_val2014_000000391895.jpg",
        "flickr30k_test": "flickr30k-images/1007129816.jpg",
    }
    for name, picture in pictures.items():
        rows = [{"image": picture, "caption": [_ORDER_CAPTION, "one_CD"]}]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "spacy.py").write_text(_SPACY)
    (folder / "nltk.py").write_text("word_tokenize = str.split\n")


# Maps a section's heading to the function that writes its archives.
_SECTIONS = {
    "ucf101": _ucf101,
    "voc2007": _voc2007,
    "open_images": _open_images,
    "objectnet": _objectnet,
    "aro_coco_order and aro_flickr30k_order": _aro_order,
}


def _run_section(heading, folder):
    """Runs a section's commands in a folder; returns the tasks of our own command."""
    downloads, programs = folder / "downloads", folder / "programs"
    downloads.mkdir()
    programs.mkdir()
    _SECTIONS[heading](downloads)
    # Files that are only sent on request are in the folder already, and so are packages.
    for name in ("flickr30k-images.tar.gz", "spacy.py", "nltk.py"):
        if (downloads / name).exists():
            (folder / name).write_bytes((downloads / name).read_bytes())
    for name, script in _PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash -e\n{script}\n")
        (programs / name).chmod(stat.S_IRWXU)
    text = _PAGE.read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    scripts = re.findall(r"saved as `(\w+\.py)`", text)
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    for name, block in zip(scripts, blocks, strict=True):
        (folder / name).write_text(block)
    (block,) = re.findall(r"(?:^ {4}.*\n)+", re.sub(r"(?ms)^```.*?^```", "", text), re.MULTILINE)
    lines = textwrap.dedent(block).replace("\\\n", " ").splitlines()
    own = [line for line in lines if line.startswith("python -m ")]
    others = [line for line in lines if line not in own]
    subprocess.run(
        ["bash", "-ec", "\n".join(others)],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "DOWNLOADS": str(downloads),
        },
        check=True,
        capture_output=True,
    )
    tasks = [shlex.split(re.search(r"--tasks (\S+)", line)[1])[0] for line in own]
    return parse_tasks([task for text in tasks for task in text.split(",")])


@pytest.fixture
def run_section(tmp_path, monkeypatch):
    """Returns a function that runs a section: its entries by task name, and its tasks."""
    pytest.importorskip("clip_benchmark")
    monkeypatch.chdir(tmp_path)

    def run(heading):
        tasks = {task.name: task for task in _run_section(heading, tmp_path)}
        for task in tasks.values():
            open_source(task)
        return tasks, {name: list(open_source(task).entries()) for name, task in tasks.items()}

    return run


def _label(task, pair):
    index = name_index(task.class_names)
    return task.class_names[resolve_label(raw_label(pair), task.class_names, index)]


def test_ucf101(run_section):
    tasks, entries = run_section("ucf101")
    (task,) = tasks.values()
    assert [_label(task, pair) for pair in entries["ucf101"]] == [
        *("Apply Eye Makeup", "Yo Yo", "Hand Stand Pushups")
    ]
    assert [pair.metadata["splits"] for pair in entries["ucf101"]] == [[1], [1, 2], [2, 3]]
    for pair in entries["ucf101"]:
        red = np.asarray(decode_rgb(pair.image))[..., 0].mean()
        assert red == pytest.approx(80, abs=4)  # the third of five frames
    result = evaluate_task(HashedModel(), task, batch_size=64)
    assert len(result["protocol"]["templates"]) == 48
    assert result["protocol"]["mean_over_splits"] == [1, 2, 3]
    counts = [result["counts"][f"images_of_split_{split}"] for split in (1, 2, 3)]
    assert (result["counts"]["images"], counts) == (3, [2, 2, 1])
    hits = {
        row["class"]: row["accuracy"] for row in result["per_class"] if row["accuracy"] is not None
    }
    eye, yo, hand = hits["Apply Eye Makeup"], hits["Yo Yo"], hits["Hand Stand Pushups"]
    expected = ((eye + yo) / 2 + (yo + hand) / 2 + hand) / 3
    assert result["metrics"]["top1"] == pytest.approx(expected)


def test_voc2007(run_section):
    tasks, entries = run_section("voc2007")
    assert tasks["voc2007"].options == {"interpolation": "11"}
    number = VOC_CLASSES.index
    assert [pair.metadata for pair in entries["voc2007"]] == [
        {"labels": [number("aeroplane")], "ignored_labels": [number("dog")]},
        {"labels": [number("dog")], "ignored_labels": [number("tvmonitor")]},
    ]


def test_open_images(run_section):
    tasks, entries = run_section("open_images")
    assert tasks["open_images"].class_names == ("Tortoise", "Person", "Airplane")
    assert [pair.metadata for pair in entries["open_images"]] == [
        {"labels": [2], "counted_labels": [2, 1]},
        {"labels": [1], "counted_labels": [1]},
    ]


def test_objectnet(run_section):
    tasks, entries = run_section("objectnet")
    assert tasks["objectnet"].class_names == ("axe", "tv")
    assert [(pair.key, pair.metadata["label"]) for pair in entries["objectnet"]] == [
        *(("axe/1b.png", 0), ("tv/2c.png", 1), ("tv/3d.png", 1))
    ]


def _cut(words):
    return [words[start : start + 3] for start in range(0, len(words), 3)]


def test_aro_orders(run_section):
    tasks, entries = run_section("aro_coco_order and aro_flickr30k_order")
    (pair,) = entries["aro_coco_order"]
    first, second = (question["captions"] for question in pair.metadata["questions"])
    assert first[0] == "a_dt red_jj dog_nn sees_vbz big_jj cats_nns, near_in it_prp"
    # As ARO's code draws: two generators, both seeded with 1, in this order.
    numpy_draws, draws = np.random.RandomState(1), random.Random(1)
    words = np.array(first[0].split(), object)
    expected = words.copy()
    for chosen in ([2, 5], [1, 4]):  # nouns, adjectives
        expected[chosen] = numpy_draws.permutation(expected[chosen])
    assert first[1].split() == expected.tolist()
    expected = words.copy()
    expected[[0, 3, 6, 7]] = numpy_draws.permutation(expected[[0, 3, 6, 7]])
    assert first[2].split() == expected.tolist()
    threes = _cut(words.tolist())
    for three in threes:
        draws.shuffle(three)
    assert first[3].split() == sum(threes, [])
    threes = _cut(words.tolist())
    draws.shuffle(threes)
    assert first[4].split() == sum(threes, [])
    assert second == ["one_cd"] * 5
    (pair,) = entries["aro_flickr30k_order"]
    assert pair.key == "flickr30k-images/1007129816.jpg" and len(pair.metadata["questions"]) == 2
    result = evaluate_task(HashedModel(), tasks["aro_coco_order"])
    assert result["metrics"]["accuracy"] >= 0.5  # a caption of one word is unchanged
