"""Decontamination: image hashes against SciPy, and the pictures that the filter drops."""

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from data_prep.decisions.report import read_report
from data_prep.duplicates import image_hashes
from data_prep.filter import run_filter
from data_prep.filtering import config as filter_config
from data_prep.filtering.replay import Replay
from data_prep.steps.base import Candidate
from data_prep.steps.known_pictures import DecontaminateStep
from diht_jax import load_model
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from tests.data_prep.duplicates.jobs import scene
from tests.data_prep.filtering.jobs import (
    job_config,
    read_dropped,
    read_records,
    write_clip,
    write_table,
)
from tests.make import encoded


def _scene(seed: int, side: int = 96) -> Image.Image:
    return scene(seed, 6, (side, side))


def _write_folder(folder, pictures: dict[str, bytes]) -> str:
    """Writes a table of pictures with their names as captions."""
    return write_table(folder, [{"image": name, "caption": name} for name in pictures], pictures)


@pytest.mark.parametrize("seed", range(5))
def test_the_perceptual_hash_is_that_of_the_cosine_transform(seed):
    image = _scene(seed)
    for number, picture in enumerate((image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        small = picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        lowest = scipy.fft.dctn(np.asarray(small, np.float64))[:8, :8]
        # Without normalisation, scipy scales row and column 0 like the others, as in the formula.
        bits = "".join("1" if value > np.median(lowest) else "0" for value in lowest.ravel())
        found = image_hashes.hash_picture(image).perceptual[number]
        assert (found ^ int(bits, 2)).bit_count() <= number  # mirrored greys may round otherwise


def test_an_index_finds_what_a_loop_over_all_finds(monkeypatch):
    monkeypatch.setattr(image_hashes, "_CHUNK", 50)  # forces several chunks
    generator = np.random.default_rng(0)
    known = [int(value) for value in generator.integers(0, 2**63, 30, dtype=np.uint64)]
    pixels = np.arange(30 * 16, dtype=np.uint8).reshape(30, 16)
    index = image_hashes.Index(
        np.array([f"k{i}" for i in range(30)]),
        pixels,
        np.array(known, np.uint64),
        np.arange(30) > 2,
    )
    asked = [
        image_hashes.PictureHash(bytes(16), (value ^ mask, value ^ mask ^ 7))
        for value, mask in zip(known, generator.integers(0, 2**12, 30).tolist(), strict=True)
    ]
    found = index.find(asked, 5)
    for picture, match in zip(asked, found, strict=True):
        least = min(
            ((h ^ value).bit_count(), i)
            for i, value in enumerate(known) if i > 2 for h in picture.perceptual
        )  # fmt: skip
        expected = (f"k{least[1]}", f"{least[0]} of 64 bits differ") if least[0] <= 5 else None
        assert match == expected
    assert any(found) and not all(found)
    equal = image_hashes.PictureHash(pixels[1].tobytes(), None)
    assert index.find([equal, None], None) == [("k1", "equal pixels"), None]


@pytest.mark.parametrize(("max_pixels", "expected"), [(96 * 96, "a"), (96 * 96 - 1, None)])
def test_pictures_are_compared_up_to_the_limit_of_the_filter(tmp_path, max_pixels, expected):
    picture = encoded(_scene(0))
    known = image_hashes.make_index(_write_folder(tmp_path / "a", {"0.png": picture}))
    image_hashes.write_index(tmp_path / "a.npz", known)
    settings = {"decontaminate__sets": f"a={tmp_path}/a.npz", "image__max_pixels": max_pixels}
    config = job_config("a.tar", tmp_path / "out", **settings)
    step = DecontaminateStep(config, SourceShard("webdataset", "a.tar"))
    found = step.measure([Candidate.of(Pair("k", picture, "a scene"))])
    assert found["decontaminate"] == [expected]


def test_pictures_of_evaluation_sets_are_dropped_and_counted_by_set(tmp_path):
    red = encoded(Image.new("RGB", (20, 20), "red"), "PNG")
    first = _write_folder(tmp_path / "a", {"0.png": encoded(_scene(0), "PNG"), "red.png": red})
    second = _write_folder(tmp_path / "b", {"7.png": encoded(_scene(7), "PNG")})
    image_hashes.write_index(tmp_path / "b.npz", image_hashes.make_index(second))
    source = _write_folder(
        tmp_path / "in",
        {
            "same.bmp": encoded(_scene(0), "BMP"),  # other bytes, equal pixels
            "small.jpg": encoded(_scene(0, 48), "JPEG"),
            "mirror.png": encoded(_scene(7).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
            "red.png": red,
            "blue.png": encoded(Image.new("RGB", (20, 20), "blue"), "PNG"),
            "other.png": encoded(_scene(3), "PNG"),
            "broken.png": b"<html>",
        },
    )
    sets = f"first={first},second={tmp_path / 'b.npz'}"
    config = job_config(source, tmp_path / "out", decontaminate__sets=sets)
    assert run_filter(config) == {}
    assert read_dropped(tmp_path / "out") == {
        "decontaminate": {"first": 3, "second": 1},
        "image": {"unreadable": 1},
    }
    assert [record.caption for record in read_records(tmp_path / "out")] == [
        "blue.png",
        "other.png",
    ]
    samples = {s["caption"]: s.get("evidence") for s in read_report(tmp_path / "out")["samples"]}
    assert samples["same.bmp"].endswith(" of first: equal pixels")
    assert " of second: " in samples["mirror.png"]
    sets = {"first": first, "second": second}  # the same pictures, as sources instead of an index
    config = job_config(
        source, tmp_path / "exact", decontaminate__sets=sets, decontaminate__perceptual=False
    )
    assert run_filter(config) == {}
    assert read_dropped(tmp_path / "exact")["decontaminate"] == {"first": 2}
    again = Replay(str(tmp_path / "exact")).run()  # without the sets
    assert again.funnel.dropped()["decontaminate"] == {"first": 2}


def test_pictures_are_compared_by_embeddings_of_a_model_or_of_files(tmp_path):
    model = write_clip(tmp_path / "a.safetensors", image_size=32)
    scenes = {seed: _scene(seed) for seed in range(24)}
    sets = {
        name: _write_folder(tmp_path / name, {f"{i}.png": encoded(scenes[i], "PNG") for i in own})
        for name, own in (("first", range(6)), ("second", range(6, 12)))
    }
    pictures = {f"other{i}.png": encoded(scenes[i], "PNG") for i in range(12, 24)}
    pictures |= {
        "jpeg1.jpg": encoded(scenes[1], "JPEG", quality=50),
        "small2.jpg": encoded(scenes[2].resize((48, 48)), "JPEG"),
        "crop7.png": encoded(scenes[7].crop((1, 1, 95, 95)), "PNG"),
        "bright8.png": encoded(scenes[8].point(lambda value: value * 15 // 16 + 8), "PNG"),
        "broken.png": b"<html>",
    }
    source = _write_folder(tmp_path / "in", pictures)
    loaded, options = load_model(model, batch_size=4), EmbedOptions(modalities=["image"])
    rows = {}
    for name, path in (*sets.items(), ("pairs", source)):
        embed_source(loaded, path, tmp_path / "embedded" / name, options)
        (written,) = (tmp_path / "embedded" / name).glob("*.npz")
        rows[name] = np.load(written)["image_emb"]
    # An untrained model embeds all pictures similarly.
    first, second = ((rows["pairs"] @ rows[n].T).max(1) >= 0.9999 for n in sets)
    expected = {"first": int(first.sum()), "second": int((second & ~first).sum())}
    assert 0 < expected["second"] < expected["first"] < 16
    embedded = ",".join(f"{name}={tmp_path}/embedded/{name}" for name in sets)
    for name, given in (
        ("by_model", {"model": model, "batch_size": 4}),
        ("by_files", {"pairs": f"{tmp_path}/embedded/pairs"}),
    ):
        pixels = {"decontaminate__sets": f"first={sets['first']}"}
        config = job_config(source, tmp_path / name, decontaminate__perceptual=False, **pixels)
        config.decontaminate.embeddings.update({"sets": embedded, "min_cosine": 0.9999} | given)
        filter_config.check_config(config)
        assert run_filter(config) == {}
        assert read_dropped(tmp_path / name)["decontaminate"] == expected
        samples = read_report(tmp_path / name)["samples"]
        assert any(" of second: cosine " in sample.get("evidence", "") for sample in samples)
        again = Replay(str(tmp_path / name)).run()  # without the sets
        assert again.funnel.dropped()["decontaminate"] == expected
