"""CLIP_benchmark itself gives our numbers for an exported model."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.clip_benchmark_folder import write_folder
from benchmarks.clip_benchmark_standins import STANDINS, write_standin
from benchmarks.clip_benchmark_tasks import compare_task
from diht_jax import load_model
from diht_jax.evaluation.sources.registry import open_units
from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from diht_jax.export import export_model

_SIZE = 64


@pytest.fixture
def folders(shared_data, tmp_path):
    """Writes 64 CIFAR-10 photos in its layout, as a classification and with two captions each."""
    source = f"{shared_data}/cifar10_test.tar"
    (cifar,) = parse_tasks(f"cifar10={source}?templates=a {{}}.;the {{}}.")
    write_folder(cifar, tmp_path / "cifar", limit=_SIZE)
    (tmp_path / "photos").mkdir()
    rows = []
    for number, pair in enumerate(itertools.islice(open_units(source, {}).entries(), _SIZE)):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(pair.image)
        captions = [f"picture {number}", f"{number} of it"]
        rows.append(json.dumps({"image": f"{number}.jpg", "caption": captions}))
    (tmp_path / "photos" / "a.jsonl").write_text("\n".join(rows))
    (flickr,) = parse_tasks(f"retrieval:{tmp_path}/photos/a.jsonl?caption_template={{caption}}")
    assert write_folder(flickr, tmp_path / "flickr") == {"images": _SIZE}
    return tmp_path


def test_equal_to_the_sample(folders, workdir, shared_data, monkeypatch):
    builder = pytest.importorskip("clip_benchmark.datasets.builder")
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    clip_benchmark_model = pytest.importorskip("clip_benchmark.models.open_clip")
    import torch

    export_model(str(workdir), "open_clip", str(folders / "exported"))
    theirs, transform, tokenizer = clip_benchmark_model.load_open_clip(
        f"local-dir:{folders / 'exported'}", pretrained=None
    )
    theirs.eval()

    def read(name, task):
        dataset = builder.build_dataset(
            f"wds/{name}", root=str(folders / name), transform=transform, task=task
        )
        loader = torch.utils.data.DataLoader(dataset.batched(_SIZE), batch_size=None)
        return dataset, loader

    model = load_model(workdir)
    dataset, loader = read("cifar", "zeroshot_classification")
    classifier = classification.zero_shot_classifier(
        theirs, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False
    )
    logits, labels = classification.run_classification(theirs, classifier, loader, "cpu", amp=False)
    (task,) = parse_tasks([f"clip_benchmark:{folders}/cifar"])
    ours = evaluate_task(model, task, batch_size=_SIZE)
    predictions = logits.argmax(dim=1).numpy()
    confusion = np.zeros((10, 10), int)
    np.add.at(confusion, (labels.numpy(), predictions), 1)
    np.testing.assert_array_equal(ours["confusion"], confusion)
    images = [Image.open(io.BytesIO(pair.image)) for pair in open_units(task.source, {}).entries()]
    similarities = model.encode_image(images) @ classifier.numpy()
    np.testing.assert_array_equal(similarities.argmax(axis=1), predictions)

    _, loader = read("flickr", "zeroshot_retrieval")
    found = retrieval.evaluate(theirs, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
    (task,) = parse_tasks([f"clip_benchmark:{folders}/flickr?caption_template={{caption}}"])
    metrics = evaluate_task(model, task, batch_size=_SIZE)["metrics"]
    for k in (1, 5):
        assert metrics[f"t2i_r{k}"] == pytest.approx(found[f"image_retrieval_recall@{k}"])
        assert metrics[f"i2t_r{k}"] == pytest.approx(found[f"text_retrieval_recall@{k}"])

    # Multi-label, as in the benchmark of sixteen tasks.
    from benchmarks.clip_benchmark_samples import measure_classification

    name = "wds_voc2007_multilabel"
    monkeypatch.setitem(STANDINS, name, dataclasses.replace(STANDINS[name], size=_SIZE))
    assert write_standin(name, folders / name, shared_data) == _SIZE
    dataset, loader = read(name, "zeroshot_classification")
    arrays, metrics = measure_classification(theirs, loader, tokenizer, dataset)
    np.savez(folders / f"{name}.npz", **arrays)
    (folders / f"{name}.json").write_text(json.dumps(metrics))
    found = compare_task(model, name, folders)
    assert found["equal"] and found["samples"] == _SIZE and found["different"] == 0
    assert 0 < found["ours"]["mean_average_precision"] < 1
    # Another label gives another metric, although all similarities are the same.
    (folders / f"{name}.json").write_text(json.dumps({"mean_average_precision": 0.5}))
    assert not compare_task(model, name, folders)["equal"]
