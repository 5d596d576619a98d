"""Scores of CLIP and of linear heads: values, limits, quantiles and replays."""

import collections
import importlib.resources
import json
import os
import pickle
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_prep.decisions.report import read_report
from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.filtering import replay
from data_prep.reports.__main__ import merge_reports
from data_prep.steps import models, registry, scores
from data_prep.steps.base import IMAGE_ERROR, Candidate
from data_prep.steps.scores import read_head
from diht_jax import load_model
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from tests import make
from tests.data_prep.filtering.jobs import (
    job_config,
    read_dropped,
    read_outcomes,
    read_records,
    read_scores,
    write_clip,
)

WIDTH = 24  # dimension of the embeddings
_BIAS = -20.0  # of the linear head: puts all scores below the first bin of the histograms
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
def head(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.npz"
    rng = np.random.default_rng(0)
    np.savez(path, weight=rng.standard_normal((1, WIDTH)), bias=np.array([_BIAS]))
    return str(path)


def _settings(name, **keys):
    return {f"{name}__{key}": value for key, value in keys.items()}


@pytest.fixture(scope="module")
def scored(source, weights, head, tmp_path_factory):
    """The output of a filter that records the scores of CLIP and of two heads."""
    output = tmp_path_factory.mktemp("scored") / "out"
    model = {"model": weights, "batch_size": 3}
    changes = _settings("clip", **model)
    for name in ("aesthetic", "unsafe"):
        changes |= _settings(name, head=head, **model)
    assert run_filter(job_config(source, output, **changes)) == {}
    return output


@pytest.fixture(scope="module")
def embedded(weights, pictures):
    """Float64 embeddings of pictures and captions, computed one at a time on one device."""
    model = load_model(weights, batch_size=1, devices=jax.devices()[:1])
    images, texts = map(model.encode_image, pictures), map(model.encode_text, _CAPTIONS)
    return [np.concatenate(list(rows)).astype(np.float64) for rows in (images, texts)]


@pytest.fixture(scope="module")
def expected(embedded):
    """The expected score of each pair."""
    images, texts = embedded
    return (images * texts).sum(axis=1).tolist()


def test_scores_are_those_of_the_model_and_all_are_kept(scored, expected):
    np.testing.assert_allclose(read_scores(scored, scores.SCORE), expected, atol=1e-5)
    assert len(read_records(scored)) == len(_CAPTIONS)


def test_pictures_are_scored_up_to_the_limit_of_the_filter(weights):
    config = job_config("a.tar", "out", clip__model=weights, image__max_pixels=100)
    step = scores.ClipStep(config, SourceShard("webdataset", "a.tar"))
    measured = step.measure([Candidate.of(Pair("k", make.png(), "a dog"))])
    assert measured[IMAGE_ERROR] == ["too_large"]


def test_the_report_shows_the_pairs_of_the_lowest_and_of_the_highest_scores(scored, expected):
    found = read_report(scored)["scored"][scores.SCORE]
    order = [f"{number:05d}" for number in np.argsort(expected)]
    assert [sample["key"] for sample in found["lowest"]] == order
    assert [sample["key"] for sample in found["highest"]] == order[::-1]
    shown = [sample["scores"][scores.SCORE] for sample in found["lowest"]]
    np.testing.assert_allclose(shown, sorted(expected), atol=1e-4)
    assert {sample["became"] for sample in found["lowest"]} == {"kept"}


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
    # The replay of the recorded scores gives the same decisions, without the model.
    again = replay.Replay(str(scored), config).run()
    assert (again.funnel.kept, again.not_known.total()) == (5, 0)
    assert again.funnel.dropped()["clip"] == {"low_score": 3}
    config.clip.model = "another"
    assert replay.Replay(str(scored), config).run().not_known.total() == 8


def test_of_several_captions_the_good_ones_stay(weights, tmp_path, pictures, embedded):
    images, texts = embedded
    cosines = texts @ images[0]
    limit = float(np.median(cosines))
    members = make.pair_members("k", _CAPTIONS[0], make.encoded(pictures[0]))
    members["k.json"] = json.dumps({"captions": _CAPTIONS}).encode()
    source = make.write_tar(tmp_path / "pairs.tar", members)
    keys = {"clip__model": weights, "clip__min_score": limit, "clip__batch_size": 3}
    config = job_config(source, tmp_path / "out", **keys)
    assert run_filter(config) == {}
    (record,) = read_records(tmp_path / "out")
    good = [text for text, cosine in zip(_CAPTIONS, cosines, strict=True) if cosine >= limit]
    assert (record.caption, record.metadata["captions"]) == (good[0], good)


def test_parts_without_scores_join_those_with(scored, source, tmp_path):
    assert run_filter(job_config(source, tmp_path / "out")) == {}
    report = merge_reports([tmp_path / "out", scored])
    counted = report["measures"]["histograms"]
    assert sum(counted[scores.SCORE]["kept"].values()) == len(_CAPTIONS)
    assert sum(counted["caption_words"]["kept"].values()) == 2 * len(_CAPTIONS)


def test_models_are_known_by_their_file_or_by_the_name_under_which_they_are_fetched(tmp_path):
    packaged = importlib.resources.files("diht_jax.data") / "clipart_tiny" / "model.safetensors"
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(packaged.read_bytes())
    assert models.fingerprint("clipart_tiny", "x") == models.fingerprint(str(copy), "x")
    for name in ("diht_vitb32_224px", "hf-hub:owner/name", "s3://bucket/run"):
        assert models.fingerprint(name, "x") == name
    with pytest.raises(ValueError, match=r"^config\.clip\.model='clipart_tny': .*clipart_tiny"):
        models.fingerprint("clipart_tny", "config.clip.model")


def _identify(folder):
    models.fingerprint.cache_clear()
    return models.fingerprint(str(folder), "x")


def test_a_run_is_known_by_what_it_has_learnt(tmp_path):
    """Ignores logs, file times and later starts that find the run finished."""
    run = make.write_run(tmp_path / "run", make.tiny_config())
    known = _identify(run)
    copy = shutil.copytree(run, tmp_path / "copy", copy_function=shutil.copyfile)
    (copy / "curves.png").write_bytes(b"drawn again")
    assert _identify(copy) == known
    assert _identify(make.write_run(tmp_path / "other", make.tiny_config(), seed=1)) != known


def test_a_folder_of_weights_is_known_by_its_bytes(tmp_path):
    write_clip(tmp_path / "model.safetensors", image_size=16)
    known = _identify(tmp_path)
    os.utime(tmp_path / "model.safetensors", (0, 0))
    assert _identify(tmp_path) == known
    (tmp_path / "config.json").write_text("{}")
    assert _identify(tmp_path) != known


@pytest.fixture(scope="module")
def head_scores(embedded, head):
    """The linear head applied to the embedding of each picture, in float64."""
    rows, found = embedded[0], np.load(head)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ found["weight"][0] + _BIAS


def test_scores_are_those_of_the_layer_and_all_are_kept(scored, head_scores):
    histograms = read_report(scored)["measures"]["histograms"]
    for name, first_bin in (("aesthetic_score", "-2.0"), ("unsafe_score", "-10.0")):
        np.testing.assert_allclose(read_scores(scored, name), head_scores, atol=1e-5)
        assert histograms[name]["kept"] == {first_bin: len(_CAPTIONS)}
    assert len(read_records(scored)) == len(_CAPTIONS)


def test_stored_embeddings_give_the_same_scores(source, weights, head, head_scores, tmp_path):
    embedded, options = str(tmp_path / "embedded"), EmbedOptions(modalities=("image",))
    embed_source(load_model(weights, batch_size=3), str(source), embedded, options)
    keys = _settings("aesthetic", head=head, embeddings=embedded)
    assert run_filter(job_config(source, tmp_path / "out", **keys)) == {}
    found = read_scores(tmp_path / "out", "aesthetic_score")
    np.testing.assert_allclose(found, head_scores, atol=1e-5)


def test_each_limit_drops_its_side_in_a_run_and_in_a_replay(
    scored, source, weights, head, head_scores, tmp_path
):
    order = np.sort(head_scores)
    low, high = float(order[1:3].mean()), float(order[4:6].mean())
    keys = {"head": head, "model": weights, "batch_size": 3}
    both = _settings("aesthetic", limit=low, **keys) | _settings("unsafe", limit=high, **keys)
    config = job_config(source, tmp_path / "out", **both)
    assert run_filter(config) == {}
    assert [(stage, reason) for _, stage, reason in read_outcomes(tmp_path / "out")] == [
        ("aesthetic", "low_score")
        if score < low
        else ("unsafe", "high_score")
        if score > high
        else ("kept", None)
        for score in head_scores
    ]
    again = replay.Replay(str(scored), config).run()
    dropped = again.funnel.dropped()
    assert (dropped["aesthetic"], dropped["unsafe"]) == ({"low_score": 2}, {"high_score": 3})
    assert (again.funnel.kept, again.not_known.total()) == (3, 0)


@pytest.mark.parametrize("name, share", [("aesthetic", 0.25), ("unsafe", 0.75)])
def test_a_quantile_is_that_of_the_scores(scored, source, weights, head, head_scores, name, share):
    keys = _settings(name, head=head, model=weights, quantile=0.25, scores=str(scored))
    config = job_config(source, "none", **keys)
    filter_config.set_quantile_limit(config)
    limit = np.quantile(head_scores, share, method="inverted_cdf")
    assert config[name].limit == pytest.approx(limit, abs=1e-5)
    # The filter decides by the values that it records, like a replay.
    step = registry.STEPS[name](config, SourceShard("webdataset", "a.tar"))
    batch = [Candidate.of(Pair("k", make.png(number), "a dog")) for number in range(8)]
    found = step.measure(batch)[step.score_name()]
    assert found == np.float32(found).tolist()


def test_scores_of_another_head_are_refused(scored, source, weights, tmp_path):
    np.savez(tmp_path / "other.npz", weight=np.ones(WIDTH))
    keys = {"head": str(tmp_path / "other.npz"), "model": weights}
    keys = _settings("aesthetic", **keys, quantile=0.25, scores=str(scored))
    config = job_config(source, "none", **keys)
    with pytest.raises(ValueError, match=r"config\.aesthetic\.scores=.*another head"):
        filter_config.set_quantile_limit(config)


def test_every_published_format_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(WIDTH, 1)
    torch.save(layer.state_dict(), tmp_path / "a.pth")
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    save_file(arrays, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", coef_=arrays["weight"], intercept_=arrays["bias"])
    rows = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
    expected = layer(torch.from_numpy(rows)).detach().numpy()[:, 0]
    for name in ("a.pth", "a.safetensors", "a.npz"):
        weights, bias = read_head(str(tmp_path / name))
        np.testing.assert_allclose(rows @ weights + bias, expected, atol=1e-5)


def test_the_layers_of_the_second_predictor_are_one(tmp_path):
    torch = pytest.importorskip("torch")
    nn, sizes = torch.nn, (WIDTH, 16, 12, 8, 4, 1)
    linear = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    dropout = [nn.Dropout(0.2) for _ in range(3)]
    order = [linear[0], dropout[0], linear[1], dropout[1], linear[2], dropout[2], *linear[3:]]
    model = nn.Module()
    model.layers = nn.Sequential(*order)
    torch.save(model.state_dict(), tmp_path / "mlp.pth")
    rows = torch.randn(5, WIDTH)
    weights, bias = read_head(str(tmp_path / "mlp.pth"))
    expected = model.layers.eval()(rows).detach().numpy()[:, 0]
    np.testing.assert_allclose(rows.numpy() @ weights + bias, expected, atol=1e-5)


@pytest.mark.parametrize(
    "arrays",
    [
        {"layers.0.weight": np.ones((4, WIDTH)), "layers.2.weight": np.ones((1, 4))},
        {"weight": np.ones((2, WIDTH)), "bias": np.zeros(2)},
        {"weight": np.full((1, WIDTH), np.nan)},
        {"weight": np.ones((1, WIDTH)), "running_mean": np.ones(WIDTH)},
        {"coef_": np.ones((1, WIDTH)), "classes_": np.array(["safe", "unsafe"])},
    ],
)
def test_other_models_are_refused_by_the_name_of_the_file(arrays, tmp_path):
    np.savez(tmp_path / "head.npz", **arrays)
    with pytest.raises(ValueError, match=r"head\.npz: "):
        read_head(str(tmp_path / "head.npz"))


def test_no_pickle_is_executed(tmp_path):
    class Opens:
        def __reduce__(self):
            return open, (str(tmp_path / "opened"), "w")

    state = collections.OrderedDict(weight=Opens())
    (tmp_path / "head.pth").write_bytes(pickle.dumps(state))
    np.savez(tmp_path / "head.npz", weight=np.array([Opens()], object))
    for name in ("head.pth", "head.npz"):
        with pytest.raises(ValueError, match=name):
            read_head(str(tmp_path / name))
    assert not (tmp_path / "opened").exists()
