"""SWAG's vision transformer against torchvision's, with random weights."""

import jax
import numpy as np
import pytest
import torch
import torchvision
from flax import nnx
from torchvision.models.vision_transformer import VisionTransformer

from diht_jax.weights import swag
from diht_jax.weights.swag import ARCHITECTURES, swag_definition


def _arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def small(reference) -> VisionTransformer:
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=96
    )
    return reference.randomize(model)


def _features(tensors: dict[str, np.ndarray], images: np.ndarray, **options) -> np.ndarray:
    arch, params = swag.from_torchvision(tensors, "weights.pth", **options)
    graphdef, _ = swag_definition(arch, "float32")
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, images))


def _reference(model: VisionTransformer, images: np.ndarray) -> np.ndarray:
    """torchvision's feature before its classifier, in double precision."""
    heads, model.heads = model.heads, torch.nn.Identity()
    with torch.inference_mode():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        result = model.double()(pixels.double()).numpy()
    model.float().heads = heads
    return result


def _relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    return np.abs(value - reference).max() / np.abs(reference).max()


def test_features_are_torchvisions(small):
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    reference = _reference(small, images)
    features = _features(_arrays(small), images, heads=4)
    assert features.shape == (3, 64)
    assert _relative_error(features, reference) < 1e-4
    # The measure can fail: with other heads, or one parameter changed, it does.
    assert _relative_error(_features(_arrays(small), images, heads=8), reference) > 1e-2
    changed = _arrays(small)
    changed["encoder.layers.encoder_layer_2.mlp.3.bias"] = np.zeros(64, np.float32)
    assert _relative_error(_features(changed, images, heads=4), reference) > 1e-2


def test_names_of_the_published_files(small):
    images = np.random.default_rng(1).normal(size=(1, 32, 32, 3)).astype(np.float32)
    published = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for name, value in _arrays(small).items()
    }
    assert published.keys() != _arrays(small).keys()
    np.testing.assert_array_equal(
        _features(published, images, heads=4), _features(_arrays(small), images, heads=4)
    )


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_parameter_of_the_large_ones_has_its_place(name):
    # On torch's meta device and as shapes: 2.5 GB for vit_h_14 are never there.
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    trunk = swag.normalize_names(shapes)
    assert shapes.keys() - trunk.keys() == {"heads.head.weight", "heads.head.bias"}
    arch = swag.infer_architecture(trunk, "file")
    assert arch == ARCHITECTURES[name]
    assert swag.expected_shapes(arch) == trunk
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_SWAG_LINEAR_V1
    ours = jax.tree.leaves(swag_definition(arch, "float32")[1])
    head = 1000 * arch.width + 1000
    assert sum(leaf.size for leaf in ours) == weights.meta["num_params"] - head
    assert swag.URLS[name] == weights.url


def test_other_files_are_refused(small):
    good = _arrays(small)
    missing = {k: v for k, v in good.items() if k != "encoder.layers.encoder_layer_1.ln_2.bias"}
    with pytest.raises(ValueError, match=r"w\.pth.*1 missing: encoder\.layers.*_1\.ln_2\.bias"):
        swag.from_torchvision(missing, "w.pth", heads=4)
    resnet = {"conv1.weight": np.zeros((64, 3, 7, 7)), "fc.bias": np.zeros(10)}
    with pytest.raises(ValueError, match="not a vision transformer of torchvision"):
        swag.from_torchvision(resnet, "w.pth")
