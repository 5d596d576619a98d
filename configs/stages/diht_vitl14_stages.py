r"""DiHT ViT-L/14 in three stages: 84 px and 32 tokens, then 224 px and 77 tokens, then 336 px.

Method: DiHT, arXiv 2301.02280, in the stages of CLIPA (arXiv 2305.07017, 2306.15658), which trains
on most samples at a fraction of the cost. The comment at each value is its source: "paper" (DiHT's
official code, or papers that describe it), "recalled" (DiHT, from memory, not checked), "CLIPA"
(the configs of its authors), "ours" (our own choice). Values that are not in `STAGES` are those of
`configs/diht_vitl14.py`.

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA. The stages
are separate runs, in DIR/stage_1 to DIR/stage_3, and the same command resumes after a stop:

    python -m diht_jax.train --config diht_vitl14_stages --config.data.train=DATA --workdir DIR

`diht_vitl14_stages:stage=1` is only the first stage, and `:stage=2`, with the same DIR, the second.
A stage starts from the parameters of the previous one, with resized position embeddings, a new
optimiser state, and the data position where the previous one ended (docs/guides/train/stages.md).

Meant for v5e:16x16, where all fit according to the compiler (`config.topology`,
docs/guides/scale/scale.md):

    python -m diht_jax.compile --config diht_vitl14_stages:stage=1

Expected: CLIPA reports 79.7% zero-shot top-1 on ImageNet for an L/14 of 12.8 billion samples at 84
px and 0.5 billion at 224, on other data. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common, diht_vitl14

# Samples per stage as in CLIPA.
STAGES = (
    {
        "total_examples": 12_800_000_000,  # CLIPA; samples seen
        "model.name": "diht_vitl14_224px",  # paper
        "model.overrides.image_size": 84,  # CLIPA; 36 patches
        "model.overrides.context_length": 32,  # CLIPA
        "model.remat": "minimal",  # ours; fewer tokens than those of `diht_vitb16`, which fits
        "model.scan_layers": False,  # ours; fewer copies on TPUs
        "optimizer.learning_rate": 5e-4,  # ours, as `diht_vitl14`; the peak
        "optimizer.warmup_steps": 2000,  # ours, after OpenCLIP
    },
    {
        "total_examples": 512_000_000,  # CLIPA
        "model.name": "diht_vitl14_224px",  # paper
        "model.remat": "full",  # ours; what fits
        "model.scan_layers": False,  # ours, like `diht_vitl14`; fewer copies on TPUs
        "optimizer.learning_rate": 5e-5,  # ours, a tenth of the first stage's as in CLIPA
        "optimizer.warmup_steps": 400,  # CLIPA; 26 million samples
    },
    {
        "total_examples": 131_072_000,  # CLIPA
        "model.name": "diht_vitl14_336px",  # paper
        "model.remat": "full",  # ours; what fits
        "model.scan_layers": False,  # ours, like `diht_vitl14`; fewer copies on TPUs
        "optimizer.learning_rate": 1e-5,  # ours, far below the second stage's as in CLIPA
        "optimizer.warmup_steps": 400,  # CLIPA; 26 million samples
    },
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; see `common.parse_arg` for `arg`. `stage` numbers `STAGES` from 1."""
    args = common.parse_arg(arg, stage=0)
    config = diht_vitl14.get_config()
    common.set_stage(config, args.stage, STAGES)
    return common.finish(config, args)
