r"""DiHT ViT-L/14 at 336 px: `diht_vitl14` fine-tuned at a higher resolution.

Method: DiHT, arXiv 2301.02280. Each value says where it is from: "paper" is read in the paper's
official code or in papers that describe it, "recalled" is from memory of the paper and not
checked, "ours" is our own choice. What is not set here is as in `configs/diht_vitl14.py`.

Run, with the work directory L14 that `diht_vitl14` has left:

    python -m diht_jax.train --config diht_vitl14_336 --config.model.init_from=L14 \
        --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it fits as the compiler reports (`config.topology`,
docs/guides/scale/scale.md):

    python -m diht_jax.compile --config diht_vitl14_336

Expected: with the released DiHT weights of this architecture the official code reports 77.9%
zero-shot top-1 on ImageNet. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common, diht_vitl14


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = diht_vitl14.get_config()

    config.model.name = "diht_vitl14_336px"  # paper
    config.total_examples = 400_000_000  # ours; samples seen, on top of `diht_vitl14`
    config.optimizer.learning_rate = 4e-5  # ours; the peak
    config.optimizer.warmup_steps = 500  # ours
    config.evaluation.every_steps = 1000  # ours
    return common.finish(config, args)
