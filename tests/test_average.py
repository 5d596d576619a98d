"""Averages of models against NumPy in float64 and a replay of the greedy rule."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from diht_jax.average import average_models as run
from diht_jax.data.tokenizer import FileTokenizer
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from diht_jax.loading import load_model, read_model
from diht_jax.weights.export import write_model
from diht_jax.weights.soups import average_models, greedy_soup
from diht_jax.weights.source import ModelFiles
from tests import make

ARCH = make.small_architecture()


def trees(count, dtype=np.float32):
    """Models with two random parameters each."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
    return {
        f"m{i}": ModelFiles(ARCH, {"a": {"kernel": draw(3, 4)}, "b": draw(2)}, f"m{i}")
        for i in range(count)
    }


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_greedy_soup_follows_the_rule(lower_is_better):
    models = trees(6)
    sign = -1 if lower_is_better else 1

    def value(kernel):
        return sign * -float(np.abs(kernel - 0.1).sum())

    soup, trials = greedy_soup(
        list(models),
        models.__getitem__,
        lambda m: value(m.params["a"]["kernel"]),
        lower_is_better=lower_is_better,
    )
    # The same rule, step by step, on one kernel.
    kernels = {name: m.params["a"]["kernel"].astype(np.float64) for name, m in models.items()}
    order = sorted(kernels, key=lambda name: sign * value(kernels[name]), reverse=True)
    kept, best = [], -np.inf
    for name in order:
        reached = sign * value(np.mean([kernels[n] for n in (*kept, name)], 0))
        if reached >= best:
            kept, best = [*kept, name], reached
    assert [t.name for t in trials] == order and [t.name for t in trials if t.kept] == kept
    assert 1 < len(kept) < len(models)
    expected = np.mean([kernels[name] for name in kept], 0).astype(np.float32)
    np.testing.assert_allclose(soup.params["a"]["kernel"], expected, rtol=1e-6)


def test_a_soup_is_not_chosen_by_what_is_not_a_number():
    models, values = trees(3), iter([0.5, float("nan"), 0.6])
    with pytest.raises(ValueError, match="m1: "):
        greedy_soup(list(models), models.__getitem__, lambda _: next(values))


def test_models_whose_ids_mean_other_words_are_not_averaged():
    models = trees(2)
    models["m1"] = dataclasses.replace(models["m1"], tokenizer=FileTokenizer(__file__, pad=""))
    with pytest.raises(ValueError, match="m1: tokenizer"):
        average_models(list(models), [1.0, 1.0], models.__getitem__)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """Two weight directories of the same architecture, and a third of another architecture."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, arch) in enumerate(
        {"a": ARCH, "b": ARCH, "wide": dataclasses.replace(ARCH, text_mlp_width=128)}.items()
    ):
        write_model(folder / name, "safetensors", make.drawn_model(arch, seed), card="")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tar of six pictures with captions."""
    path = tmp_path_factory.mktemp("task") / "squares.tar"
    return make.write_pair_tar(path, [f"square {i}" for i in range(6)])


def test_command_writes_models_with_what_was_measured(two_models, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    names = [str(two_models / "a"), str(two_models / "b")]
    tasks = parse_tasks([f"retrieval:{pictures}"])
    target, reference = "squares/t2i_r1", "squares/i2t_median_rank"
    record = run(
        names,
        "wise_ft",
        tmp_path / "out",
        alpha=0.25,
        alphas=[0.0, 0.5, 1.0],
        tasks=tasks,
        target=target,
        reference=reference,
    )
    written = json.loads((tmp_path / "out/average.json").read_text())
    del written["checksum"]
    assert record == written
    a, b = (read_model(name).params for name in names)
    jax.tree.map(
        lambda x, y, found: np.testing.assert_array_equal(
            found, (0.75 * x.astype(np.float64) + 0.25 * y.astype(np.float64)).astype(np.float32)
        ),
        *(a, b, read_model(tmp_path / "out").params),
    )
    alone = evaluate_task(load_model(names[1]), tasks[0])["metrics"]
    assert record["grid"][2]["metrics"] == {f"squares/{key}": v for key, v in alone.items()}
    assert [row["alpha"] for row in record["grid"]] == [0.0, 0.5, 1.0]
    with Image.open(tmp_path / "out/average.png") as plot:
        assert plot.width > 500
    assert f"| `{names[1]}` | 0.25 |" in (tmp_path / "out/README.md").read_text()
    # The ends of the grid are single models; the greedy soup must measure the same values.
    soup = run(names, "greedy", tmp_path / "soup", tasks=tasks, target=reference)
    ends = [row["metrics"][reference] for row in (record["grid"][0], record["grid"][2])]
    assert [t["alone"] for t in soup["trials"]] == sorted(ends)  # a rank: lower is better
    members = [t["name"] for t in soup["trials"] if t["kept"]]
    assert soup["members"] == [{"model": name, "weight": 1.0} for name in members]
    found = read_model(tmp_path / "soup").params["text"]["projection"]["kernel"]
    kernels = [read_model(name).params["text"]["projection"]["kernel"] for name in members]
    np.testing.assert_allclose(found, np.mean(kernels, 0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["greedy", "wise_ft"])
def test_a_target_that_the_task_does_not_measure_is_named(method, two_models, tmp_path):
    members = {}
    for label in range(4):
        members |= {f"{label}.png": make.png(label), f"{label}.cls": b"%d" % (label % 2)}
        members[f"{label}.txt"] = b"ab"[label % 2 : label % 2 + 1]
    tar = make.write_tar(tmp_path / "two.tar", members)
    names = [str(two_models / name) for name in "ab"]
    options = {"tasks": parse_tasks(f"classification:{tar}"), "alphas": [0.5]}
    options |= {"target": "two/top5", "reference": "two/top1" if method == "wise_ft" else None}
    with pytest.raises(ValueError, match="--target=two/top5: .*two/mean_per_class"):
        run(names, method, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_scale_and_the_bias_of_sigmoid_runs_are_averaged_too(tmp_path):
    config = make.tiny_config(loss__kind="sigmoid")
    make.write_run(tmp_path / "a", config, log_logit_scale=2.0, logit_bias=-8.0)
    make.write_run(tmp_path / "b", config, seed=1, log_logit_scale=4.0, logit_bias=-4.0)
    make.write_run(tmp_path / "softmax", make.tiny_config(), seed=2)
    names = [str(tmp_path / name) for name in ("a", "b")]
    record = run(names, "wise_ft", tmp_path / "out", alpha=0.25)
    assert record["loss_scalars"] == {"logit_bias": -7.0}
    assert read_model(tmp_path / "out").params["log_logit_scale"] == 2.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"logit_bias.*-7\b", card)
    other = [names[0], str(tmp_path / "softmax")]
    assert "loss_scalars" not in run(other, "uniform", tmp_path / "mixed")


@pytest.mark.parametrize(
    ("models", "method", "options", "message"),
    [
        (("a",), "uniform", {}, "--method=uniform needs several models"),
        (("a", "wide"), "uniform", {}, "wide: text_mlp_width is 128, and 256 in"),
    ],
)
def test_wrong_arguments_are_named(two_models, tmp_path, models, method, options, message):
    names = [str(two_models / name) for name in models]
    with pytest.raises(ValueError, match=message):
        run(names, method, tmp_path / "out", **options)
