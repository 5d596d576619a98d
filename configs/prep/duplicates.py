r"""Duplicates in a data set: exact copies, and near-duplicates by the method of SemDeDup.

Method: SemDeDup, arXiv 2303.09540, on embeddings of `diht_jax.embed` (the paper: CLIP ViT-B/16) or,
as here, on a descriptor that finds edited copies without any model. See
docs/guides/prepare/duplicates.md.

Run:

    python -m data_prep.duplicates --config prep/duplicates \
        --config.input='/data/raw/*.tar' --config.output=/data/duplicates

Expected: a table of all pairs (parquet), dropped.arrow for the filter, and report.html with pairs
of images. To use embeddings of a model:

    python -m diht_jax.embed --model runs/b32 --input '/data/raw/*.tar' --modalities image \
        --dtype float16 --output /data/embedded

and then --config.embeddings.kind=files --config.embeddings.files=/data/embedded.
"""

import ml_collections

from data_prep.duplicates.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns a recipe for edited copies: found by descriptor, verified by thumbnail and caption.

    To find images with the same content, use embeddings of a model without verification; SemDeDup
    uses thresholds of 0.95 and more for CLIP. It drops pairs regardless of their captions, as
    with --config.other_captions=drop.
    """
    config = default_config()
    config.embeddings.kind = "descriptor"
    config.threshold = 0.6
    config.verify.correlation = 0.95
    config.clusters.probes = 2
    return config
