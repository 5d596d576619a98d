"""k-means, near-duplicates and thumbnail windows against formulas, on one and eight devices."""

import jax
import numpy as np
import pytest
from PIL import Image

from data_prep.duplicates import kmeans
from data_prep.duplicates.pictures import (
    SIDE,
    cut_windows,
    describe_picture,
    has_colors_of,
    lay_over,
)
from data_prep.duplicates.search import (
    Clusters,
    Found,
    divide_clusters,
    find_candidates,
    follow_to_kept,
)
from tests.make import encoded


def _unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """1,500 unit vectors around 6 directions."""
    generator = np.random.default_rng(0)
    centers = _unit(generator.standard_normal((6, 12)))
    return _unit(
        centers[generator.integers(0, 6, 1500)] + 0.2 * generator.standard_normal((1500, 12))
    )


def _lloyd(rows: np.ndarray, centroids: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means in float64, written from its textbook definition."""
    rows, centroids = rows.astype(np.float64), centroids.astype(np.float64)
    for _ in range(rounds):
        nearest = (rows @ centroids.T).argmax(1)
        for k in range(len(centroids)):
            if (nearest == k).any():
                mean = rows[nearest == k].mean(0)
                centroids[k] = mean / np.linalg.norm(mean)
    return centroids, (rows @ centroids.T).argmax(1)


def test_kmeans_is_that_of_the_books_on_any_number_of_devices(rows):
    numbers = np.arange(len(rows))
    first = kmeans.choose_centroids(numbers, 6, rows.__getitem__, seed=3)
    for devices, chunk_rows in ((1, 512), (1, 2048), (8, 4096)):
        saved = []
        means = kmeans.KMeans(chunk_rows, jax.devices()[:devices])
        assert means.chunk_rows == max(chunk_rows, 512 * devices)
        found = kmeans.fit(
            means, first, numbers, rows.__getitem__, iterations=5,
            save=lambda centroids, done, saved=saved: saved.append((centroids, done)),
        )  # fmt: skip
        clusters, cosines = (
            values[:, 0] for values in means.assign(found, numbers, rows.__getitem__)
        )
        centroids, nearest = _lloyd(rows, first, saved[-1][1])
        np.testing.assert_allclose(found, centroids, atol=1e-6)
        assert (clusters == nearest).mean() > 0.999
        np.testing.assert_allclose(cosines, (rows @ found.T).max(1), atol=1e-6)
        # Resuming after the second round gives the same bytes as an uninterrupted fit.
        again = kmeans.fit(means, saved[1][0], numbers, rows.__getitem__, iterations=5, done=2)
        assert again.tobytes() == found.tobytes()


def test_the_nearest_clusters_are_those_of_all_cosines(rows):
    numbers = np.arange(len(rows))
    centroids = kmeans.choose_centroids(numbers, 6, rows.__getitem__, seed=3)
    means = kmeans.KMeans(512, jax.devices(), probes=3)
    clusters, cosines = means.assign(centroids, numbers, rows.__getitem__)
    expected = np.argsort(-(rows.astype(np.float64) @ centroids.T), axis=1)[:, :3]
    assert (clusters == expected).mean() > 0.999
    found = np.take_along_axis(rows @ centroids.T, clusters, axis=1)
    np.testing.assert_allclose(cosines, found, atol=1e-6)


def test_a_centroid_without_rows_stays(rows):
    first = np.stack([rows[0], -rows[0], rows[1]])
    rows = np.stack([rows[0], rows[1]])
    numbers = np.arange(2)
    means = kmeans.KMeans(512, jax.devices()[:1])
    found, clusters = means.improve(_unit(first), numbers, rows.__getitem__)
    assert clusters.tolist() == [0, 2]
    np.testing.assert_array_equal(found[1], _unit(first)[1])
    np.testing.assert_allclose(found, _unit(first), atol=1e-4)


class _Pixels:
    def __init__(self, pixels):
        self.column = {"pixels": pixels}.get


@pytest.mark.parametrize("keep", ["farthest", "largest", "first"])
def test_near_duplicates_are_those_of_semdedup(keep, monkeypatch):
    generator = np.random.default_rng(1)
    groups = _unit(generator.standard_normal((40, 16)))
    rows = _unit(
        groups[generator.integers(0, 40, 230)] + 0.08 * generator.standard_normal((230, 16))
    )
    cosines = rows @ _unit(rows.mean(0, keepdims=True))[0]
    pixels = generator.integers(1, 5, 230)
    clusters = Clusters(np.arange(230), np.zeros((230, 1), np.int32), cosines)
    (group,) = divide_clusters(_Pixels(pixels), clusters, keep, "groups")
    monkeypatch.setattr("data_prep.duplicates.search._BLOCK", 64)
    near, second = find_candidates(rows[group.rows], 0.9, 2)
    (alone,) = find_candidates(rows[group.rows], 0.9)
    # Reference: the upper triangle of all cosines, sorted by the rule; maximum of each column.
    rule = {"farthest": cosines, "largest": -pixels, "first": np.arange(230)}[keep]
    order = sorted(range(230), key=lambda i: (rule[i], i))
    assert group.rows.tolist() == order and group.sizes == (230,)
    ranked = rows[order].astype(np.float64)
    upper = np.triu(ranked @ ranked.T, 1) - np.tri(230)
    best, partner = upper.max(0), upper.argmax(0)
    dropped = np.flatnonzero(best >= 0.9)
    assert 100 < len(dropped) < 200
    assert near.rows.tolist() == dropped.tolist()
    assert near.alike.tolist() == partner[dropped].tolist()
    np.testing.assert_allclose(near.similarity, best[dropped], atol=1e-6)
    for one, other in zip(near, alone, strict=True):
        np.testing.assert_array_equal(one, other)
    upper[partner, np.arange(230)] = -1
    dropped = np.flatnonzero(upper.max(0) >= 0.9)
    assert second.rows.tolist() == dropped.tolist()
    assert second.alike.tolist() == upper.argmax(0)[dropped].tolist()
    parent = dict(zip(near.rows, near.alike, strict=True))
    found = Found(*near, np.ones(len(near.rows), np.uint8), np.zeros(len(near.rows), bool))
    for row, root in zip(near.rows, follow_to_kept(found, near.alike), strict=True):
        while row in parent:
            row = parent[row]
        assert row == root


def _picture(seed: int, side: int = 320) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 9), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def _thumbnail(image: Image.Image) -> np.ndarray:
    return describe_picture(encoded(image), mirrored=False, max_pixels=10**6)[1]


def test_windows_are_those_that_pillow_cuts():
    thumbnail = _thumbnail(_picture(0))
    found = cut_windows(thumbnail)
    thumbnail = thumbnail[: SIDE * SIDE].reshape(SIDE, SIDE)
    boxes = [
        (left * 0.025, top * 0.025, size)
        for size in (1.0, 0.95, 0.9, 0.85)
        for top in range(round((1 - size) / 0.025) + 1)
        for left in range(round((1 - size) / 0.025) + 1)
    ]
    assert found.shape == (len(boxes), 256) == (84, 256)
    image = Image.fromarray(thumbnail.astype(np.float32))
    for (left, top, size), row in zip(boxes, found, strict=True):
        box = (left * SIDE, top * SIDE, (left + size) * SIDE, (top + size) * SIDE)
        cells = np.asarray(image.resize((16, 16), Image.Resampling.BOX, box=box), np.float64)
        cells = cells.ravel() - cells.mean()
        # Pillow's box filter rounds to whole pixels; ours weights the pixels at the edges.
        assert row @ (cells / np.linalg.norm(cells)) > 0.985


def test_a_mirrored_crop_is_found_from_either_picture():
    whole = _picture(1)
    crop = whole.crop((20, 5, 20 + 288, 5 + 288)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pictures = [_thumbnail(whole), _thumbnail(crop)]
    windows = list(map(cut_windows, pictures))
    for one, other in ((0, 1), (1, 0)):
        found = lay_over(windows[one], windows[other], mirrored=True)
        # The window is cut from the whole picture, whether that is the first or the second.
        assert found.correlation > 0.97 and found.is_mirrored
        assert found.is_first_cut == (one == 0)
        assert has_colors_of(pictures[0], pictures[1], found, 0.06)
