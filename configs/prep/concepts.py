r"""Concept labels: what a frozen teacher sees in each image, as 10 objects and 10 attributes.

Method: DiHT, arXiv 2301.02280, "Concept Distillation"; docs/guides/prepare/labels.md has more. The
input is a folder that data_prep.filter wrote. The numbers and the default teacher, SWAG ViT-H/14,
are recalled as the paper's: set config.teacher.swag.weights to torchvision's
vit_h_14_lc_swag-c1eb923e.pth. The licence of those weights is CC-BY-NC 4.0: they and the labels
made with them are for non-commercial use only.

Run:

    python -m data_prep.label --config prep/concepts \
        --config.input=/data/kept --config.output=/data/labelled \
        --config.teacher.swag.weights=vit_h_14_lc_swag-c1eb923e.pth

Expected: a small file of labels for each shard, which training joins (config.data.labels), the two
vocabularies, and report.html to look at. No pair is copied, unless config.merge=True.
"""

import ml_collections

from data_prep.labelling.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """The defaults of `data_prep.labelling.config` are this recipe."""
    return default_config()
