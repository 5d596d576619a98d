"""CLIP ViT-B/32 at 224 px: InfoNCE, the baseline that `diht_vitb32` is compared with.

It is `diht_vitb32` with another loss. Method: CLIP, arXiv 2103.00020.

Run, after `data_prep.filter` has written its shards to DATA:

    python -m diht_jax.train --config configs/clip_vitb32.py --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it fits as the compiler reports (`config.topology`, docs/scaling.md):

    python -m diht_jax.compile --config configs/clip_vitb32.py

Expected: below `diht_vitb32` on the same pairs. This recipe has not been run at full length here.
"""

import ml_collections

from configs import diht_vitb32


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    config = diht_vitb32.get_config(arg)
    config.loss.beta = 0.0
    config.concepts.object_weight = 0.0
    config.concepts.attribute_weight = 0.0
    return config
