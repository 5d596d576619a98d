r"""DiHT ViT-B/16 in two stages: 112 px and 32 tokens, then 224 px and 77 tokens.

Method: DiHT, arXiv 2301.02280, in the stages of CLIPA (arXiv 2305.07017, 2306.15658), which trains
on most samples at a fraction of the cost. The comment at each value is its source: "paper" (DiHT's
official code, or papers that describe it), "recalled" (DiHT, from memory, not checked), "CLIPA"
(the configs of its authors), "ours" (our own choice). Values that are not in `STAGES` are those of
`configs/diht_vitb16.py`.

Run, after `data_prep.filter` and `data_prep.label` have written their shards to DATA. The stages
are separate runs, in DIR/stage_1 and DIR/stage_2, and the same command resumes after a stop:

    python -m diht_jax.train --config diht_vitb16_stages --config.data.train=DATA --workdir DIR

`diht_vitb16_stages:stage=1` is only the first stage, and `:stage=2`, with the same DIR, the second.
A stage starts from the parameters of the previous one, with resized position embeddings, a new
optimiser state, and the data position where the previous one ended (docs/guides/train/stages.md).

Meant for v5e:16x16, where both fit according to the compiler (`config.topology`,
docs/guides/scale/scale.md):

    python -m diht_jax.compile --config diht_vitb16_stages:stage=1

Expected: at best the result of `diht_vitb16`; CLIPA finds that small models lose more from small
images than large models. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common, diht_vitb16

# As many samples as `diht_vitb16`, a sixteenth of them at full resolution.
STAGES = (
    {
        "total_examples": 30_000_000_000,  # ours; samples seen
        "model.overrides.image_size": 112,  # CLIPA; 49 patches
        "model.overrides.context_length": 32,  # CLIPA
        "model.remat": "none",  # ours; what fits
        "model.scan_layers": True,  # ours
        "optimizer.learning_rate": 1e-3,  # ours, like CLIPA at half this batch; the peak
        "optimizer.warmup_steps": 2000,  # ours, after OpenCLIP
    },
    {
        "total_examples": 2_000_000_000,  # ours; CLIPA takes 131 million after 2.8 billion
        "model.remat": "minimal",  # ours; what fits
        "model.scan_layers": False,  # ours, like `diht_vitb16`; fewer copies on TPUs
        "optimizer.learning_rate": 1e-4,  # CLIPA; a tenth of the first stage's
        "optimizer.warmup_steps": 400,  # CLIPA; 26 million samples
    },
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; see `common.parse_arg` for `arg`. `stage` numbers `STAGES` from 1."""
    args = common.parse_arg(arg, stage=0)
    config = diht_vitb16.get_config()
    common.set_stage(config, args.stage, STAGES)
    return common.finish(config, args)
