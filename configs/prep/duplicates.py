r"""Duplicates of a data set: exact copies, and near-duplicates as SemDeDup finds them.

Method: SemDeDup, arXiv 2303.09540, on embeddings of `diht_jax.embed` (the paper: CLIP ViT-B/16) or,
as here, on a descriptor that finds edited copies without any model.
docs/guides/prepare/duplicates.md has more.

Run:

    python -m data_prep.duplicates --config prep/duplicates \
        --config.input='/data/raw/*.tar' --config.output=/data/duplicates

Expected: a table of all pairs (parquet), dropped.arrow for the filter, and report.html with pairs
of pictures. For embeddings of a model:

    python -m diht_jax.embed --model runs/b32 --input '/data/raw/*.tar' --modalities image \
        --dtype float16 --output /data/embedded

and then --config.embeddings.kind=files --config.embeddings.files=/data/embedded.
"""

import ml_collections

from data_prep.duplicates.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Copies that were edited: the descriptor finds candidates, thumbnails and captions decide.

    For what merely shows the same, take embeddings of a model and no verification; of CLIP's
    SemDeDup takes a threshold of 0.95 and more. It drops pairs of any caption, as
    --config.other_captions=drop does.
    """
    config = default_config()
    config.embeddings.kind = "descriptor"
    config.threshold = 0.6
    config.verify.correlation = 0.95
    config.clusters.probes = 2
    return config
