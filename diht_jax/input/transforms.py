"""RGB pictures to the square uint8 arrays of a batch, and the normalisation on the device.

NumPy and Pillow only, so that workers start fast; decoding belongs in `decode.py`. Batches stay
uint8 up to the device, where `normalize` runs inside the jitted step: a quarter of the bytes to
copy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

# Of CLIP (arXiv 2103.00020), per channel, for values in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Above this, a picture is not scaled as a whole. 100 MB of pixels.
_MAX_SCALED_PIXELS = 2**25
_CROP_TRIES = 10

RESIZES = ("crop", "squash")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
INTERPOLATIONS = tuple(_FILTERS)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of the pictures of a model, by default CLIP's."""

    mean: tuple[float, float, float] = CLIP_MEAN  # per channel, for values in [0, 1]
    std: tuple[float, float, float] = CLIP_STD  # likewise
    # "crop" scales the short side and crops the centre; "squash" scales both sides, and keeps all
    # of the picture but not its aspect ratio.
    resize: str = "crop"
    interpolation: str = "bicubic"  # "bicubic" or "bilinear", both antialiased

    def __post_init__(self):
        for name, known in (("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}='{getattr(self, name)}': expected {' or '.join(known)}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name}={values}: expected three numbers, one for each channel")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std}: expected positive numbers")


def eval_transform(
    image: Image.Image, size: int, preprocessing: Preprocessing = Preprocessing()
) -> np.ndarray:
    """Makes a square of a picture: scaled and cropped, or squashed.

    Equal to torchvision's `Resize(size)` and `CenterCrop(size)`, or `Resize((size, size))`, on
    Pillow images. Ours: of a picture hundreds of times longer than wide, only the centre is scaled
    before it is cropped.

    Args:
        image: mode "RGB", any size.
        size: pixels, of both sides of the result.
        preprocessing: how it is resized; mean and deviation are for `normalize`.

    Returns:
        uint8 [size, size, 3], writable.

    Raises:
        ValueError: not an RGB picture, or no positive size.
    """
    size = _check_input(image, size)
    if preprocessing.resize == "squash":
        box = (0, 0, image.width, image.height)
        return crop_to_square(image, box, size, preprocessing.interpolation)
    if size**2 * max(image.size) / min(image.size) > _MAX_SCALED_PIXELS:
        image = _cut_off_ends(image)
    width, height = image.size
    if width <= height:
        scaled_width, scaled_height = size, int(size * height / width)
    else:
        scaled_width, scaled_height = int(size * width / height), size
    # Python's round, to even: torchvision's choice of the centre.
    left = round((scaled_width - size) / 2)
    top = round((scaled_height - size) / 2)
    scaled = image.resize((scaled_width, scaled_height), _FILTERS[preprocessing.interpolation])
    return np.array(scaled.crop((left, top, left + size, top + size)))


def train_transform(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> np.ndarray:
    """A random crop, scaled to a square (antialiased).

    `scale` is the range of the crop's share of the picture's area, `ratio` that of its width /
    height. Other arguments, result and errors are those of `eval_transform`.
    """
    size = _check_input(image, size)
    box = sample_crop_box(*image.size, rng, scale, ratio)
    return crop_to_square(image, box, size, interpolation)


def crop_to_square(
    image: Image.Image,
    box: tuple[int, int, int, int],
    size: int,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """A part of an RGB picture, scaled to a square (antialiased): uint8 [size, size, 3], writable.

    Equal to torchvision's `resized_crop` on Pillow images. `box` is left, top, right, bottom in
    pixels, inside of the picture.
    """
    return np.array(image.crop(box).resize((size, size), _FILTERS[interpolation]))


def sample_crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The crop of `RandomResizedCrop`, by torchvision's algorithm.

    The area is uniform and the aspect ratio log-uniform; a crop that does not fit is drawn again,
    ten times at most, and then the largest centre crop with an allowed ratio is taken.

    Args:
        width: of the picture, pixels.
        height: of the picture, pixels.
        rng: source of randomness.
        scale: see `train_transform`.
        ratio: see `train_transform`.

    Returns:
        left, top, right, bottom in pixels, inside of the picture.

    Raises:
        ValueError: an invalid range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < low <= high <= 1, got {tuple(scale)}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio: expected 0 < low <= high, got {tuple(ratio)}")
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_CROP_TRIES):
        # What `rng.uniform` does, in a fifth of its time.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * rng.random())
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def normalize(
    images: Any,
    dtype: Any = np.float32,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Any:
    """CLIP's normalisation of a uint8 batch, for use inside a jitted function.

    Args:
        images: uint8 [..., 3], a JAX array (traced or not) or a NumPy array.
        dtype: of the result; the arithmetic is in float32.
        mean: per channel, for values in [0, 1]; others' models may have their own.
        std: likewise.

    Returns:
        [..., 3], of the kind of array that came: (images / 255 - mean) / std.

    Raises:
        ValueError: not uint8, or no three channels at the end.
    """
    if images.dtype != np.uint8 or images.shape[-1:] != (3,):
        raise ValueError(
            "images: expected uint8 [..., 3] as the transforms give it, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    deviation = np.asarray(std, np.float64)
    factor = (1 / (255 * deviation)).astype(np.float32)
    offset = (np.asarray(mean, np.float64) / deviation).astype(np.float32)
    return (images.astype(np.float32) * factor - offset).astype(dtype)


def _cut_off_ends(image: Image.Image) -> Image.Image:
    """The centre of a long picture, sixteen times as long as wide."""
    left, top = (max(0, (side - 16 * min(image.size)) // 2) for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))


def _check_input(image: Image.Image, size: int) -> int:
    if not isinstance(image, Image.Image) or image.mode != "RGB" or 0 in image.size:
        got = f"{image.mode} {image.size}" if isinstance(image, Image.Image) else type(image)
        raise ValueError(
            f"image: expected a Pillow image of mode 'RGB' with pixels, got {got}; diht_jax.input."
            "decode.decode_rgb makes one from bytes, image.convert('RGB') from another mode"
        )
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"size: expected a positive integer of pixels, got {size!r}")
    return int(size)
