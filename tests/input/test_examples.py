"""The fast crops of training: their accuracy, and the images left to exact decoding."""

import functools
import random
import tarfile

import numpy as np
import pytest
from PIL import Image

from diht_jax.input import examples, transforms
from diht_jax.input.transforms import ImageError
from tests import make

RATIO = (3 / 4, 4 / 3)


encoded = functools.partial(make.encoded, format="JPEG")


def textured(width, height, seed=0):
    """Smooth waves and a little noise: all frequencies, as in photos."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = rng.normal(0, 6, (height, width, 3))
    for channel in range(3):
        for period in (400, 90, 25, 9):
            angle, phase = rng.uniform(0, 2 * np.pi, 2)
            wave = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period
            pixels[..., channel] += period**0.6 * np.sin(wave + phase)
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def exact_crop(data, size, seed, scale=(0.9, 1.0)):
    return transforms.train_transform(
        transforms.decode_rgb(data), size, np.random.default_rng(seed), scale
    )


def fast_crop(data, size, seed, scale=(0.9, 1.0)):
    return examples.plan_random_crop(data, size, np.random.default_rng(seed), scale)()


def psnr(ours, exact):
    difference = ours.astype(np.float64) - exact
    return 10 * np.log10(255**2 / max(np.mean(difference**2), 1e-4))


@pytest.fixture(scope="module")
def photos(shared_data):
    with tarfile.open(shared_data / "photos.tar") as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".jpg")]
        return [tar.extractfile(member).read() for member in members[::3]]


def compare_with_exact(photos, size):
    """Returns the PSNR (dB) and mean absolute difference (grey levels) of each photo.

    Ground truth is Pillow's antialiased bicubic on the full decoded photo, with the same crop.
    """
    qualities, differences, reductions = [], [], set()
    for seed, data in enumerate(photos):
        whole = transforms.decode_rgb(data)
        rng = np.random.default_rng(seed)
        box = transforms.sample_crop_box(*whole.size, rng, (0.9, 1.0), RATIO)
        reduction = examples.choose_reduction(box, size)
        box = examples.reduce_box(box, whole.size, reduction)
        exact = transforms.crop_to_square(whole, box, size).astype(np.float64)
        ours = fast_crop(data, size, seed)
        qualities.append(psnr(ours, exact))
        differences.append(np.abs(ours - exact).mean())
        reductions.add(reduction)
    return np.array(qualities), np.array(differences), reductions


@pytest.mark.parametrize(
    "size, reduction, mean, least, most_levels",
    [(224, 1, 56, 50, 1.0), (112, 2, 40, 32, 2.2), (56, 4, 39, 32, 2.2), (28, 8, 38, 32, 2.2)],
)
def test_fidelity_on_photos_decoded_whole_and_smaller(
    photos, size, reduction, mean, least, most_levels
):
    quality, difference, reductions = compare_with_exact(photos, size)
    assert reduction in reductions
    assert quality.mean() > mean and quality.min() > least
    assert difference.mean() < most_levels


def exif_with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


ORDINARY = {
    "plain": {},
    "progressive": {"progressive": True},
    "444": {"subsampling": 0},
    "422": {"subsampling": "4:2:2", "optimize": True},
    "rgb": {"keep_rgb": True},
    "upright": {"exif": exif_with_orientation(1)},
    "broken": {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff garbage"},
    "mpo": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (9, 9))]},
    "icc": {"icc_profile": b"x" * 70_000, "comment": b"long"},
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", [*ORDINARY, "grey", "tail"])
def test_ordinary_jpegs_are_decoded_fast_and_look_the_same(name, monkeypatch):
    image = textured(300, 200)
    data = encoded(image.convert("L") if name == "grey" else image, **ORDINARY.get(name, {}))
    data += b"bytes after the end" if name == "tail" else b""
    for size, scale in ((160, (0.9, 1.0)), (64, (0.3, 0.5))):
        exact = exact_crop(data, size, 1, scale)
        with monkeypatch.context() as patch:
            patch.setattr(transforms, "load_rgb", None)  # exact decoding would fail here
            ours = fast_crop(data, size, 1, scale)
        assert ours.dtype == np.uint8 and ours.shape == (size, size, 3)
        assert psnr(ours, exact) > 36
        assert name != "grey" or (ours[..., 0] == ours[..., 1]).all()


def transparent():
    rgba = np.dstack([np.asarray(textured(90, 60)), np.asarray(textured(90, 60, 7))[..., 0]])
    return Image.fromarray(rgba)


ODD = {
    "png": lambda: encoded(textured(90, 60), format="PNG"),
    "transparent": lambda: encoded(transparent(), format="PNG"),
    "cmyk": lambda: encoded(textured(90, 60).convert("CMYK")),
    "rotated": lambda: encoded(textured(90, 60), exif=exif_with_orientation(6)),
    "rotated_by_xmp": lambda: encoded(textured(90, 60), xmp=XMP),
    "webp": lambda: encoded(textured(90, 60), format="WEBP"),
    "needs_a_warning": lambda: insert_zeros(encoded(textured(90, 60))),
}
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def insert_zeros(data):
    """Inserts bytes between two segments, which libjpeg skips with a warning."""
    scan = data.index(b"\xff\xda")
    return data[:scan] + bytes(3) + data[scan:]


@pytest.mark.parametrize("name", sorted(ODD))
def test_all_else_goes_the_exact_way(name):
    data = ODD[name]()
    assert "rotated" not in name or transforms.decode_rgb(data).size == (60, 90)
    for seed in range(3):
        np.testing.assert_array_equal(fast_crop(data, 32, seed), exact_crop(data, 32, seed))


@pytest.mark.filterwarnings("ignore")
def test_damaged_jpegs_are_refused_or_read_as_exact_decoding_does():
    """Damage that only corrupts pixels must give the same pixels in both decoders."""
    rng = random.Random(0)
    files = [encoded(textured(64, 48)), encoded(textured(64, 48), progressive=True)]
    readable = refused = 0
    for data in files:
        for _ in range(150):
            damaged = bytearray(data)
            for _ in range(rng.choice((1, 2, 6))):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
            damaged = bytes(damaged)
            try:
                exact = exact_crop(damaged, 48, 0)
            except ImageError as error:
                with pytest.raises(ImageError) as ours:
                    fast_crop(damaged, 48, 0)
                assert ours.value.reason == error.reason
                refused += 1
            else:
                assert psnr(fast_crop(damaged, 48, 0), exact) > 30
                readable += 1
    assert readable > 30 and refused > 30


def test_scaling_is_pillows_to_a_rounding_with_and_without_the_fast_resizer(monkeypatch):
    pixels = np.asarray(textured(411, 305))
    exact = transforms.crop_to_square(Image.fromarray(pixels), (7, 3, 391, 300), 224)
    view = pixels[3:300, 7:391]
    scaled = examples.scale_to_square(view, 224)
    assert psnr(scaled, exact) > 53
    monkeypatch.setattr(examples, "cykooz_resizer", None)
    np.testing.assert_array_equal(examples.scale_to_square(view, 224), exact)
