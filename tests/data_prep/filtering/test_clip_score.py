"""CLIP scores: those of the model, limits by value and by quantile, and their replay."""

import importlib.resources
import json

import jax
import numpy as np
import pytest

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from data_prep.filtering import replay
from data_prep.reports.__main__ import merge_reports
from data_prep.steps import models, scores
from diht_jax import load_model
from tests import make
from tests.data_prep.filtering.jobs import (
    job_config,
    read_dropped,
    read_records,
    read_scores,
    write_clip,
)

_CAPTIONS = [
    "a dog",
    "two cats",
    "the sea at night",
    "red",
    "a man rides",
    "snow",
    "x",
    "a tall tree",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("weights") / "a.safetensors", image_size=16)


@pytest.fixture(scope="module")
def pictures():
    return [make.noise(number) for number in range(len(_CAPTIONS))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make.write_pair_tar(tmp_path_factory.mktemp("pairs") / "pairs.tar", _CAPTIONS)


@pytest.fixture(scope="module")
def scored(source, weights, tmp_path_factory):
    output = tmp_path_factory.mktemp("scored") / "out"
    assert run_filter(job_config(source, output, clip__model=weights, clip__batch_size=3)) == {}
    return output


@pytest.fixture(scope="module")
def expected(weights, pictures):
    """Of one pair at a time, on one device, in float64."""
    model = load_model(weights, batch_size=1, devices=jax.devices()[:1])
    pairs = zip(pictures, _CAPTIONS, strict=True)
    embedded = [(model.encode_image(p), model.encode_text(c)) for p, c in pairs]
    return [float(np.dot(i[0].astype(np.float64), t[0].astype(np.float64))) for i, t in embedded]


def test_scores_are_those_of_the_model_and_all_are_kept(scored, expected):
    np.testing.assert_allclose(read_scores(scored, scores.SCORE), expected, atol=1e-5)
    assert len(read_records(scored)) == len(_CAPTIONS)


def test_the_report_shows_the_pairs_of_the_lowest_and_of_the_highest_scores(scored, expected):
    found = read_report(scored)["scored"][scores.SCORE]
    order = [f"{number:05d}" for number in np.argsort(expected)]
    assert [sample["key"] for sample in found["lowest"]] == order
    assert [sample["key"] for sample in found["highest"]] == order[::-1]
    shown = [sample["scores"][scores.SCORE] for sample in found["lowest"]]
    np.testing.assert_allclose(shown, sorted(expected), atol=1e-4)
    assert {sample["became"] for sample in found["lowest"]} == {"kept"}


def test_the_histogram_of_scores_counts_every_pair_in_its_bin(scored, expected):
    found = read_report(scored)["measures"]["histograms"][scores.SCORE]
    hundredths = np.floor(np.array(expected) * 100) / 100
    starts, counts = np.unique(hundredths, return_counts=True)
    assert found["dropped"] == {}
    assert {float(start): pairs for start, pairs in found["kept"].items()} == dict(
        zip(starts.tolist(), counts.tolist(), strict=True)
    )


def test_a_quantile_of_recorded_scores_is_a_limit(scored, source, weights, expected, tmp_path):
    config = job_config(
        source, tmp_path / "out", clip__model=weights, clip__quantile=0.4,
        clip__scores=str(scored), clip__batch_size=3,
    )  # fmt: skip
    assert run_filter(config) == {}
    lowest = sorted(range(len(expected)), key=expected.__getitem__)
    dropped = {_CAPTIONS[i] for i in lowest[:3]}  # 3 of 8 are less than 40%
    kept = [record.caption for record in read_records(tmp_path / "out")]
    assert kept == [caption for caption in _CAPTIONS if caption not in dropped]
    assert read_dropped(tmp_path / "out") == {"clip": {"low_score": 3}}
    assert config.clip.min_score == pytest.approx(expected[lowest[3]], abs=1e-5)
    samples = read_report(tmp_path / "out")["samples"]
    assert sum("evidence" in s and s["evidence"].startswith("CLIP score ") for s in samples) == 3
    # The replay of the recorded scores decides the same, without the model.
    again = replay.Replay(str(scored), config).run()
    assert (again.funnel.kept, again.not_known.total()) == (5, 0)
    assert again.funnel.dropped()["clip"] == {"low_score": 3}
    config.clip.model = "another"
    assert replay.Replay(str(scored), config).run().not_known.total() == 8


def test_of_several_captions_the_good_ones_stay(weights, tmp_path, pictures):
    model = load_model(weights, batch_size=3)
    image_emb = model.encode_image([pictures[0]] * 8)[:1]
    cosines = (image_emb @ model.encode_text(_CAPTIONS).T)[0]
    limit = float(np.median(cosines))
    members = make.pair_members("k", _CAPTIONS[0], make.encoded(pictures[0]))
    members["k.json"] = json.dumps({"captions": _CAPTIONS}).encode()
    source = make.write_tar(tmp_path / "pairs.tar", members)
    config = job_config(source, tmp_path / "out", clip__model=weights, clip__min_score=limit)
    assert run_filter(config) == {}
    (record,) = read_records(tmp_path / "out")
    good = [text for text, cosine in zip(_CAPTIONS, cosines, strict=True) if cosine >= limit]
    assert (record.caption, record.metadata["captions"]) == (good[0], good)


def test_a_model_that_nobody_knows_is_refused_by_its_key():
    with pytest.raises(ValueError, match=r"^config\.clip\.model='clipart_tny': .*clipart_tiny"):
        models.fingerprint("clipart_tny", "config.clip.model")


def test_parts_without_scores_join_those_with(scored, source, tmp_path):
    assert run_filter(job_config(source, tmp_path / "out")) == {}
    report = merge_reports([tmp_path / "out", scored])
    counted = report["measures"]["histograms"]
    assert sum(counted[scores.SCORE]["kept"].values()) == len(_CAPTIONS)
    assert sum(counted["caption_words"]["kept"].values()) == 2 * len(_CAPTIONS)


def test_the_model_that_comes_with_the_package_is_known_by_its_file(tmp_path):
    packaged = importlib.resources.files("diht_jax.data") / "clipart_tiny" / "model.safetensors"
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(packaged.read_bytes())
    assert models.fingerprint("clipart_tiny", "x") == models.fingerprint(str(copy), "x")


@pytest.mark.parametrize("name", ["diht_vitb32_224px", "hf-hub:owner/name", "s3://bucket/run"])
def test_models_that_are_fetched_later_are_known_by_their_names(name):
    assert models.fingerprint(name, "x") == name
