"""DiHT ViT-L/14 at 336 px: `diht_vitl14` fine-tuned at a higher resolution.

Method: DiHT, arXiv 2301.02280. Learning rate, decay and the 400M samples are ours. What the DiHT
recipes share is in `common.diht`.

Run, with the work directory L14 that `diht_vitl14` has left:

    python -m diht_jax.train --config configs/diht_vitl14_336.py --config.model.init_from=L14 \\
        --config.data.train=DATA --workdir DIR

Meant for v5e:16x16, where it fits as the compiler reports (`config.topology`, docs/scaling.md):

    python -m diht_jax.compile --config configs/diht_vitl14_336.py

Expected: with the released DiHT weights of this architecture the official code reports 77.9%
zero-shot top-1 on ImageNet. This recipe has not been run at full length here.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The recipe; `common.parse_arg` describes `arg`."""
    args = common.parse_arg(arg)
    config = common.diht()
    config.model.name = "diht_vitl14_336px"
    config.model.remat = "full"
    config.total_examples = 400_000_000
    config.optimizer.learning_rate = 4e-5
    config.optimizer.warmup_steps = 500
    config.evaluation.every_steps = 1000
    return common.finish(config, args)
