"""CLIP ViT-B/32 at 224 px: InfoNCE, the baseline for `diht_vitb32`.

`diht_vitb32` with another loss. Method: CLIP, arXiv 2103.00020. The comment at each value is its
source: "paper" (DiHT, arXiv 2301.02280), "recalled" (DiHT, from memory), "ours" (our own choice).

Run, after `data_prep.filter` has written its shards to DATA:

    python -m diht_jax.train --config clip_vitb32 --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it fits according to the compiler (`config.topology`,
docs/guides/scale/scale.md):

    python -m diht_jax.compile --config clip_vitb32

Expected: unknown. It has not been compared with `diht_vitb32` on the same pairs, and neither recipe
has been run at full length here.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; see `common.parse_arg` for `arg`."""
    args = common.parse_arg(arg)
    config = default_config()

    # Data.
    config.data.batch_size = 65_536  # ours, after OpenCLIP's published runs
    config.data.crop_scale = (0.9, 1.0)  # paper
    config.data.text_template = "{caption}"  # ours
    config.total_examples = 32_000_000_000  # ours; samples seen

    # Architecture.
    config.model.name = "diht_vitb32_224px"  # paper
    config.model.dtype = "bfloat16"  # mixed precision is recalled, the format is ours

    # Contrastive loss: InfoNCE.
    config.loss.kind = "softmax"  # CLIP's
    config.loss.alpha = 1.0  # InfoNCE
    config.loss.beta = 0.0  # InfoNCE: no hard negatives
    config.optimizer.max_logit_scale = 100.0  # CLIP's
    config.concepts.object_weight = 0.0  # no distillation
    config.concepts.attribute_weight = 0.0

    # Optimiser and schedule.
    config.optimizer.kind = "adamw"  # recalled
    config.optimizer.schedule = "cosine"  # recalled
    config.optimizer.learning_rate = 1e-3  # ours, after OpenCLIP; the peak
    config.optimizer.warmup_steps = 2000  # ours, after OpenCLIP
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.98  # ours, after OpenCLIP
    config.optimizer.eps = 1e-6  # ours, after OpenCLIP
    config.optimizer.weight_decay = 0.1  # ours, after OpenCLIP; matrices only
    config.optimizer.clip_global_norm = 1.0  # ours

    # Machine: affects how the step is computed, not its result.
    config.topology = "v5e:16x16"  # ours; 256 chips
    config.mesh.fsdp = 8  # ours
    config.model.scan_layers = True  # ours
    config.model.remat = "none"  # ours; what fits, see docs/guides/scale/scale.md

    # Evaluation and checkpoints: all ours.
    config.evaluation.tasks = "imagenet"
    config.evaluation.every_steps = 10_000
    config.checkpoint.best_metric = "imagenet/top1"
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_last = 3
    return common.finish(config, args)
