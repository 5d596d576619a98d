"""DiHT ViT-B/32 at 224 px: hard negatives and concept distillation on CAT-filtered pairs.

Method: DiHT, arXiv 2301.02280. Batch, learning rate, decay and length are ours, after OpenCLIP's
published runs on data of the same kind.

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA:

    python -m diht_jax.train --config configs/diht_vitb32.py --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it is compiled and fits (`config.topology`, docs/scaling.md):

    python -m diht_jax.compile --config configs/diht_vitb32.py

Expected: with the released DiHT weights of this architecture the official code reports 68.0%
zero-shot top-1 on ImageNet. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `arg` is "debug=True" or empty."""
    config = default_config()
    config.model.name = "diht_vitb32_224px"
    config.model.scan_layers = True
    config.model.remat = "none"
    config.total_examples = 32_000_000_000
    config.loss.alpha = 1.0
    config.loss.beta = 0.25
    config.concepts.object_weight = 1.0
    config.concepts.attribute_weight = 1.0
    config.optimizer.learning_rate = 1e-3
    config.data.batch_size = 65536
    config.topology = "v5e:16x16"
    config.mesh.fsdp = 8
    config.evaluation.every_steps = 10_000
    config.evaluation.tasks = "imagenet"
    config.checkpoint.best_metric = "imagenet/top1"
    return common.shrink(config) if common.parse_debug(arg) else config
