"""The demo's teacher: what it is told of a scene, what it learns, and what it writes."""

import numpy as np

from data_prep import synthetic, synthetic_teacher
from data_prep import synthetic_sampling as sampling
from data_prep.precomputed import EmbeddingTable
from data_prep.synthetic_scenes import COLORS
from data_prep.synthetic_shapes import SHAPES
from diht_jax.data.readers import open_source


def names_in(targets):
    return {name for name, there in zip(synthetic_teacher.CONCEPTS, targets, strict=True) if there}


def test_targets_are_what_the_scene_says():
    scene = sampling.sample_single(np.random.default_rng(0), shape="star", color="green")
    item = scene.objects[0]
    found = names_in(synthetic_teacher.concepts_in(scene))
    assert found == {"star", "green", item.size, item.texture}
    assert len(synthetic_teacher.CONCEPTS) == len(set(synthetic_teacher.CONCEPTS))


def test_scenes_depend_on_seed_and_number_only():
    one = synthetic_teacher.draw_scenes(70, seed=3, workers=1)
    two = synthetic_teacher.draw_scenes(80, seed=3, workers=2)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b[:70])
    assert one[0].shape == (70, 64, 64, 3) and one[0].dtype == np.uint8
    # Every other scene has a single object.
    assert {int(row[: len(SHAPES)].sum()) for row in one[1][1::2]} == {1}


def test_embeddings_tell_colours_and_stand_under_their_keys(tmp_path):
    synthetic.write_dataset(
        synthetic.Settings(num_pairs=0, num_retrieval=0, num_classification=60),
        tmp_path / "web",
        workers=1,
    )
    pattern = str(tmp_path / "web" / "val_color.tar")
    output = tmp_path / "teacher.npz"
    synthetic_teacher.write_embeddings(pattern, output, num_scenes=640, epochs=4, seed=1)
    table = EmbeddingTable(str(output), "key", "image_emb")
    pairs = list(open_source(pattern))
    assert len(table) == len(pairs) == 60
    embeddings = np.stack([table.get(pair.key) for pair in pairs])
    labels = np.array([pair.metadata["label"] for pair in pairs])
    # The nearest other picture has the same colour far more often than one in ten times.
    distances = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    assert (labels[distances.argmin(1)] == labels).mean() > 3 / len(COLORS)
