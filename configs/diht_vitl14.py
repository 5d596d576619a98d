"""DiHT ViT-L/14 at 224 px: hard negatives and concept distillation on CAT-filtered pairs.

Method: DiHT, arXiv 2301.02280. The comment at each value is its source: "paper" (the paper's
official code, or papers that describe it), "recalled" (the paper, from memory, not checked), "ours"
(our own choice).

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA:

    python -m diht_jax.train --config diht_vitl14 --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it fits according to the compiler (`config.topology`,
docs/guides/scale/scale.md):

    python -m diht_jax.compile --config diht_vitl14

Expected: the official code reports, with the released DiHT weights of this architecture, 77.0%
zero-shot top-1 on ImageNet. This recipe has not been run at full length here.
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
    config.total_examples = 16_000_000_000  # ours; samples seen

    # Architecture.
    config.model.name = "diht_vitl14_224px"  # paper
    config.model.dtype = "bfloat16"  # mixed precision is recalled, the format is ours

    # Contrastive loss: HN-NCE.
    config.loss.kind = "softmax"  # paper
    config.loss.alpha = 1.0  # recalled
    config.loss.beta = 0.25  # recalled
    config.optimizer.max_logit_scale = 100.0  # ours, as CLIP

    # Concept distillation: two linear heads, dropped at inference.
    config.concepts.object_weight = 1.0  # ours
    config.concepts.attribute_weight = 1.0  # ours
    config.concepts.num_objects = 10_000  # ours; room for the vocabulary of the labels
    config.concepts.num_attributes = 2_000  # ours
    config.concepts.top_k = 10  # recalled; labels per kind and record
    config.concepts.feature = "pooled"  # ours; before the projection
    config.concepts.learning_rate_multiplier = 10.0  # recalled
    config.concepts.weight_decay_multiplier = 0.01  # recalled

    # Optimiser and schedule.
    config.optimizer.kind = "adamw"  # recalled
    config.optimizer.schedule = "cosine"  # recalled
    config.optimizer.learning_rate = 5e-4  # ours, after OpenCLIP; the peak
    config.optimizer.warmup_steps = 2000  # ours, after OpenCLIP
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.98  # ours, after OpenCLIP
    config.optimizer.eps = 1e-6  # ours, after OpenCLIP
    config.optimizer.weight_decay = 0.1  # ours, after OpenCLIP; matrices only
    config.optimizer.clip_global_norm = 1.0  # ours

    # Machine: affects how the step is computed, not its result.
    config.topology = "v5e:16x16"  # ours; 256 chips
    config.mesh.fsdp = 8  # ours
    config.model.scan_layers = False  # ours; fewer copies on TPUs, but compiles for longer
    config.model.remat = "full"  # ours; what fits, see docs/guides/scale/scale.md

    # Evaluation and checkpoints: all ours.
    config.evaluation.tasks = "imagenet"
    config.evaluation.every_steps = 10_000
    config.checkpoint.best_metric = "imagenet/top1"
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_last = 3
    return common.finish(config, args)
