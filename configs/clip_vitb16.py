"""CLIP ViT-B/16 at 224 px on LAION-CAT: the one published run whose settings are known.

InfoNCE on the 440 million pairs that CAT leaves of LAION, with the settings of SemDeDup (arXiv
2303.09540, tables A3 to A6): batch 33,792, learning rate 5e-4, weight decay 0.2, 2,000 warm-up
steps, 32 epochs. A check of the whole chain before DiHT's own losses are added.

Run, after `data_prep.filter` has written its shards to DATA:

    python -m diht_jax.train --config configs/clip_vitb16.py --config.data.train=DATA --workdir DIR

Meant for v5e:16x16 (`config.topology`, docs/scaling.md); whether it fits another machine:

    python -m diht_jax.compile --config configs/clip_vitb16.py --topology h100:8

Expected: 68.7% zero-shot top-1 on ImageNet with LAION-CAT, as published there; the released DiHT
B/16 has 72.2%. This recipe has not been run at full length here, and not compiled for that pod.
"""

import ml_collections

from configs import common, diht_vitb16


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = diht_vitb16.get_config()
    config.loss.beta = 0.0
    config.concepts.object_weight = 0.0
    config.concepts.attribute_weight = 0.0
    config.total_examples = 32 * 440_000_000
    config.data.batch_size = 33_792
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 0.2
    config.optimizer.warmup_steps = 2000
    return common.finish(config, args)
