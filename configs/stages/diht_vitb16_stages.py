r"""DiHT ViT-B/16 in two stages: 112 px and 32 tokens first, then 224 px and 77.

Method: DiHT, arXiv 2301.02280, in the stages of CLIPA (arXiv 2305.07017, 2306.15658), which sees
most samples at a fraction of the cost. Each value says where it is from: "paper" is read in DiHT's
official code or in papers that describe it, "recalled" is from memory of that paper and not
checked, "CLIPA" is read in the configs of its authors, "ours" is our own choice. What is not in
`STAGES` is as in `configs/diht_vitb16.py`.

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

from configs import common, diht_vitb16

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
    config = diht_vitb16.get_config()
    common.set_stage(config, args.stage, STAGES)
    return common.finish(config, args)
