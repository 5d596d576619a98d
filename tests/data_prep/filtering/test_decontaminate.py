"""Pictures of evaluation sets: the hashes against SciPy, and what the filter drops."""

import io

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from data_prep.duplicates import image_hashes
from data_prep.filter import run_filter
from data_prep.filtering.replay import Replay
from data_prep.reports.summary import read_report
from diht_jax.data.images.decode import decode_rgb
from tests.data_prep.filtering.jobs import job_config, read_dropped, read_records


def _scene(seed: int, side: int = 96) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def _encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _write_folder(folder, pictures: dict[str, bytes]) -> str:
    """A table of pictures."""
    folder.mkdir()
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    lines = [f'{{"image": "{name}", "caption": "{name}"}}' for name in pictures]
    (folder / "t.jsonl").write_text("\n".join(lines))
    return str(folder / "t.jsonl")


@pytest.mark.parametrize("seed", range(5))
def test_the_perceptual_hash_is_that_of_the_cosine_transform(seed):
    image = _scene(seed)
    for number, picture in enumerate((image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
        small = picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
        lowest = scipy.fft.dctn(np.asarray(small, np.float64))[:8, :8]
        # scipy scales row and column 0 by 1 like the others, as the formula does.
        bits = "".join("1" if value > np.median(lowest) else "0" for value in lowest.ravel())
        found = image_hashes.hash_picture(image).perceptual[number]
        assert (found ^ int(bits, 2)).bit_count() <= number  # greys of a mirror image are rounded


def test_edited_copies_are_near_and_others_far():
    original = image_hashes.hash_picture(_scene(0))
    for edited in (
        _scene(0).resize((40, 40), Image.Resampling.BICUBIC),
        decode_rgb(_encode(_scene(0), "JPEG", quality=40)),
        _scene(0).point(lambda value: value * 3 // 4 + 20),
    ):
        other = image_hashes.hash_picture(edited)
        assert other.pixels != original.pixels
        assert (other.perceptual[0] ^ original.perceptual[0]).bit_count() <= 6
    far = [image_hashes.hash_picture(_scene(seed)).perceptual[0] for seed in range(1, 40)]
    assert min((value ^ original.perceptual[0]).bit_count() for value in far) > 10
    assert image_hashes.hash_picture(Image.new("RGB", (9, 9), "red")).perceptual is None


def test_an_index_finds_what_a_loop_over_all_finds(monkeypatch):
    monkeypatch.setattr(image_hashes, "_CHUNK", 50)  # in several portions
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
        expected = (f"k{least[1]}", least[0]) if least[0] <= 5 else None
        assert match == expected
    assert any(found) and not all(found)
    equal = image_hashes.PictureHash(pixels[1].tobytes(), None)
    assert index.find([equal, None], None) == [("k1", None), None]


def test_pictures_of_evaluation_sets_are_dropped_and_counted_by_set(tmp_path):
    red = _encode(Image.new("RGB", (20, 20), "red"), "PNG")
    first = _write_folder(tmp_path / "a", {"0.png": _encode(_scene(0), "PNG"), "red.png": red})
    second = _write_folder(tmp_path / "b", {"7.png": _encode(_scene(7), "PNG")})
    image_hashes.write_index(tmp_path / "b.npz", image_hashes.make_index(second))
    source = _write_folder(
        tmp_path / "in",
        {
            "same.bmp": _encode(_scene(0), "BMP"),  # other bytes, equal pixels
            "small.jpg": _encode(_scene(0, 48), "JPEG"),
            "mirror.png": _encode(_scene(7).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
            "red.png": red,
            "blue.png": _encode(Image.new("RGB", (20, 20), "blue"), "PNG"),
            "other.png": _encode(_scene(3), "PNG"),
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
    samples = {s["caption"]: s.get("evidence") for s in read_report(tmp_path / "out").samples}
    assert samples["same.bmp"].endswith(" of first: equal pixels")
    assert " of second: " in samples["mirror.png"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Dropped, decontaminate: second" in page and "of 64 bits differ" in page
    sets = {"first": first, "second": second}  # the same pictures, not as an index
    config = job_config(
        source, tmp_path / "exact", decontaminate__sets=sets, decontaminate__perceptual=False
    )
    assert run_filter(config) == {}
    assert read_dropped(tmp_path / "exact")["decontaminate"] == {"first": 2}
    again = Replay(str(tmp_path / "exact")).run()  # without the sets
    assert again.funnel.dropped["decontaminate"] == {"first": 2}


def test_keys_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"config\.decontaminate\.sets='/data/a\.tar'; expected"):
        job_config("in.tar", tmp_path, decontaminate__sets="/data/a.tar")
    with pytest.raises(ValueError, match=r"config\.decontaminate\.max_bits=40; expected 0 to 16"):
        job_config("in.tar", tmp_path, decontaminate__max_bits=40)
    (tmp_path / "x.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="expected an index of python -m"):
        image_hashes.open_index(str(tmp_path / "x.npz"))
