"""The transforms against torchvision's, on Pillow images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diht_jax.input import transforms

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


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def torchvision_eval(image, size):
    from torchvision import transforms as torchvision_transforms

    transform = torchvision_transforms.Compose(
        [
            torchvision_transforms.Resize(
                size, torchvision_transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            torchvision_transforms.CenterCrop(size),
        ]
    )
    return np.asarray(transform(image))


def largest_difference(ours, theirs):
    assert ours.dtype == theirs.dtype == np.uint8 and ours.shape == theirs.shape
    return np.abs(ours.astype(int) - theirs.astype(int)).max()


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [31, 224])
def test_eval_transform_equals_torchvision(width, height, size):
    image = noise(width, height)
    ours = transforms.eval_transform(image, size)
    assert ours.shape == (size, size, 3) and ours.flags.writeable and ours.flags.c_contiguous
    assert largest_difference(ours, torchvision_eval(image, size)) <= 1


def test_only_the_centre_of_a_thread_like_picture_is_scaled():
    """2 x 2000 at 224 pixels would be 224 x 224,000 on the way: 150 MB, and more for worse."""
    for image in (noise(2, 2000), noise(2000, 2)):
        ours = transforms.eval_transform(image, 224)
        assert largest_difference(ours, torchvision_eval(image, 224)) <= 1
        assert ours.std() > 20
    image = noise(1, 60_000)  # 224 x 13,440,000 pixels
    centre = transforms.eval_transform(image.crop((0, 29_900, 1, 30_100)), 224)
    assert largest_difference(transforms.eval_transform(image, 224), centre) <= 1


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("size", [32, 224])
def test_train_transform_equals_torchvision_on_the_same_box(width, height, size):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    image = noise(width, height)
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
    """Shares of area, log aspect ratios, and places in [0, 1], of boxes [n, 4]."""
    left, top, right, bottom = np.asarray(boxes, float).T
    box_width, box_height = right - left, bottom - top
    return {
        "area": box_width * box_height / (width * height),
        "log_aspect": np.log(box_width / box_height),
        "left": left / width,
        "top": top / height,
    }


@pytest.mark.parametrize("width, height", [(500, 375), (300, 900)])
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
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

    scale, ratio = (0.9, 1.0), (0.99, 1.01)  # never fits in these pictures
    rng = np.random.default_rng(0)
    left, top, right, bottom = transforms.sample_crop_box(width, height, rng, scale, ratio)
    expected = RandomResizedCrop.get_params(Image.new("RGB", (width, height)), scale, ratio)
    assert (top, left, bottom - top, right - left) == expected


def test_normalize_equals_torchvision():
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision.transforms import functional

    pixels = np.array(noise(20, 16))
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
