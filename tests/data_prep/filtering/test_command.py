"""The filter command: decisions, counts, reproducible bytes, and rejected inputs."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_prep.filter import explain, run_filter
from diht_jax.input.transforms import decode_rgb
from tests.data_prep.filtering.jobs import (
    job_config,
    read_counts,
    read_dropped,
    read_outcomes,
    read_records,
    snapshot,
    write_table,
    write_tars,
)
from tests.make import REPOSITORY, encoded, plain, run_command

_PNG = encoded(plain("red"))

# Caption -> the reason for its drop, written by hand from the published rules of the method.
_CAPTIONS = {
    "A black cat is chasing a small brown bird": None,
    "a man riding a horse on the beach": None,
    "a red car": "no_action",
    "blue sky over the green hills": "no_action",
    "sunset": "complexity",
    "IMG_2041.JPG": "file_name",
    "https://example.com/cat.jpg": "url",
    "ein kleiner Hund spielt mit einem Ball im Garten": "not_english",
    "!!!": "empty",
}


# Two shards; batches end within a shard.
_SETTINGS = {"concepts": True, "batch_size": 4, "source__rows_per_shard": 6}


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> pathlib.Path:
    """A table with every kind of caption, and the output of the filter `cat` for it."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = [{"image": "i.png", "caption": caption, "n": n} for n, caption in enumerate(_CAPTIONS)]
    rows.append({"image": "i.png", "caption": ["a red car", "a dog runs", "a cat sleeps"]})
    rows.append({"image": "i.png", "caption": ["a dog runs", "a red car"]})
    source = write_table(folder, rows, {"i.png": _PNG})
    run_filter(job_config(source, folder / "cat", "cat", **_SETTINGS))
    return folder


def test_captions_are_dropped_by_reason(captioned):
    counts = read_counts(captioned / "cat")
    reasons = [reason for reason in _CAPTIONS.values() if reason]
    assert counts["read"] == len(_CAPTIONS) + 2
    assert read_dropped(captioned / "cat") == {
        "caption": {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    }
    kept = [caption for caption, reason in _CAPTIONS.items() if reason is None]
    *records, several, one = read_records(captioned / "cat")
    assert [record.caption for record in records] == kept
    assert counts["kept"] == len(kept) + 2
    # A kept pair loses its bad captions.
    assert (several.caption, one.caption) == ("a dog runs", "a dog runs")
    assert several.metadata == {"captions": ["a dog runs", "a cat sleeps"]}
    assert one.metadata == {}
    samples = counts["samples"]["caption/complexity"]
    assert [(key, text) for _, key, text in samples] == [("t-00000004", "sunset")]
    rows = sorted((key, reason) for key, stage, reason in read_outcomes(captioned / "cat"))
    assert rows[: len(_CAPTIONS)] == [
        (f"t-{n:08d}", reason) for n, reason in enumerate(_CAPTIONS.values())
    ]
    # `explain` decides like the filter with the same config.
    by_cat, by_none = (job_config("unused", captioned, name) for name in ("cat", "convert"))
    for caption, reason in _CAPTIONS.items():
        decision = f"drop ({reason})" if reason else "keep"
        assert explain(caption, by_cat).endswith(f"decision:   {decision}")
        assert explain(caption, by_none).endswith("decision:   keep")


_NAMES = ("dog", "red fox", "container ship", "tabby cat", "tench")
_SENTENCES = ("a red car", "blue sky over the green hills", "the old house at the lake")
_LOST = "a dog whose picture is gone"


@pytest.mark.parametrize(
    ("captions", "recipe", "require", "is_named"),
    [
        ((*_NAMES, *[_LOST] * 20), "cat", (), True),
        (_NAMES, "convert", (), False),
        (_SENTENCES, "cat", (), False),  # also keeps nothing
        ((*_NAMES, "a dog is chasing a small brown bird"), "cat", (), False),
        ((*_NAMES, _SENTENCES[1]), "metadata", (), True),
        ((*_NAMES, _SENTENCES[1]), "metadata", ("len(caption) > 20",), False),  # no name arrives
    ],
    ids=["names and lost pictures", "converted", "sentences", "some are kept", "table", "arrived"],
)
def test_the_recipe_for_names_is_named_where_cat_keeps_none(
    tmp_path, caplog, captions, recipe, require, is_named
):
    rows = [
        {"image": "gone.png" if text == _LOST else "i.png", "caption": text} for text in captions
    ]
    source = write_table(tmp_path, rows, {"i.png": _PNG})
    config = job_config(source, tmp_path / "out", recipe, predicates__require=require)
    with caplog.at_level("WARNING"), contextlib.suppress(ValueError):
        run_filter(config)
    assert ("prep/convert" in caplog.text) == is_named


def test_images_are_dropped_by_reason(tmp_path):
    rgba = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    grey16 = Image.fromarray(np.full((20, 40), 51400, np.uint16))
    files = {
        "good.png": _PNG,
        "clear.png": encoded(rgba, "PNG"),
        "grey16.png": encoded(grey16, "PNG"),
        "big.jpg": encoded(plain((0, 0, 250), (300, 200)), "JPEG"),
        "empty.png": b"",
        "cut.png": _PNG[:60],
        "page.png": b"<html>",
        "bomb.png": encoded(Image.new("1", (500, 500)), "PNG"),
        "thin.png": encoded(plain("black", (40, 3))),
    }
    rows = [{"image": name, "caption": name, "exif": "long", "url": "u"} for name in files]
    rows += [{"image": "absent.png", "caption": "x"}, {"image": "good.png", "caption": ""}]
    source = write_table(tmp_path / "in", rows, files)
    limits = {"image__max_pixels": 100_000, "image__min_side": 4}
    assert run_filter(job_config(source, tmp_path / "out", **limits)) == {}
    assert read_dropped(tmp_path / "out") == {
        "source": {"no_caption": 1, "no_image": 1},
        "image": {"empty": 1, "too_large": 1, "too_small": 1, "unreadable": 2},
    }
    assert read_counts(tmp_path / "out")["image_formats"] == {"JPEG": 1, "PNG": 3}
    records = read_records(tmp_path / "out")
    assert [(r.caption, r.image) for r in records] == list(files.items())[:4]
    assert records[0].metadata == {"url": "u"}
    greys = [np.asarray(decode_rgb(r.image)).mean(axis=(0, 1)).round().tolist() for r in records]
    assert greys[:3] == [[255, 0, 0], [255, 255, 255], [200, 200, 200]]

    run_filter(job_config(source, tmp_path / "small", image__max_side=100, **limits))
    small = read_records(tmp_path / "small")
    assert [r.image for r in small[:3]] == [r.image for r in records[:3]]  # already small enough
    shrunk = Image.open(io.BytesIO(small[3].image))
    assert (shrunk.format, shrunk.size) == ("JPEG", (100, 67))
    assert np.abs(np.asarray(shrunk).mean(axis=(0, 1)) - [0, 0, 250]).max() < 3


def test_same_bytes_by_workers_with_other_orders_of_sets(captioned, tmp_path):
    changes = _SETTINGS | {"input": captioned / "t.jsonl", "output": tmp_path / "out"}
    changes |= {"num_workers": 2, "text_spotting": False}
    flags = [(f"config.{name.replace('__', '.')}", value) for name, value in changes.items()]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = run_command("data_prep.filter", ("config", "prep/cat"), *flags, PYTHONHASHSEED=seed)
    assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "out") == snapshot(captioned / "cat")


def test_nothing_kept_is_an_error(tmp_path):
    source = write_table(tmp_path / "in", [{"image": "absent.png", "caption": "x"}] * 3, {})
    with pytest.raises(ValueError, match=r"none of the 3 pairs of .*t\.jsonl' was kept"):
        run_filter(job_config(source, tmp_path / "out"))
    assert not (tmp_path / "out" / "dataset_info.json").exists()


def test_wrong_inputs_and_outputs(tmp_path):
    source = write_tars(tmp_path / "in", 1)
    with pytest.raises(ValueError, match="config.input is not set"):
        run_filter(job_config("", tmp_path / "out"))
    with pytest.raises(ValueError, match=r"image\.max_side"):
        job_config(source, tmp_path / "out", image__max_side=0)
    with pytest.raises(ValueError, match=r"config\.dataset_name.*'My pairs'"):
        job_config(source, tmp_path / "out", dataset_name="My pairs")
    with pytest.raises(ValueError, match="config.drop_metadata=None: this key cannot be unset"):
        job_config(source, tmp_path / "out", drop_metadata=None)


def test_conversion_needs_no_spacy(tmp_path):
    source = write_tars(tmp_path / "in", 1)
    code = f"""
import sys
from diht_jax.config import load_recipe
from data_prep.filter import run_filter
config = load_recipe("configs/prep/convert.py")
config.update({{"input": {source!r}, "output": {str(tmp_path / "out")!r}, "num_workers": 0}})
assert run_filter(config) == {{}}
assert not {{"spacy", "tensorflow", "torch", "jax"}} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
