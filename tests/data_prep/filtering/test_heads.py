"""Aesthetic and safety scores: those of the layer on the model's embeddings, and their limits."""

import collections
import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.filtering import replay
from data_prep.steps.scores import read_head
from diht_jax import load_model
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from tests import make
from tests.data_prep.filtering.jobs import (
    job_config,
    read_outcomes,
    read_records,
    read_scores,
    write_clip,
)

NUM_PAIRS, WIDTH = 8, 24


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("weights") / "a.safetensors", image_size=16)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.npz"
    rng = np.random.default_rng(0)
    np.savez(path, weight=rng.standard_normal((1, WIDTH)), bias=np.array([0.25]))
    return str(path)


@pytest.fixture(scope="module")
def pictures():
    return [make.noise(number) for number in range(NUM_PAIRS)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    captions = [f"picture {number}" for number in range(NUM_PAIRS)]
    return make.write_pair_tar(tmp_path_factory.mktemp("pairs") / "pairs.tar", captions)


@pytest.fixture(scope="module")
def expected(weights, head, pictures):
    """The layer on the embedding of each picture, in float64."""
    model = load_model(weights, batch_size=1, devices=jax.devices()[:1])
    rows = np.concatenate([model.encode_image(p) for p in pictures]).astype(np.float64)
    found = np.load(head)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ found["weight"][0] + 0.25


def settings(name, **keys):
    return {f"{name}__{key}": value for key, value in keys.items()}


@pytest.fixture(scope="module")
def scored(source, weights, head, tmp_path_factory):
    output = tmp_path_factory.mktemp("scored") / "out"
    keys = {"head": head, "model": weights, "batch_size": 3}
    both = settings("aesthetic", **keys) | settings("unsafe", **keys)
    assert run_filter(job_config(source, output, **both)) == {}
    return output


@pytest.mark.parametrize("name", ["aesthetic", "unsafe"])
def test_scores_are_those_of_the_layer_and_all_are_kept(scored, expected, name):
    np.testing.assert_allclose(read_scores(scored, f"{name}_score"), expected, atol=1e-5)
    assert len(read_records(scored)) == NUM_PAIRS


@pytest.fixture(scope="module")
def scored_stored(source, weights, head, tmp_path_factory):
    """A run on stored embeddings, and its settings."""
    folder = tmp_path_factory.mktemp("stored")
    embedded = str(folder / "embedded")
    embed_source(load_model(weights), str(source), embedded, EmbedOptions(modalities=("image",)))
    keys = settings("aesthetic", head=head, embeddings=embedded)
    assert run_filter(job_config(source, folder / "out", **keys)) == {}
    return folder / "out", keys


def test_stored_embeddings_give_the_same_scores(scored_stored, expected):
    found = read_scores(scored_stored[0], "aesthetic_score")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name, reason", [("aesthetic", "low_score"), ("unsafe", "high_score")])
def test_a_limit_drops_one_side_in_a_run_and_in_a_replay(
    source, weights, head, expected, name, reason, tmp_path
):
    unlimited = tmp_path / "unlimited"
    keys = settings(name, head=head, model=weights)
    assert run_filter(job_config(source, unlimited, **keys)) == {}
    limit = float(np.sort(expected)[2:4].mean())
    is_dropped = expected < limit if name == "aesthetic" else expected > limit
    keys = settings(name, head=head, model=weights, limit=limit)
    config = job_config(source, tmp_path / "out", **keys)
    assert run_filter(config) == {}
    found = [
        (outcome, why) == (name, reason) for _, outcome, why in read_outcomes(tmp_path / "out")
    ]
    assert found == is_dropped.tolist()
    again = replay.Replay(str(unlimited), config).run()
    assert again.funnel.dropped()[name] == {reason: sum(found)}
    assert (again.funnel.kept, again.not_known.total()) == (NUM_PAIRS - sum(found), 0)


@pytest.mark.parametrize("name, share", [("aesthetic", 0.25), ("unsafe", 0.75)])
def test_a_quantile_is_that_of_the_scores(scored, source, weights, head, expected, name, share):
    keys = settings(name, head=head, model=weights, quantile=0.25, scores=str(scored))
    config = job_config(source, "none", **keys)
    filter_config.set_quantile_limit(config)
    limit = np.quantile(expected, share, method="inverted_cdf")
    assert config[name].limit == pytest.approx(limit, abs=1e-5)


def test_scores_of_another_head_are_refused(scored, source, weights, tmp_path):
    np.savez(tmp_path / "other.npz", weight=np.ones(WIDTH))
    keys = {"head": str(tmp_path / "other.npz"), "model": weights}
    keys = settings("aesthetic", **keys, quantile=0.25, scores=str(scored))
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
