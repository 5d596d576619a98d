"""CLIP_benchmark itself, on an exported model, gives our numbers."""

import io
import itertools
import tarfile

import numpy as np
import pytest
from PIL import Image

from diht_jax import load_model
from diht_jax.evaluation.prompts import CIFAR10_CLASSES
from diht_jax.evaluation.sources import read_source
from diht_jax.evaluation.task_specs import parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from diht_jax.export import export_model

_SIZE = 64


@pytest.fixture
def folders(shared_data, tmp_path):
    """64 photos of CIFAR-10 in its layout: as a classification, and with two captions each."""
    with tarfile.open(shared_data / "cifar10_test.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in itertools.islice(tar, 3 * _SIZE)]
    names = {"cifar": "classification", "flickr": "retrieval"}
    for name, kind in names.items():
        folder = tmp_path / name
        (folder / "test").mkdir(parents=True)
        (folder / "test" / "nshards.txt").write_text("1")
        (folder / "dataset_type.txt").write_text(kind)
        (folder / "classnames.txt").write_text("\n".join(CIFAR10_CLASSES))
        (folder / "zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}.")
        with tarfile.open(folder / "test" / "0.tar", "w") as tar:
            for number, (member, data) in enumerate(members):
                key, _, extension = member.partition(".")
                if extension == "txt":
                    label = CIFAR10_CLASSES.index(key.partition("_")[0])
                    note = str(label) if name == "cifar" else f"picture {number}\n{number} of it"
                    extension, data = ("cls" if name == "cifar" else "txt"), note.encode()
                if extension != "json":
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return tmp_path


def test_equal_to_the_sample(folders, workdir):
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
    images = [Image.open(io.BytesIO(pair.image)) for pair in read_source(task.source, {})]
    similarities = model.encode_image(images) @ classifier.numpy()
    np.testing.assert_array_equal(similarities.argmax(axis=1), predictions)

    _, loader = read("flickr", "zeroshot_retrieval")
    found = retrieval.evaluate(theirs, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5])
    (task,) = parse_tasks([f"clip_benchmark:{folders}/flickr?caption_template={{caption}}"])
    metrics = evaluate_task(model, task, batch_size=_SIZE)["metrics"]
    for k in (1, 5):
        assert metrics[f"t2i_r{k}"] == pytest.approx(found[f"image_retrieval_recall@{k}"])
        assert metrics[f"i2t_r{k}"] == pytest.approx(found[f"text_retrieval_recall@{k}"])
