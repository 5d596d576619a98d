"""Names and shapes of SWAG's parameters equal torchvision's.

tests/data_prep/teachers/test_teachers.py compares the features.
"""

import jax
import numpy as np
import pytest
import torch
import torchvision
from torchvision.models.vision_transformer import VisionTransformer

from diht_jax.weights import swag
from diht_jax.weights.swag import ARCHITECTURES, swag_definition


@pytest.fixture(scope="module")
def small() -> dict[str, np.ndarray]:
    """The parameters of a small model, by torchvision's names."""
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=96
    )
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_names_of_the_published_files(small):
    published = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for name, value in small.items()
    }
    assert published.keys() != small.keys()
    found, expected = (swag.normalize_names(named) for named in (published, small))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_parameter_of_the_large_ones_has_its_place(name):
    # On torch's meta device and as shapes, without allocating the 2.5 GB of vit_h_14.
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
    missing = {k: v for k, v in small.items() if k != "encoder.layers.encoder_layer_1.ln_2.bias"}
    with pytest.raises(ValueError, match=r"w\.pth.*1 missing: encoder\.layers.*_1\.ln_2\.bias"):
        swag.from_torchvision(missing, "w.pth", heads=4)
    resnet = {"conv1.weight": np.zeros((64, 3, 7, 7)), "fc.bias": np.zeros(10)}
    with pytest.raises(ValueError, match="not a vision transformer of torchvision"):
        swag.from_torchvision(resnet, "w.pth")
