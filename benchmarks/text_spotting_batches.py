"""Batch sizes of the text spotter, and the effect of the canvases that fill its batches.

    python -m benchmarks.text_spotting_batches --photos runs/data/photos.tar \\
        --captions runs/data/captions_web.txt

The first part is a simulation. Images with the sizes of LAION-2B-en pass through the windows in
which the filter sends them to the spotter, before (32 candidates at a time, one batch per padded
shape) and now (`Settings.window` candidates, one batch for each of nine canvases). Either all
images go to detection, or all go through a first look of 160 px and half of them to detection.
Widths and heights follow LAION's published quantiles (laion.ai/blog/laion-5b, "Laion2B-en"), with a
correlation that reproduces its published numbers of images with both sides of at least 256, 512 and
1,024 px. The frequency of exact ratios such as 4:3 is not published; it is simulated without equal
ratios, and with all sizes within 3% of a common ratio snapped to it.

The second part compares decisions on `photos.tar` and on the test set of `text_spotting_testset`,
with EasyOCR's canvases and with ours, at equal precision, for images whose canvases differ.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import os
import statistics
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from absl import flags

from benchmarks.record import write_result
from benchmarks.text_spotting_testset import make_test_set
from data_prep.text_spotting import ocr
from data_prep.text_spotting.ocr import canvas_shape, like_batches
from data_prep.text_spotting.spotter import Settings, TextSpotter, Verdict
from diht_jax import command_line
from diht_jax.input.transforms import open_image
from diht_jax.terminal import ProgressBar

# Quantiles of LAION-2B-en in px, from 5% to 95% in steps of 5%.
_WIDTHS = (132, 160, 180, 210, 225, 240, 262, 300, 309, 340, 400, 450, 480, 512, 600, 656, 760, 960,
           1050)  # fmt: skip
_HEIGHTS = (125, 150, 166, 188, 208, 225, 250, 270, 300, 320, 350, 380, 418, 470, 500, 600, 672,
            800, 1014)  # fmt: skip
# Minimum of both sides -> millions of the 2,320 million images.
_BOTH = {256: 1324, 512: 488, 1024: 76}
_TOTAL = 2320
_COMMON_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2)
# Share of the pairs that pass C and A (DiHT keeps a fifth of LAION after T), and the share of these
# that passes a first look, if there is one.
_REACH_SPOTTER, _PASS_FIRST_LOOK = 0.3, 0.5
_GATE_SIZE = 160  # px of that look, as the documentation recommends; by default there is none
_PAIRS = 20_000  # two shards
# Pairs that are parsed together, and candidates that the spotter processes together.
_BEFORE, _NOW = (256, 32), (1024, Settings().window)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("photos", None, "Tar of photos, with a caption each; unset: none.")
    flags.DEFINE_string("captions", None, "File with a caption a line; unset: synthetic ones.")
    flags.DEFINE_integer("pictures", 480, "Pictures of the test set; 0: simulate only.")


def main() -> None:
    """Simulates, measures and writes `benchmarks/results/text_spotting_batches.json`."""
    given = flags.FLAGS
    payload: dict[str, Any] = {"simulated": {}, "settings": dataclasses.asdict(Settings())}
    sizes, correlation = draw_sizes(_PAIRS)
    payload["correlation"] = correlation
    for name, drawn in (("no_two_alike", sizes), ("common_ratios", snap_ratios(sizes))):
        payload["simulated"][name] = simulate(drawn)
        print_histograms(name, payload["simulated"][name])
    if given.pictures:
        payload["decisions"] = compare_decisions(given.pictures, given.photos, given.captions)
        print(payload["decisions"])
    print("written:", write_result("text_spotting_batches", payload))


def draw_sizes(count: int) -> tuple[np.ndarray, float]:
    """Draws LAION sizes, int [count, 2]; also returns the correlation of their normal scores."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, count))

    def draw(correlation: float) -> np.ndarray:
        other = correlation * first + np.sqrt(1 - correlation**2) * second
        return np.stack([_quantile(_WIDTHS, first), _quantile(_HEIGHTS, other)], 1)

    def miss(correlation: float) -> float:
        drawn = draw(correlation).min(1)
        return sum(abs((drawn >= s).mean() - n / _TOTAL) for s, n in _BOTH.items())

    correlation = min(np.arange(0.5, 1.0, 0.01), key=miss)
    return draw(correlation).round().astype(int), float(correlation)


def _quantile(values: Sequence[int], scores: np.ndarray) -> np.ndarray:
    """Maps normal scores to quantiles, with logarithmic inter- and extrapolation."""
    normal = statistics.NormalDist()
    known = np.array([normal.inv_cdf(0.05 * (i + 1)) for i in range(len(values))])
    logs = np.log(values)
    slope = (logs[-1] - logs[0]) / (known[-1] - known[0])
    beyond = np.where(scores > 0, scores - known[-1], scores - known[0])
    is_beyond = (scores > known[-1]) | (scores < known[0])
    return np.exp(np.interp(scores, known, logs) + np.where(is_beyond, slope * beyond, 0))


def snap_ratios(sizes: np.ndarray) -> np.ndarray:
    """Adjusts the heights to make a common ratio exact if it is at most 3% away."""
    ratios = np.array(sorted({*_COMMON_RATIOS, *(1 / r for r in _COMMON_RATIOS)}))
    own = sizes[:, 0] / sizes[:, 1]
    nearest = ratios[np.abs(np.log(own[:, None] / ratios)).argmin(1)]
    heights = np.where(np.abs(np.log(own / nearest)) < 0.03, sizes[:, 0] / nearest, sizes[:, 1])
    return np.stack([sizes[:, 0], heights.round().astype(int)], 1)


def simulate(sizes: np.ndarray) -> dict[str, Any]:
    """Simulates batches of detection, of a first look, and of detection after it."""
    rng = np.random.default_rng(1)
    reach = rng.random((2, len(sizes)))
    s = Settings()
    found = {}
    for when, (parsed, window) in (("before", _BEFORE), ("now", _NOW)):
        batches = collections.defaultdict(list)
        for start in range(0, len(sizes), parsed):
            rows = np.arange(start, min(start + parsed, len(sizes)))
            rows = rows[reach[0, rows] < _REACH_SPOTTER]
            for group in (rows[i : i + window] for i in range(0, len(rows), window)):
                passed = group[reach[1, group] < _PASS_FIRST_LOOK]
                for stage, side, chosen in (
                    ("detection", s.ocr.canvas_size, group),
                    ("first look", _GATE_SIZE, group),
                    ("detection behind it", s.ocr.canvas_size, passed),
                ):
                    shapes = [_canvas(sizes[row], side, when == "now") for row in chosen]
                    batches[stage] += [
                        (len(batch), *shapes[batch[0]])
                        for batch in like_batches(dict(enumerate(shapes)), s.batch_size)
                    ]
        found[when] = {stage: _describe(rows) for stage, rows in batches.items()}
    return found


def _canvas(size: np.ndarray, side: int, is_bucketed: bool) -> tuple[int, int]:
    width, height = size
    ratio = min(side, max(size)) / max(size)
    shrunk = max(1, int(height * ratio)), max(1, int(width * ratio))
    return canvas_shape(shrunk, side if is_bucketed else None)


def _describe(batches: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    sizes = np.array([batch[0] for batch in batches])
    pictures = int(sizes.sum())
    bins = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 32))
    return {
        "batches": len(sizes),
        "pictures": pictures,
        "shapes": len({batch[1:] for batch in batches}),
        "mean": float(sizes.mean()),
        # Mean over images, not over batches.
        "mean_of_pictures": float((sizes**2).sum() / pictures),
        "pixels_per_picture": sum(n * h * w for n, h, w in batches) / pictures,
        "share_of_pictures": {
            f"{low}-{high}" if low < high else f"{low}": float(
                sizes[(sizes >= low) & (sizes <= high)].sum() / pictures
            )
            for low, high in bins
        },
    }


def print_histograms(name: str, simulated: dict[str, Any]) -> None:
    """Prints one table: the share of the images in batches of each size."""
    print(f"\n{name}")
    for stage in simulated["now"]:
        for when in ("before", "now"):
            d = simulated[when][stage]
            shares = ", ".join(f"{k}: {v:.0%}" for k, v in d["share_of_pictures"].items())
            print(
                f"{stage}, {when}: {d['batches']} batches of {d['pictures']} pictures, "
                f"{d['shapes']} shapes, mean {d['mean']:.1f}, {d['pixels_per_picture']:.0f} px a "
                f"picture; {shares}"
            )


def compare_decisions(count: int, photos: str | None, captions: str | None) -> dict[str, Any]:
    """Compares decisions, and their spots, for images where EasyOCR's canvases and ours differ."""
    drawn = make_test_set(count, photos=photos, captions=captions)
    sets = {"test_set": [(picture.image, picture.caption) for picture in drawn]}
    if photos is not None:
        sets["photos"] = _read_photos(photos)
    found = {}
    for name, pairs in sets.items():
        chosen = [pair for pair in pairs if _has_other_canvas(pair[0])]
        with _easyocr_canvases():
            theirs = _judge(chosen, f"{name}, EasyOCR's canvases")
        ours = _judge(chosen, f"{name}, our canvases")
        both = list(zip(theirs, ours, strict=True))
        found[name] = {
            "pictures": len(pairs),
            "on_other_canvas": len(chosen),
            "dropped": sum(_drops(verdict) for verdict in ours),
            "decisions_differ": sum(_drops(a) != _drops(b) for a, b in both),
            "boxes_differ": sum(
                [s.box for s in a.spots] != [s.box for s in b.spots] for a, b in both
            ),
            "texts_differ": sum(
                [s.text for s in a.spots] != [s.text for s in b.spots] for a, b in both
            ),
        }
    return found


def _judge(pairs: Sequence[tuple[bytes, str]], label: str) -> list[Verdict]:
    spotter = TextSpotter(Settings())
    verdicts = []
    for start in ProgressBar(range(0, len(pairs), 8), desc=label):
        chunk = pairs[start : start + 8]
        verdicts += spotter.judge([image for image, _ in chunk], [[text] for _, text in chunk])
    return verdicts


def _has_other_canvas(image: bytes) -> bool:
    size = np.array(open_image(image).size)
    s = Settings()
    return any(
        _canvas(size, side, False) != _canvas(size, side, True)
        for side in (s.gate_size, s.ocr.canvas_size, s.closer_size)
        if side
    )


def _drops(verdict: Verdict) -> bool:
    return verdict.matches[0] is not None


@contextlib.contextmanager
def _easyocr_canvases() -> Iterator[None]:
    with mock.patch.object(ocr, "canvas_shape", lambda size, side: canvas_shape(size, None)):
        yield


def _read_photos(path: str) -> list[tuple[bytes, str]]:
    parts: dict[str, dict[str, bytes]] = collections.defaultdict(dict)
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.rpartition(".")
            parts[key][extension] = io.BytesIO(tar.extractfile(member).read()).getvalue()
    return [(p["jpg"], p["txt"].decode()) for p in parts.values() if {"jpg", "txt"} <= p.keys()]


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
