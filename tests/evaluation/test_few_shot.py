"""The few-shot protocol on synthetic embeddings, and the command on real images."""

import json

import numpy as np
import pytest
from PIL import Image

from diht_jax import fewshot
from diht_jax.evaluation.few_shot import (
    FewShotData,
    FewShotOptions,
    draw_shots,
    evaluate_few_shot,
    measure_few_shot,
    split_by_class,
)
from diht_jax.evaluation.linear_probe import LabelledEmbeddings, ProbeSettings, fit_probes
from diht_jax.evaluation.protocols.base import Task
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.fewshot import task_text
from tests import make
from tests.docs.commands import parse_command


def _numbered(counts):
    """Returns examples whose embedding is their number, which identifies them."""
    labels = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(labels), dtype=np.float32)[:, None]
    order = np.random.default_rng(0).permutation(len(labels))
    return LabelledEmbeddings(numbers[order], labels[order].astype(np.int32))


def _numbers(examples):
    return examples.image_emb[:, 0].astype(int).tolist()


def test_split_takes_its_share_of_every_class():
    examples = _numbered([10, 2, 51])
    kept, held_out = split_by_class(examples, FewShotOptions(validation_fraction=0.3))
    assert np.bincount(held_out.labels).tolist() == [3, 1, 15]
    assert sorted(_numbers(kept) + _numbers(held_out)) == list(range(63))
    few = FewShotOptions(validation_fraction=0.3, validation_per_class=2)
    assert np.bincount(split_by_class(examples, few)[1].labels).tolist() == [2, 1, 2]
    other = split_by_class(examples, FewShotOptions(validation_fraction=0.3, seed=1))[1]
    assert _numbers(other) != _numbers(held_out)
    with pytest.raises(ValueError, match="class 1 has a single training image"):
        split_by_class(_numbered([3, 1]), FewShotOptions())


def test_draws_are_nested_balanced_and_different():
    examples = _numbered([20, 3, 20])
    options = FewShotOptions(num_draws=3)
    four, eight = (draw_shots(examples, shots, options) for shots in (4, 8))
    assert [np.bincount(draw.labels).tolist() for draw in four] == [[4, 3, 4]] * 3
    for small, large in zip(four, eight, strict=True):
        assert set(_numbers(small)) < set(_numbers(large))
        by_number = np.repeat([0, 1, 2], [20, 3, 20])
        np.testing.assert_array_equal(by_number[_numbers(small)], small.labels)
    assert len({tuple(sorted(_numbers(draw))) for draw in four}) == 3
    (everything,) = draw_shots(examples, "all", options)
    assert sorted(_numbers(everything)) == list(range(43))


def _clustered(rng, centres, n):
    labels = np.arange(n) % len(centres)
    x = centres[labels] + 1.2 * rng.normal(size=(n, centres.shape[1]))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return LabelledEmbeddings(x.astype(np.float32), labels.astype(np.int32))


@pytest.fixture(scope="module")
def measured():
    """Returns data whose prompts are noisy class centres, as those of a good model are."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    prompts = centres + 0.9 * rng.normal(size=centres.shape)
    prompts /= np.linalg.norm(prompts, axis=1, keepdims=True)
    train, validation, test = (_clustered(rng, centres, n) for n in (300, 200, 500))
    data = FewShotData(train, validation, test, (20 * prompts.T).astype(np.float32))
    options = FewShotOptions(
        shots=(1, "all"),
        num_draws=4,
        num_steps=100,
        radii=(0.02, 0.1, 0.5, 2.0),
        bias_radii=(0.0, 1.0),
        weight_decays=(1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
        alphas=(0.0, 0.5, 1.0),
    )
    return data, measure_few_shot(data, options)


def test_means_with_the_zero_shot_classifier_go_from_it_to_the_probe(measured):
    data, result = measured
    everything = result["results"][1]
    for method in ("prompt_init", "prompt_penalty"):
        means = {row["alpha"]: row["test_mean"] for row in everything[method]["wise_ft"]}
        assert means[0.0] == result["zero_shot"]["test"]
        assert means[1.0] == everything[method]["test_mean"]
    # Between them: the chosen penalty, fitted again and averaged by hand.
    decay = ProbeSettings(weight_decay=everything["prompt_penalty"]["chosen"][0]["weight_decay"])
    fitted = fit_probes([data.train], data.validation, data.zero_shot, [decay], num_steps=100)
    classifier = (data.zero_shot.astype(np.float64) + fitted.weights[0]) / 2
    logits = data.test.image_emb @ classifier + fitted.bias[0] / 2
    assert means[0.5] == pytest.approx((logits.argmax(axis=1) == data.test.labels).mean(), abs=2e-3)
    assert "wise_ft" not in everything["scratch"]


def test_prompts_are_never_worse_on_validation_and_better_with_one_shot(measured):
    data, result = measured
    one, everything = result["results"]
    assert [one["shots"], one["examples"], one["draws"]] == [1, 5, 4]
    assert [everything["shots"], everything["examples"], everything["draws"]] == ["all", 300, 1]
    for row in (one, everything):
        assert min(row["prompt_init"]["validation"]) >= result["zero_shot"]["validation"]
    # DiHT's claim: no gap below zero-shot, and far above the probe from scratch.
    spread = one["prompt_init"]["test_std"]
    assert one["prompt_init"]["test_mean"] >= result["zero_shot"]["test"] - spread
    assert one["prompt_init"]["test_mean"] > one["scratch"]["test_mean"] + 0.05
    assert everything["prompt_init"]["test_mean"] > result["zero_shot"]["test"] + 0.05
    assert everything["prompt_init"]["test_mean"] > everything["scratch"]["test_mean"] - 0.03


def test_the_command_writes_numbers_and_plot(workdir, tmp_path, capsys):
    for split, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                make.noise(i, (32, 32)).save(folder / f"{i}.png")
    output = tmp_path / "out" / "few.json"
    arguments = [f"--{split}={tmp_path / split}" for split in ("train", "test")]
    arguments += [f"--model={workdir}", f"--output={output}", "--shots=1,all"]
    arguments += ["--draws=2", "--fit_steps=5"]
    parse_command("diht_jax.fewshot", arguments, lambda _: fewshot.main())
    result = json.loads(output.read_text())
    assert [row["shots"] for row in result["results"]] == [1, "all"]
    assert result["counts"]["validation"] == 2
    assert "zero-shot" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "few.png") as plot:
        assert plot.width > 800


@pytest.mark.parametrize("label, field", [(None, "'label'"), ("kind", "'kind'")])
def test_splits_have_their_labels_in_one_field(label, field):
    train, test = (Task("x", "classification", "a.tar", label=f) for f in ("shape", label))
    with pytest.raises(ValueError, match=f"a.tar: label=shape, and the test .* in {field}"):
        evaluate_few_shot(make.HashedModel(), train, test)


def parsed(task, source="train.tar", **defaults):
    (made,) = parse_tasks([task_text(task, source)], **defaults)
    return made


@pytest.mark.parametrize("task", ["pat=classification", "classification", None])
def test_options_of_the_task_and_of_the_source(task, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    made = parsed(f"{task or 'classification'}?class_names={names}", "a?.tar?label=shape")
    assert made.kind == "classification" and made.source == "a?.tar"
    assert made.class_names == ("cat", "dog") and made.label == "shape"
    assert made.name == ("pat" if task == "pat=classification" else "a")
    plain = parsed(task)
    assert (plain.kind, plain.source, plain.class_names) == ("classification", "train.tar", None)


def test_a_built_in_task_lends_its_words(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"))
    made = parsed("cifar10")
    assert made.source == "train.tar" and made.class_names[0] == "airplane"
    assert parsed(f"cifar10?class_names={names}").class_names == tuple("abcdefghij")
    # The option of the source takes precedence.
    assert parsed("cifar10?label=a", "train.tar?label=b").label == "b"
