"""The demo's teacher: its training and the embeddings that it writes."""

import numpy as np

from data_prep.synthetic import teacher, web
from data_prep.synthetic.scenes import COLORS
from data_prep.teachers.precomputed import EmbeddingTable
from diht_jax.input import transforms
from diht_jax.readers.registry import open_source


def test_embeddings_stand_under_the_keys_of_their_pictures(tmp_path, monkeypatch):
    trained, train = [], teacher.train_teacher

    def train_and_keep(*arguments, **named):
        trained.append(train(*arguments, **named))
        return trained[-1]

    monkeypatch.setattr(teacher, "train_teacher", train_and_keep)
    web.write_dataset(
        web.Settings(num_pairs=0, num_retrieval=0, num_classification=60),
        tmp_path / "web",
        workers=1,
    )
    source = str(tmp_path / "web" / "val_color.tar")
    output = tmp_path / "new" / "teacher.npz"
    settings = {"num_scenes": teacher.BATCH, "epochs": 1, "seed": 1}
    assert teacher.write_embeddings(source, output, **settings) == 60
    table = EmbeddingTable(str(output), "key", "image_emb")
    (network,) = trained
    pairs = list(open_source(source))
    assert len(table) == 60
    for pair in pairs:
        seen = teacher.shrink(transforms.decode_rgb(pair.image))
        found = table.get(pair.key)
        wanted = np.asarray(network.features(seen[None]))[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    # The nearest other picture has the same colour far more often than by chance (one in ten).
    embeddings = np.stack([table.get(pair.key) for pair in pairs])
    labels = np.array([pair.metadata["label"] for pair in pairs])
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() > 3 / len(COLORS)
