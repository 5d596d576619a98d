r"""Demo: a tiny CLIP on the synthetic noisy web, in minutes on a laptop.

HN-NCE on the pairs kept by the caption filter. `run_demo.sh` trains it four times for the same
number of samples, and changes one thing at a time: raw pairs with InfoNCE, filtered pairs, HN-NCE,
and the concept labels of a small teacher. The batch is small because the number of updates matters
most in so short a run. With Muon as optimiser the student learns shapes (docs/benchmarks/index.md).

Run, as a part of `bash run_demo.sh`, or alone:

    python -m data_prep.synthetic --output demo_output/web
    python -m data_prep.filter --config prep/cat \
        --config.input='demo_output/web/train-*.tar' --config.output=demo_output/filtered
    python -m diht_jax.train --config demo \
        --config.data.train=demo_output/filtered --workdir demo_output/filtered_hn_nce

Meant for the local machine; a laptop is enough (`config.topology`: local).

Expected: the table in the README.
"""

import ml_collections

from configs import common
from diht_jax.config import default_config


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; see `common.parse_arg` for `arg`."""
    args = common.parse_arg(arg)
    config = default_config()

    config.data.batch_size = 64
    config.data.crop_scale = (0.8, 1.0)
    config.data.num_workers = 0
    config.total_examples = 30_720

    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.context_length = 24  # the longest caption has 24 tokens
    config.model.overrides.text_width = 64
    config.model.overrides.text_heads = 1

    config.loss.alpha = 1.0  # as in the web recipes
    config.loss.beta = 0.25

    config.optimizer.kind = "muon"  # the schedule is a cosine
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 20

    config.topology = "local"
    config.log_every_steps = 20
    config.checkpoint.every_steps = 200
    return common.finish(config, args)
