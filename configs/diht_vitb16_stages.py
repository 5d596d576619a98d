r"""DiHT ViT-B/16 in two stages: 112 px and 32 tokens first, then 224 px and 77.

Method: DiHT, arXiv 2301.02280, in the stages of CLIPA (arXiv 2305.07017, 2306.15658), which sees
most samples at a fraction of the cost. Each value says where it is from: "paper" is read in DiHT's
official code or in papers that describe it, "recalled" is from memory of that paper and not
checked, "CLIPA" is read in the configs of its authors, "ours" is our own choice.

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA; the stages
are runs of their own, in DIR/stage_1 and DIR/stage_2, and the same command goes on after a stop:

    python -m diht_jax.train --config diht_vitb16_stages --config.data.train=DATA --workdir DIR

`diht_vitb16_stages:stage=1` is the first one alone, and `:stage=2`, with the same DIR, the second.
A stage starts with the parameters of the one before, positions resized, with an optimiser of its
own, and at the place in the data where that one ended (docs/guides/train/stages.md).

Meant for v5e:16x16, where both fit as the compiler reports (`config.topology`,
docs/guides/scale/scale.md):

    python -m diht_jax.compile --config diht_vitb16_stages:stage=1

Expected: at best what `diht_vitb16` reaches; CLIPA finds that small models lose more by small
pictures than large ones. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config

# As many samples as `diht_vitb16` sees, a sixteenth of them at full resolution.
STAGES = (
    {
        "total_examples": 30_000_000_000,  # ours; samples seen
        "model.overrides.image_size": 112,  # CLIPA; 49 patches
        "model.overrides.context_length": 32,  # CLIPA
        "model.remat": "none",  # ours; what fits
        "model.scan_layers": True,  # ours
        "optimizer.learning_rate": 1e-3,  # ours, as CLIPA at half this batch; the peak
        "optimizer.warmup_steps": 2000,  # ours, after OpenCLIP
    },
    {
        "total_examples": 2_000_000_000,  # ours; CLIPA takes 131 million behind 2.8 billion
        "model.remat": "minimal",  # ours; what fits
        "model.scan_layers": False,  # ours, as `diht_vitb16`; fewer copies on TPUs
        "optimizer.learning_rate": 1e-4,  # CLIPA; a tenth of the first stage's
        "optimizer.warmup_steps": 400,  # CLIPA; 26 million samples
    },
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`, and `stage` is one of `STAGES`, from 1."""
    args = common.parse_arg(arg, stage=0)
    config = default_config()

    # Data.
    config.data.batch_size = 65_536  # ours, after OpenCLIP's published runs
    config.data.crop_scale = (0.9, 1.0)  # paper
    config.data.text_template = "{caption}"  # ours

    # Architecture.
    config.model.name = "diht_vitb16_224px"  # paper
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
    config.concepts.top_k = 10  # recalled; labels of each kind from a record
    config.concepts.feature = "pooled"  # ours; before the projection
    config.concepts.learning_rate_multiplier = 10.0  # recalled
    config.concepts.weight_decay_multiplier = 0.01  # recalled

    # Optimiser and schedule.
    config.optimizer.kind = "adamw"  # recalled
    config.optimizer.schedule = "cosine"  # recalled
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.98  # ours, after OpenCLIP
    config.optimizer.eps = 1e-6  # ours, after OpenCLIP
    config.optimizer.weight_decay = 0.1  # ours, after OpenCLIP; matrices only
    config.optimizer.clip_global_norm = 1.0  # ours

    # Machine: changes how the step is computed, and nothing of the result.
    config.topology = "v5e:16x16"  # ours; 256 chips
    config.mesh.fsdp = 8  # ours

    # Evaluation and checkpoints: all ours.
    config.evaluation.tasks = "imagenet"
    config.evaluation.every_steps = 10_000
    config.checkpoint.best_metric = "imagenet/top1"
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_last = 3

    common.set_stage(config, args.stage, STAGES)
    return common.finish(config, args)
