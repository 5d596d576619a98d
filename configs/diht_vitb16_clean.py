"""DiHT ViT-B/16 at 224 px for smaller and cleaner data, such as collections of captioned photos.

It is `diht_vitb16` with harder negatives, for captions that are seldom wrong: alpha 0.999 and beta
0.5, where web pairs have 1 and 0.25. Method: DiHT, arXiv 2301.02280. The two values are as recalled
from the paper, not checked against it; the length is ours, some 28 epochs of 70 million pairs.

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA:

    python -m diht_jax.train --config configs/diht_vitb16_clean.py --config.data.train=DATA \\
        --workdir DIR

Meant for v5e:16x16, where its step is that of `diht_vitb16`.

Expected: on its clean collection the paper reports to win 28 of its 29 zero-shot tasks, on LAION
20. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common, diht_vitb16


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = diht_vitb16.get_config()
    config.loss.alpha = 0.999
    config.loss.beta = 0.5
    config.total_examples = 2_000_000_000
    return common.finish(config, args)
