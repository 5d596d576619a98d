"""CLIP ViT-B/32 at 224 px: InfoNCE, the baseline that `diht_vitb32` is compared with.

Method: CLIP, arXiv 2103.00020. What is not set here is as in `configs/diht_vitb32.py`, so that the
loss alone differs.

Run, after `data_prep.filter` has written its shards to DATA:

    python -m diht_jax.train --config clip_vitb32 --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it fits as the compiler reports (`config.topology`,
docs/guides/scale/scale.md):

    python -m diht_jax.compile --config clip_vitb32

Expected: not known. Nobody has compared it with `diht_vitb32` on the same pairs, and neither recipe
has been run at full length here.
"""

import ml_collections

from configs import common, diht_vitb32


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = diht_vitb32.get_config()

    config.loss.beta = 0.0  # InfoNCE: no hard negatives
    config.concepts.object_weight = 0.0  # no distillation
    config.concepts.attribute_weight = 0.0
    return common.finish(config, args)
