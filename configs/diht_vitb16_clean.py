r"""DiHT ViT-B/16 at 224 px for smaller and cleaner data, such as collections of captioned photos.

`diht_vitb16` with harder negatives, for captions that are seldom wrong: alpha 0.999 and beta 0.5,
where web pairs have 1 and 0.25; some 28 epochs of 70 million pairs. Method: DiHT, arXiv 2301.02280.
Each value says where it is from: "paper" is read in the paper's official code or in papers that
describe it, "recalled" is from memory of the paper and not checked, "ours" is our own choice.

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA:

    python -m diht_jax.train --config diht_vitb16_clean --config.data.train=DATA \
        --workdir DIR

Meant for v5e:16x16, where its step is that of `diht_vitb16`.

Expected: on its clean collection the paper reports to win 28 of its 29 zero-shot tasks, on LAION
20. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = default_config()

    # Data.
    config.data.batch_size = 65_536  # ours, after OpenCLIP's published runs
    config.data.crop_scale = (0.9, 1.0)  # paper
    config.data.text_template = "{caption}"  # ours
    config.total_examples = 2_000_000_000  # ours; samples seen

    # Architecture.
    config.model.name = "diht_vitb16_224px"  # paper
    config.model.dtype = "bfloat16"  # mixed precision is recalled, the format is ours

    # Contrastive loss: HN-NCE.
    config.loss.kind = "softmax"  # paper
    config.loss.alpha = 0.999  # recalled
    config.loss.beta = 0.5  # recalled
    config.optimizer.max_logit_scale = 100.0  # ours, as CLIP

    # Concept distillation: two linear heads, dropped at inference.
    config.concepts.object_weight = 1.0  # ours
    config.concepts.attribute_weight = 1.0  # ours
    config.concepts.num_objects = 10_000  # ours; room for the vocabulary of the labels
    config.concepts.num_attributes = 2_000  # ours
    config.concepts.top_k = 10  # recalled; labels of each kind from a record
    config.concepts.feature = "pooled"  # ours; before the projection
    config.concepts.learning_rate_multiplier = 10.0  # recalled
    config.concepts.weight_decay_multiplier = 0.01  # recalled

    # Optimiser and schedule.
    config.optimizer.kind = "adamw"  # recalled
    config.optimizer.schedule = "cosine"  # recalled
    config.optimizer.learning_rate = 1e-3  # ours, after OpenCLIP; the peak
    config.optimizer.warmup_steps = 2000  # ours, after OpenCLIP
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.98  # ours, after OpenCLIP
    config.optimizer.eps = 1e-6  # ours, after OpenCLIP
    config.optimizer.weight_decay = 0.1  # ours, after OpenCLIP; matrices only
    config.optimizer.clip_global_norm = 1.0  # ours

    # Machine: changes how the step is computed, and nothing of the result.
    config.topology = "v5e:16x16"  # ours; 256 chips
    config.mesh.fsdp = 8  # ours
    config.model.scan_layers = False  # ours; unrolled, a TPU copies nothing from layer to layer
    config.model.remat = "minimal"  # ours; what fits, see docs/guides/scale/scale.md

    # Evaluation and checkpoints: all ours.
    config.evaluation.tasks = "imagenet"
    config.evaluation.every_steps = 10_000
    config.checkpoint.best_metric = "imagenet/top1"
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_last = 3
    return common.finish(config, args)
