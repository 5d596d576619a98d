"""DiHT ViT-B/16 at 224 px: hard negatives and concept distillation on CAT-filtered pairs.

Method: DiHT, arXiv 2301.02280. Batch, learning rate, decay and length are ours, after OpenCLIP's
published runs on data of the same kind. What the DiHT recipes share is in `common.diht`.

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA:

    python -m diht_jax.train --config configs/diht_vitb16.py --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it fits as the compiler reports (`config.topology`, docs/scaling.md):

    python -m diht_jax.compile --config configs/diht_vitb16.py

Expected: with the released DiHT weights of this architecture the official code reports 72.2%
zero-shot top-1 on ImageNet. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = common.diht()
    config.model.name = "diht_vitb16_224px"
    config.model.remat = "minimal"
    config.total_examples = 32_000_000_000
    config.optimizer.learning_rate = 1e-3
    return common.finish(config, args)
