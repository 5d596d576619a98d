"""The synthetic web: bytes fixed by the seed, true captions, labelled noise, held-out sets."""

import collections
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from data_prep.example_data.packages import ExamplePair
from data_prep.synthetic import captions as synthetic_captions
from data_prep.synthetic import sampling, web
from data_prep.synthetic.scenes import COLORS, PAIR_RELATIONS, Scene
from data_prep.synthetic.shapes import SHAPES
from diht_jax.evaluation.protocols.base import parse_templates
from diht_jax.readers.registry import open_source
from diht_jax.storage.files import temporary_path
from tests import make

SMALL = web.Settings(num_pairs=50, seed=3, pairs_per_tar=20, num_retrieval=8, num_classification=24)

# The meaning of phrases: the relation, and whether the object named first is the subject.
PHRASES = {
    r"(sits|sitting|rests|resting) on an?|(stands|standing) on top of": ("on", True),
    r"(carries|carrying|supports|supporting|lifts|lifting)": ("on", False),
    r"(carried|supported|lifted) by": ("on", True),
    r"(hovering|floating) above|flying over": ("above", True),
    r"waiting below|(stands|standing) under": ("above", False),
    r"(stands|standing|rests|resting) next to|(sits|sitting) beside|waiting near": (
        "beside",
        None,
    ),
    r"(sits|sitting|rests|resting|hides|hiding) inside": ("inside", True),
    r"(encloses|enclosing)": ("inside", False),
    r"enclosed by": ("inside", True),
    r"(chasing|pursues|pursuing)|running after": ("chasing", True),
    r"fleeing from|running away from": ("chasing", False),
    r"(chased|pursued) by": ("chasing", False),
}


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[ExamplePair]]:
    """The first 400 pairs of the default settings, by noise kind."""
    found = collections.defaultdict(list)
    for index in range(400):
        pair = web.make_pair(web.Settings(), "train", index)
        found[pair.metadata["noise"]].append(pair)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """The folder of a small data set, written in this process."""
    output = tmp_path_factory.mktemp("web")
    web.write_dataset(SMALL, output, workers=1)
    return output


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- files -----------------------------------------------------------------------------------


def test_command_with_two_workers_writes_the_same_bytes(written, tmp_path):
    settings = {name: value for name, value in vars(SMALL).items() if name != "noise"}
    flags = settings | {"output": tmp_path, "workers": 2}
    result = make.run_command("data_prep.synthetic", *flags.items())
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(written)
    assert re.search(r"^clean +\d+", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("target", ["shape", "color"])
def test_labels_of_the_classification_sets(written, target):
    manifest = json.loads((written / web.MANIFEST_NAME).read_text())
    classes = manifest[f"{target}_classes"]
    labels = []
    for pair in open_source(str(written / f"val_{target}.tar")):
        (item,) = pair.metadata["scene"]["objects"]
        assert pair.metadata["class_name"] == item[target] == classes[pair.metadata["label"]]
        assert pair.metadata["class_name"] in pair.caption
        labels.append(pair.metadata["label"])
    counts = collections.Counter(labels)
    assert len(counts) == len(classes)
    assert max(counts.values()) - min(counts.values()) <= 1
    path = written / f"val_{target}.templates.txt"
    assert parse_templates(f"@{path}")[:2] == {
        "shape": ("a {}", "a picture of a {}"),
        "color": ("a {} shape", "a picture of a {} shape"),
    }[target]  # fmt: skip


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    settings = dataclasses.replace(SMALL, num_pairs=6, pairs_per_tar=3, num_classification=0)
    web.write_dataset(settings, tmp_path, workers=1)
    before = contents(tmp_path)
    kept = tmp_path / "train-00000.tar"
    time_of_kept = kept.stat().st_mtime_ns
    half = temporary_path(tmp_path / "train-00001.tar")
    (tmp_path / "train-00001.tar").rename(half)
    half.write_bytes(b"half a tar")
    web.write_dataset(settings, tmp_path, workers=1)
    assert contents(tmp_path) == before
    assert kept.stat().st_mtime_ns == time_of_kept


def test_directories_with_other_content_are_refused(written, tmp_path):
    with pytest.raises(ValueError, match=f"{written}.*other settings.*--output"):
        web.write_dataset(dataclasses.replace(SMALL, seed=9), written, workers=1)
    (tmp_path / "mine.tar").touch()
    with pytest.raises(ValueError, match=r"mine\.tar.*--output"):
        web.write_dataset(SMALL, tmp_path, workers=1)


# --- noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [web.DEFAULT_NOISE, {"mismatched": 1.0}])
def test_shares_of_the_kinds(noise):
    settings = web.Settings(noise=noise)
    total = 4000
    counts = collections.Counter(web.noise_kind(settings, i) for i in range(total))
    expected = dict(noise) | {"clean": 1.0 - sum(noise.values())}
    for kind in ("clean", *web.NOISE_KINDS):
        share = expected.get(kind, 0.0)
        # Four standard deviations of a binomial proportion.
        assert abs(counts[kind] / total - share) <= 4 * np.sqrt(share * (1 - share) / total) + 1e-9


def test_clean_captions_name_what_is_in_the_picture(pairs):
    named = []
    for pair in pairs["clean"]:
        items, words = pair.metadata["scene"]["objects"], re.findall("[a-z]+", pair.caption.lower())
        colors = {shape: [o["color"] for o in items if o["shape"] == shape] for shape in SHAPES}
        shown = [n for n, word in enumerate(words) if word in SHAPES]
        assert sorted(words[n] for n in shown) == sorted(o["shape"] for o in items)
        for n in shown:
            named.append(words[n - 1] in COLORS)
            assert not named[-1] or words[n - 1] in colors[words[n]]
    # Three quarters name the colour, within four standard deviations.
    assert abs(np.mean(named) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(named))


def test_mismatched_captions_name_nothing_that_is_in_the_picture(pairs):
    assert pairs["mismatched"]
    for pair in pairs["mismatched"]:
        words = set(re.findall("[a-z]+", pair.caption.lower()))
        assert not words & {item["shape"] for item in pair.metadata["scene"]["objects"]}
        assert words >= {item["shape"] for item in pair.metadata["caption_scene"]["objects"]}


# --- captions --------------------------------------------------------------------------------


def test_captions_give_the_relation_from_the_right_side():
    relations = {relation for relation, _ in PHRASES.values()}
    rng = np.random.default_rng(11)
    seen = collections.Counter()
    for _ in range(1500):
        scene = sampling.sample_scene(rng)
        caption = synthetic_captions.describe_scene(rng, scene).lower()
        if scene.relation not in relations:
            continue
        matches = [p for p in PHRASES if re.search(rf"\b({p})\b", caption)]
        assert len(matches) == 1, (caption, matches)
        relation, subject_first = PHRASES[matches[0]]
        assert relation == scene.relation, caption
        seen[matches[0]] += 1
        # Objects of one shape differ in colour, which the caption may omit.
        if len({o.shape for o in scene.objects}) == 2 and subject_first is not None:
            positions = [re.search(rf"\b{o.shape}\b", caption).start() for o in scene.objects]
            assert (positions[0] < positions[1]) == subject_first, caption
    assert set(seen) == set(PHRASES)


def _signature(scene: Scene) -> tuple[str, ...]:
    return sampling.signature(scene.relation, tuple((o.shape, o.color) for o in scene.objects))


def test_retrieval_captions_are_unique_and_their_scenes_held_out():
    settings = web.Settings()
    rng = np.random.default_rng(0)
    scenes = [sampling.sample_held_out(rng, settings.seed, i) for i in range(600)]
    captions = [synthetic_captions.describe_scene(rng, scene, complete=True) for scene in scenes]
    assert len(set(captions)) == len(captions)
    names = {_signature(s) for s in scenes}
    assert len(names) == len(scenes)
    assert {s.relation for s in scenes} == set(PAIR_RELATIONS)
    trained = [sampling.sample_scene(rng) for _ in range(3000)]
    trained_names = {_signature(s) for s in trained}
    assert not trained_names & names
    assert {s.relation for s in trained} > set(PAIR_RELATIONS)
    assert {o.shape for s in trained for o in s.objects} == set(SHAPES)
    assert {o.color for s in trained for o in s.objects} == set(COLORS)
