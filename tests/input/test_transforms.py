"""Images: decoding against hand-made files, scaling against torchvision, and `ImageError`."""

import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diht_jax.input import transforms
from diht_jax.input.transforms import ImageError, check_readable, decode_rgb
from tests.fuzz import framing
from tests.make import encoded, noise


def _decode(data: bytes) -> np.ndarray:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def _png(width, height, depth, colour_type, samples, *chunks) -> bytes:
    """Encodes an array of the file's integers."""
    rows = np.asarray(samples).astype(">u2" if depth == 16 else "u1").reshape(height, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return framing.png(width, height, data, *chunks, depth=depth, colour_type=colour_type)


def _on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composites `colour` with `alpha`, both in [0, 1], on white; float64 grey levels."""
    return 255.0 * (colour * alpha[..., None] + 1.0 - alpha[..., None])


def test_alpha_is_composed_on_white():
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    expected = _on_white(rgba[..., :3] / 255, rgba[..., 3] / 255)
    for name, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        got = _decode(encoded(Image.fromarray(rgba), name, **options))
        assert np.abs(got - expected).max() <= 1
        assert (got[0] == 255).all()
        np.testing.assert_array_equal(got[1], rgba[1, :, :3])


_PALETTE = framing.chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255, 10, 20, 30]))


def _key(*values) -> bytes:
    return framing.chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # Grey with alpha; a palette with and without an alpha for each entry.
        (_png(3, 1, 8, 4, [0, 0, 0, 128, 200, 255]), [[255] * 3, [127] * 3, [200] * 3]),
        (
            _png(3, 1, 8, 3, [0, 1, 2], _PALETTE, framing.chunk(b"tRNS", bytes([255, 0, 128]))),
            [[255, 0, 0], [255, 255, 255], [132, 137, 142]],
        ),
        (_png(3, 1, 8, 3, [0, 1, 2], _PALETTE), [[255, 0, 0], [0, 0, 255], [10, 20, 30]]),
        # A colour that means transparent, with 8 and 16 bits.
        (_png(2, 1, 8, 2, [10, 20, 30, 10, 20, 31], _key(10, 20, 30)), [[255] * 3, [10, 20, 31]]),
        (_png(2, 1, 8, 0, [7, 8], _key(7)), [[255] * 3, [8] * 3]),
        (_png(2, 1, 16, 0, [513, 514], _key(513)), [[255] * 3, [2] * 3]),
        # 16 bits per channel, with and without alpha.
        (_png(2, 1, 16, 2, [0, 65535, 32768, 256, 65279, 100]), [[0, 255, 127.5], [1, 254, 0.4]]),
        (_png(2, 1, 16, 6, [0, 0, 0, 0, 0, 0, 0, 65535]), [[255] * 3, [0] * 3]),
    ],
)
def test_every_kind_of_png_is_decoded_on_white(data, expected):
    assert np.abs(_decode(data)[0] - np.array(expected)).max() <= 1


def test_gif_takes_the_first_frame_and_its_transparency():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (_decode(data) == [255, 0, 0]).all()
    still = Image.new("P", (2, 1))
    still.putpalette([255, 0, 0, 0, 255, 0])
    still.putpixel((1, 0), 1)
    assert _decode(encoded(still, "GIF", transparency=0))[0].tolist() == [[255] * 3, [0, 255, 0]]


def test_sixteen_bits_are_scaled():
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    expected = values / 65535 * 255
    files = {
        "png": _png(8, 8, 16, 0, values),
        "pgm": b"P5 8 8 65535\n" + values.astype(">u2").tobytes(),
        "tiff": encoded(Image.fromarray(values), "TIFF"),
    }
    for name, data in files.items():
        got = _decode(data)
        assert np.abs(got - expected[..., None]).max() <= 0.51, name


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])  # Pillow writes JPEG inverted, as Adobe does
def test_cmyk(name):
    inks = np.array([0, 255, 128, 64], np.uint8)
    image = Image.fromarray(np.broadcast_to(inks, (16, 16, 4)).copy(), mode="CMYK")
    options = {"quality": 100} if name == "JPEG" else {}
    data = encoded(image, name, **options)
    assert name != "JPEG" or b"Adobe" in data
    expected = 255 * (1 - inks[:3] / 255) * (1 - inks[3] / 255)
    assert np.abs(_decode(data) - expected).max() <= 3


# The transform that turns the stored image upright, by the EXIF standard.
_UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", sorted(_UPRIGHT))
def test_exif_orientation(orientation):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8], stored[8:, 16:] = (255, 0, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    sharp = {"quality": 100, "subsampling": 0}
    for name, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", sharp)):
        got = _decode(encoded(Image.fromarray(stored), name, exif=exif, **options))
        difference = np.abs(got.astype(int) - _UPRIGHT[orientation](stored))
        assert difference.mean() < (1 if name == "JPEG" else 1e-9), name


def _bomb(width, height) -> bytes:
    return _png(width, height, 8, 2, np.zeros((height, 0)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "unreadable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unreadable"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unreadable"),
        (_bomb(9000, 9000), "too_large"),
        (_bomb(8192, 8192), "unreadable"),  # a valid header without the pixels
    ],
)
@pytest.mark.parametrize("function", [decode_rgb, check_readable])
def test_refusals_have_reasons(data, reason, function):
    with pytest.raises(ImageError) as error:
        function(data)
    assert error.value.reason == reason
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {})],
)
def test_truncation_is_found_by_both(name, options):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), name, **options)
    assert check_readable(data) == (name, 64, 64)
    for share in (0.1, 0.5, 0.9):
        for function in (decode_rgb, check_readable):
            with pytest.raises(ImageError) as error:
                function(data[: int(len(data) * share)])
            assert error.value.reason == "unreadable"


SIZES = [
    (640, 480),
    (333, 517),
    (47, 31),
    (225, 224),
    (224, 224),
    (1, 1),
    (1000, 37),
    (3, 800),
]


def torchvision_eval(image, size):
    from torchvision.transforms import InterpolationMode, functional

    resized = functional.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
    return np.asarray(functional.center_crop(resized, size))


def largest_difference(ours, theirs):
    assert ours.dtype == theirs.dtype == np.uint8 and ours.shape == theirs.shape
    return np.abs(ours.astype(int) - theirs.astype(int)).max()


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [31, 224])
def test_eval_transform_equals_torchvision(width, height, size):
    image = noise(0, (width, height))
    ours = transforms.eval_transform(image, size)
    assert ours.shape == (size, size, 3) and ours.flags.writeable and ours.flags.c_contiguous
    assert largest_difference(ours, torchvision_eval(image, size)) <= 1


def test_only_the_centre_of_a_thread_like_picture_is_scaled():
    """2 x 2000 at 224 pixels would need 224 x 224,000 in between: 150 MB, or more."""
    for image in (noise(0, (2, 2000)), noise(0, (2000, 2))):
        ours = transforms.eval_transform(image, 224)
        assert largest_difference(ours, torchvision_eval(image, 224)) <= 1
        assert ours.std() > 20
    image = noise(0, (1, 60_000))  # 224 x 13,440,000 pixels
    centre = transforms.eval_transform(image.crop((0, 29_900, 1, 30_100)), 224)
    assert largest_difference(transforms.eval_transform(image, 224), centre) <= 1


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [32, 224])
def test_train_transform_equals_torchvision_on_the_same_box(width, height, size):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    image = noise(0, (width, height))
    scale, ratio = (0.3, 1.0), (3 / 4, 4 / 3)
    box = transforms.sample_crop_box(width, height, np.random.default_rng(5), scale, ratio)
    left, top, right, bottom = box
    expected = resized_crop(
        image, top, left, bottom - top, right - left, [size, size], InterpolationMode.BICUBIC
    )
    ours = transforms.train_transform(image, size, np.random.default_rng(5), scale, ratio)
    assert ours.flags.writeable
    np.testing.assert_array_equal(ours, np.asarray(expected))


def describe_boxes(boxes, width, height):
    """Returns area fractions, log aspect ratios, and positions in [0, 1], of boxes [n, 4]."""
    left, top, right, bottom = np.asarray(boxes, float).T
    box_width, box_height = right - left, bottom - top
    return {
        "area": box_width * box_height / (width * height),
        "log_aspect": np.log(box_width / box_height),
        "left": left / width,
        "top": top / height,
    }


@pytest.mark.parametrize("width, height, scale", [(500, 375, (0.9, 1.0)), (300, 900, (0.08, 1.0))])
def test_crops_are_distributed_as_torchvision_draws_them(width, height, scale):
    import torch
    from torchvision.transforms import RandomResizedCrop

    ratio, count = (3 / 4, 4 / 3), 3000
    rng = np.random.default_rng(11)
    ours = [transforms.sample_crop_box(width, height, rng, scale, ratio) for _ in range(count)]
    torch.manual_seed(11)
    image = Image.new("RGB", (width, height))
    theirs = []
    for _ in range(count):
        top, left, box_height, box_width = RandomResizedCrop.get_params(image, scale, ratio)
        theirs.append((left, top, left + box_width, top + box_height))
    expected = describe_boxes(theirs, width, height)
    for name, values in describe_boxes(ours, width, height).items():
        assert stats.ks_2samp(values, expected[name]).pvalue > 1e-3, name


@pytest.mark.parametrize("width, height", [(1000, 10), (10, 1000), (3, 7), (7, 3), (641, 101)])
def test_fallback_crop_equals_torchvision(width, height):
    from torchvision.transforms import RandomResizedCrop

    scale, ratio = (0.9, 1.0), (0.99, 1.01)  # never fits in these images
    rng = np.random.default_rng(0)
    left, top, right, bottom = transforms.sample_crop_box(width, height, rng, scale, ratio)
    expected = RandomResizedCrop.get_params(Image.new("RGB", (width, height)), scale, ratio)
    assert (top, left, bottom - top, right - left) == expected


def test_normalize_equals_torchvision():
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import functional

    pixels = np.array(noise(0, (20, 16)))
    expected = functional.normalize(
        functional.to_tensor(pixels), OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    )
    expected = expected.permute(1, 2, 0).numpy()
    on_device = jax.jit(transforms.normalize)(jnp.asarray(pixels)[None])
    assert on_device.dtype == jnp.float32 and on_device.shape == (1, 16, 20, 3)
    np.testing.assert_allclose(on_device[0], expected, atol=2e-6)
    np.testing.assert_allclose(transforms.normalize(pixels), expected, atol=2e-6)
    half = jax.jit(lambda images: transforms.normalize(images, jnp.bfloat16))(pixels)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, jnp.asarray(on_device[0]).astype(jnp.bfloat16))
