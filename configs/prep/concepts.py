r"""Concept labels: 10 objects and 10 attributes per image, predicted by a frozen teacher.

Method: DiHT, arXiv 2301.02280, "Concept Distillation"; see docs/guides/prepare/labels.md. The input
is an output folder of data_prep.filter. The numbers and the default teacher, SWAG ViT-H/14, are the
paper's, recalled from memory: set config.teacher.swag.weights to torchvision's
vit_h_14_lc_swag-c1eb923e.pth. The licence of those weights is CC-BY-NC 4.0: they and the labels
made with them are for non-commercial use only.

Run:

    python -m data_prep.label --config prep/concepts \
        --config.input=/data/kept --config.output=/data/labelled \
        --config.teacher.swag.weights=vit_h_14_lc_swag-c1eb923e.pth

Expected: a small file of labels per shard, which training joins (config.data.labels), the two
vocabularies, and report.html for inspection. Pairs are not copied, unless config.merge=True.
"""

import ml_collections

from data_prep.labelling.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of `data_prep.labelling.config`."""
    return default_config()
